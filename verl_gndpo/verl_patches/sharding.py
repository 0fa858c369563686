# SPDX-License-Identifier: Apache-2.0
"""Which modules FSDP2 shards by themselves, and therefore gathers only while they run."""

from types import ModuleType
from typing import Any

from verl_gndpo.verl_patches.patch import patches, replace

SHARDED_ALONE = "_gndpo_sharded_alone"
"""Attribute of a model with the names of the only classes whose modules are sharded by themselves."""


@patches("fsdp2_wrap_targets")
def shard_fewer_modules(fsdp_utils: ModuleType) -> bool:
    """Make `_select_fsdp2_wrap_targets` leave out embeddings of vision towers, and obey `SHARDED_ALONE`.

    verl selects every `nn.Embedding`. GLM-4.1V's tower interpolates the weights of its position embedding, outside of
    the module's forward, where they are not gathered.
    """
    original = fsdp_utils._select_fsdp2_wrap_targets

    def _select_fsdp2_wrap_targets(model: Any, names: Any) -> list:
        """Return the modules of stock verl's function that can be sharded by themselves."""
        import torch

        from verl_gndpo.families import family_of

        alone = getattr(model, SHARDED_ALONE, None)
        if alone is not None:
            return [module for module in model.modules() if type(module).__name__ in alone]
        towers = family_of(model).find_towers(model).values()
        tables = {id(m) for tower in towers for m in tower.modules() if isinstance(m, torch.nn.Embedding)}
        return [module for module in original(model, names) if id(module) not in tables]

    replace(fsdp_utils, "_select_fsdp2_wrap_targets", _select_fsdp2_wrap_targets)
    return True
