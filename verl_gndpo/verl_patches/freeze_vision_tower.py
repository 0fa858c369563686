# SPDX-License-Identifier: Apache-2.0
"""Makes `actor_rollout_ref.actor.freeze_vision_tower=True` true for the FSDP engines.

verl 0.9.1 has the flag, and its FSDP engines never read it. If the flag is set, the trainer names this module in
`model.external_lib`. The actor's process then imports it, and its engines freeze the vision tower of every model that
they build.
"""

from types import ModuleType
from typing import Any

from verl_gndpo.verl_patches.patch import apply, patches

# Qwen-VL, InternVL and LLaVA families, in that order.
VISION_TOWERS = ("visual", "vision_tower", "vision_model")


@patches("freeze_vision_tower")
def freeze_vision_tower(transformer_impl: ModuleType) -> bool:
    """Make the FSDP engines of this process freeze the vision tower of every model that they build."""
    engine_class = transformer_impl.FSDPEngineWithLMHead
    build_module = engine_class._build_module

    def _build_module(self: Any) -> Any:
        """Run stock verl's method, and freeze the vision tower of what it builds.

        Raises:
            ValueError: the model has no vision tower.
        """
        module = build_module(self)
        towers = [m for name, m in module.named_modules() if name.rsplit(".", 1)[-1] in VISION_TOWERS]
        if not towers:
            names = " or ".join(VISION_TOWERS)
            raise ValueError(f"freeze_vision_tower is set, but {type(module).__name__} has no module called {names}")
        for tower in towers:
            tower.requires_grad_(False)
        return module

    engine_class._build_module = _build_module
    return True


apply("freeze_vision_tower")
