# SPDX-License-Identifier: Apache-2.0
"""Puts the step of GNDPO into verl's trainers."""

import logging
from collections.abc import MutableMapping
from types import ModuleType
from typing import Any

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


class _WithoutFlush(logging.LoggerAdapter[logging.Logger]):
    """A logger that accepts the argument of `print` that a logger does not have."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Return the arguments of a line without `flush`."""
        return msg, {name: value for name, value in kwargs.items() if name != "flush"}


@patches("separate_async_log")
def accept_flush(trainer_separate_async: ModuleType) -> bool:
    """Make the module's logger accept `flush=True`."""
    trainer_separate_async.logger = _WithoutFlush(trainer_separate_async.logger, {})  # type: ignore[attr-defined]
    return True
