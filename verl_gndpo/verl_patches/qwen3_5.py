# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5's linear attention from a cache, which a teacher fills with a prompt."""

from types import ModuleType
from typing import Any

from verl_gndpo.verl_patches.patch import patches, replace


@patches("qwen3_5_cache")
def continue_from_cache(qwen3_5: ModuleType) -> bool:
    """Make `qwen3_5_gated_delta_net_forward` leave sequences that are not packed to transformers' own forward.

    verl replaces the forwards of the classes after it has imported this module, so that they are still those of
    transformers here.
    """
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet

    own = {kind: kind.forward for kind in (Qwen3_5GatedDeltaNet, Qwen3_5MoeGatedDeltaNet)}
    original = qwen3_5.qwen3_5_gated_delta_net_forward
    if original in own.values():
        return False

    def qwen3_5_gated_delta_net_forward(
        self: Any,
        hidden_states: Any,
        cache_params: Any = None,
        attention_mask: Any = None,
        cu_seqlens: Any = None,
        cu_seqlens_cpu: Any = None,
    ) -> Any:
        """Run stock verl's function on packed sequences, and transformers' own on all others."""
        if cu_seqlens is not None:
            return original(self, hidden_states, cache_params, attention_mask, cu_seqlens, cu_seqlens_cpu)
        return own[type(self)](self, hidden_states, cache_params=cache_params, attention_mask=attention_mask)

    replace(qwen3_5, "qwen3_5_gated_delta_net_forward", qwen3_5_gated_delta_net_forward)
    return True
