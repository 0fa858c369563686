# SPDX-License-Identifier: Apache-2.0
"""vLLM's side of a run without an accelerator: entry point `vllm.general_plugins`, a no-op where there is one."""


def register() -> None:
    """Called by vLLM in each of its processes, before a model is built."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch
    import vllm.model_executor.layers.utils as layers
    import vllm.model_executor.models.registry as registry

    def keep_weights(layer, remove_weight):
        # vLLM's CPU backend packs each Linear's weight and leaves an empty tensor behind, so that the weights that verl
        # sends after every step would be written to nothing. The plain product keeps them where load_weights finds
        # them.
        layer.cpu_linear = torch.nn.functional.linear

    layers.dispatch_cpu_unquantized_gemm = keep_weights

    # vLLM looks at a model's class in a new interpreter, lest this process initialise a device. There is none here, and
    # importing everything once more takes half a minute on a small machine.
    registry._run_in_subprocess = lambda function: function()
