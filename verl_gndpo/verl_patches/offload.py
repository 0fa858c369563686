# SPDX-License-Identifier: Apache-2.0
"""Offloaded FSDP2 weights that the host must not read before they have arrived."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from verl_gndpo.verl_patches.patch import patches, replace


@contextmanager
def waiting_for_copies(synchronize: Callable[[], None]) -> Iterator[None]:
    """Within this context, have FSDP2 wait for the accelerator before it copies a parameter on the host.

    FSDP2 pads a shard that is smaller than the others, and does so again when the parameter moves. On the way to the
    host, it copies values which a transfer with `non_blocking=True` may not have delivered yet.

    Args:
        synchronize: waits for the accelerator.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    reset = FSDPParam.reset_sharded_param

    def wait_and_reset(self: Any) -> None:
        # Even shards are not copied, and keep the speed of the asynchronous transfer.
        local = getattr(self._module_info.module, self._module_info.param_name)._local_tensor
        if local.device.type == "cpu" and local.size() != self.padded_sharded_param_size:
            synchronize()
        reset(self)

    FSDPParam.reset_sharded_param = wait_and_reset  # type: ignore[method-assign]  # within this context
    try:
        yield
    finally:
        FSDPParam.reset_sharded_param = reset  # type: ignore[method-assign]


@patches("fsdp2_offload")
def offload_in_order(fsdp_utils: ModuleType) -> bool:
    """Make `offload_fsdp2_model_to_cpu` wait for each uneven shard before it is padded on the host."""
    original = fsdp_utils.offload_fsdp2_model_to_cpu

    def offload_fsdp2_model_to_cpu(model: Any, empty_cache: bool = True) -> None:
        """Run stock verl's function, which moves a model to the host."""
        from verl.utils.device import get_torch_device

        with waiting_for_copies(lambda: get_torch_device().synchronize()):
            original(model, empty_cache)

    replace(fsdp_utils, "offload_fsdp2_model_to_cpu", offload_fsdp2_model_to_cpu)
    return True
