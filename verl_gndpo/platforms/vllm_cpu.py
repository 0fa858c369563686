# SPDX-License-Identifier: Apache-2.0
"""vLLM's side of a run without an accelerator: entry point `vllm.general_plugins`, a no-op where there is one."""

from types import ModuleType
from typing import Any

from verl_gndpo.verl_patches.patch import apply_all, patches, replace


def register() -> None:
    """Apply the patches of vLLM. vLLM calls this in each of its processes, before it builds a model."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        apply_all("vLLM without accelerator")


@patches("vllm_cpu_weights")
def keep_weights(layers: ModuleType) -> bool:
    """Make vLLM multiply by the weights of Linear modules where they are, which is where `load_weights` writes them."""

    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = layers.torch.nn.functional.linear

    replace(layers, "dispatch_cpu_unquantized_gemm", dispatch_cpu_unquantized_gemm)
    return True


@patches("vllm_cpu_experts")
def keep_expert_weights(cpu_moe: ModuleType) -> bool:
    """Make vLLM keep the weights of experts where `load_weights` writes them, and pack them anew for each product."""
    experts, pack = cpu_moe.CPUUnquantizedExperts, cpu_moe.cpu_prepack_moe_weight
    apply = experts.apply

    def apply_packed(self: Any, hidden_states: Any, w1: Any, w2: Any, *args: Any, **kwargs: Any) -> Any:
        """Run vLLM's function with weights in the layout of its kernel."""
        return apply(self, hidden_states, pack(w1, self.isa), pack(w2, self.isa), *args, **kwargs)

    replace(cpu_moe, "cpu_prepack_moe_weight", lambda weight, isa: weight)
    experts.apply = apply_packed
    return True


@patches("vllm_cpu_inspection")
def inspect_in_process(registry: ModuleType) -> bool:
    """Make vLLM inspect models in its own process.

    vLLM uses a new interpreter lest the inspection initialise a device in this process. There is no device here.
    """
    replace(registry, "_run_in_subprocess", lambda function: function())
    return True
