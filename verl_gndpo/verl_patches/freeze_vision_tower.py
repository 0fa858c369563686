# SPDX-License-Identifier: Apache-2.0
"""Makes `actor_rollout_ref.actor.freeze_vision_tower=True` true for the FSDP engines, with and without LoRA.

verl 0.9.1 has the flag, and its FSDP engines never read it. If the flag is set, the trainer names this module in
`model.external_lib`. The actor's process then imports it, and its engines freeze the vision tower of every model that
they build.

peft adds LoRA adapters after the tower is frozen, so they are kept out of it here. They are also kept out of a
projector beside the tower. vLLM applies adapters to the language model only (its `enable_tower_connector_lora` is off),
so that rollouts would follow another policy than the one that is trained. With
`actor_rollout_ref.model.lora.merge=True` verl sends merged weights instead of adapters, and the projector is trained.
"""

import re
from types import ModuleType
from typing import Any

from verl_gndpo.families import family_of
from verl_gndpo.verl_patches.patch import apply, patches


@patches("freeze_vision_tower")
def freeze_vision_tower(transformer_impl: ModuleType) -> bool:
    """Make the FSDP engines of this process freeze the vision tower of every model that they build."""
    engine_class = transformer_impl.FSDPEngineWithLMHead
    build_module, build_lora_module = engine_class._build_module, engine_class._build_lora_module

    def _build_module(self: Any) -> Any:
        """Run stock verl's method, and freeze the vision tower of what it builds.

        Raises:
            ValueError: the model has no vision tower.
        """
        module = build_module(self)
        towers = family_of(module).find_towers(module)
        if not towers:
            raise ValueError(
                f"freeze_vision_tower is set, but no vision tower is found in {type(module).__name__}; if it has one, "
                "declare its model family (docs/extending/model_family.md)"
            )
        for tower in towers.values():
            tower.requires_grad_(False)
        return module

    def _build_lora_module(self: Any, module: Any) -> Any:
        """Run stock verl's method, with adapters in no module that is frozen or that rollouts would not apply them to.

        A user's own `model.exclude_modules` decides instead, if it is set.
        """
        if not self.model_config.exclude_modules:
            names = modules_without_adapters(module, merged=bool(self.model_config.lora.get("merge")))
            # verl's configs refuse to have a field changed.
            object.__setattr__(self.model_config, "exclude_modules", rf"({'|'.join(map(re.escape, names))})(\..*)?")
            if self.rank == 0:
                print(f"freeze_vision_tower: no LoRA adapters in {' and '.join(names)}")
        return build_lora_module(self, module)

    engine_class._build_module, engine_class._build_lora_module = _build_module, _build_lora_module
    return True


def modules_without_adapters(model: Any, merged: bool) -> list[str]:
    """Return the names of a model's modules that get no LoRA adapters if its vision tower is frozen.

    Args:
        model: a Hugging Face model.
        merged: adapters are merged into the weights that are sent to the rollout engine.
    """
    family = family_of(model)
    return [*family.find_towers(model), *({} if merged else family.find_projectors(model))]


apply("freeze_vision_tower")
