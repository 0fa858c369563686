# SPDX-License-Identifier: Apache-2.0
"""Makes `actor_rollout_ref.actor.freeze_vision_tower=True` true for the FSDP engines.

verl 0.9.1 has the flag, and its FSDP engines never read it. Importing this module makes the engines of this process
freeze the vision tower of every model that they build; the trainer mixin has the actor's process import it, through
verl's own `model.external_lib`, when the flag is set.
"""

from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

# Qwen-VL, InternVL and LLaVA families, in that order.
VISION_TOWERS = ("visual", "vision_tower", "vision_model")

_build_module = FSDPEngineWithLMHead._build_module


def _build_module_with_frozen_tower(self):
    module = _build_module(self)
    towers = [m for name, m in module.named_modules() if name.rsplit(".", 1)[-1] in VISION_TOWERS]
    if not towers:
        raise ValueError(
            f"freeze_vision_tower is set, but {type(module).__name__} has no module called {' or '.join(VISION_TOWERS)}"
        )
    for tower in towers:
        tower.requires_grad_(False)
    return module


FSDPEngineWithLMHead._build_module = _build_module_with_frozen_tower
