# SPDX-License-Identifier: Apache-2.0
"""Puts the step of GNDPO into verl's trainers."""

from types import ModuleType

from verl_gndpo.config import TRAINER_MODES
from verl_gndpo.verl_patches.patch import patches


@patches("trainers")
def extend_trainers(v1: ModuleType) -> bool:
    """Put the mixin in front of the trainers that `verl.trainer.ppo.v1` has registered, under their own names."""
    from verl_gndpo.trainer import GNDPOTrainerMixin

    registry = v1.trainer_base.TRAINER_REGISTRY
    for name in TRAINER_MODES:
        trainer = registry[name]
        registry[name] = type(f"GNDPO{trainer.__name__}", (GNDPOTrainerMixin, trainer), {"__doc__": trainer.__doc__})
    return True
