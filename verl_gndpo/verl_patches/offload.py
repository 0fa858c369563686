# SPDX-License-Identifier: Apache-2.0
"""Weights on their way to the host and back: FSDP2 must not read them before they arrive, and none may change."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from verl_gndpo.verl_patches.patch import patches, replace

CHECKED_AT_A_TIME = 1 << 24
"""Elements of a checksum that are converted to int64 at the same time, 128 MiB of them."""


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


@patches("saved_weights")
def copy_saved_weights(fsdp_utils: ModuleType) -> bool:
    """Make `fsdp2_sharded_save_to_cpu` copy weights that are on the host already."""
    original = fsdp_utils.fsdp2_sharded_save_to_cpu

    def fsdp2_sharded_save_to_cpu(model: Any) -> Any:
        """Run stock verl's function, whose tensors are the model's own where these are on the host."""
        state, spec = original(model)
        live = {_storage(getattr(parameter, "_local_tensor", parameter)) for parameter in model.parameters()}
        return {name: (x.clone() if _storage(x) in live else x, of) for name, (x, of) in state.items()}, spec

    replace(fsdp_utils, "fsdp2_sharded_save_to_cpu", fsdp2_sharded_save_to_cpu)
    return True


def _storage(tensor: Any) -> int:
    return tensor.untyped_storage().data_ptr()


def checksums(model: Any) -> Any:
    """Return the sums of the bits of each parameter's local shard, (parameters,) int64, on the host.

    They are exact and do not depend on the order of the elements. The weights are read once.
    """
    import torch

    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = []
    for parameter in model.parameters():
        local = getattr(parameter, "_local_tensor", parameter).detach()
        bits = local.contiguous().view(-1).view(integers[local.element_size()])
        parts = [part.sum(dtype=torch.int64) for part in bits.split(CHECKED_AT_A_TIME)]
        sums.append(torch.stack(parts).sum() if parts else bits.new_zeros((), dtype=torch.int64))
    return torch.stack(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64)


def check_weights(model: Any, before: Any) -> None:
    """Compare a model's weights with their checksums of before a round trip to the host.

    Raises:
        RuntimeError: some differ; names the first of them.
    """
    import torch

    changed = (checksums(model) != before).nonzero().squeeze(1).tolist()
    if not changed:
        return
    names = [name for name, _ in model.named_parameters()]
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    raise RuntimeError(
        f"{len(changed)} of {len(names)} parameters of {type(model).__name__} on rank {rank} are not what they were "
        f"before they were offloaded to the host, the first of them {names[changed[0]]}: everything that is computed "
        "with them would be wrong. Keep the weights on the accelerator: teacher.fsdp.param_offload=False for a "
        "teacher, actor_rollout_ref.actor.fsdp_config.param_offload=False for the actor"
    )


@patches("offload_check")
def check_first_round_trip(fsdp_utils: ModuleType) -> bool:
    """Make each model's first upload compare the weights with those of before the first offload."""
    offload, load = fsdp_utils.offload_fsdp_model_to_cpu, fsdp_utils.load_fsdp_model_to_gpu
    # None once a model has been checked.
    before: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def offload_fsdp_model_to_cpu(model: Any, empty_cache: bool = True) -> None:
        """Run stock verl's function, which moves a model to the host."""
        if model not in before:
            before[model] = checksums(model)
        offload(model, empty_cache)

    def load_fsdp_model_to_gpu(model: Any) -> None:
        """Run stock verl's function, which moves a model to the accelerator."""
        load(model)
        if before.get(model) is not None:
            check_weights(model, before[model])
            before[model] = None

    replace(fsdp_utils, "offload_fsdp_model_to_cpu", offload_fsdp_model_to_cpu)
    replace(fsdp_utils, "load_fsdp_model_to_gpu", load_fsdp_model_to_gpu)
    return True
