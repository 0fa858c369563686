# SPDX-License-Identifier: Apache-2.0
"""vLLM's side of a run without an accelerator: entry point `vllm.general_plugins`, a no-op where there is one."""


def register() -> None:
    """Called by vLLM in each of its processes, before a model is built."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch
    import vllm.model_executor.layers.utils as layers

    from verl_gndpo.platforms import torchvision_ops

    torchvision_ops.install()

    def keep_weights(layer, remove_weight):
        # vLLM's CPU backend packs each Linear's weight and leaves an empty tensor behind, so that the weights that verl
        # sends after every step would be written to nothing. The plain product keeps them where load_weights finds them.
        layer.cpu_linear = torch.nn.functional.linear

    layers.dispatch_cpu_unquantized_gemm = keep_weights
