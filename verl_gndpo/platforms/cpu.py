# SPDX-License-Identifier: Apache-2.0
"""A CPU platform for verl 0.9.1, and patches of the places that take an accelerator for granted.

verl chooses a platform by asking each registered one whether it is available, in order of registration; ours comes
last. Ray counts "GPU" as a purely logical resource here: `+ray_kwargs.ray_init.num_gpus=N` gives it a number.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase

from verl_gndpo.platforms import without_accelerator
from verl_gndpo.verl_patches.patch import patches, replace

# Holds a sitecustomize.py for the interpreters that vLLM starts.
_STARTUP = os.path.join(os.path.dirname(__file__), "startup")

# verl compares its device module with torch.cpu, so it has to be torch.cpu itself; these are the calls that it makes on
# a device module and torch.cpu lacks.
_MISSING_IN_TORCH_CPU: dict[str, Callable] = {
    "empty_cache": lambda: None,
    "ipc_collect": lambda: None,
    "memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "max_memory_reserved": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "mem_get_info": lambda device=None: (0, 0),
    "set_per_process_memory_fraction": lambda *args, **kwargs: None,
    "get_device_name": lambda device=None: "CPU",
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "manual_seed": torch.manual_seed,
    "manual_seed_all": torch.manual_seed,
}


class _Host(str):
    """The name of the device "cpu", which is also its number where verl writes "cpu:NUMBER"."""

    def __format__(self, spec: str) -> str:
        return "0"


class PlatformCPU(PlatformBase):
    """Device "cpu", process groups over gloo, no device memory to manage."""

    device_name = "cpu"
    vendor_name = "cpu"

    @property
    def device_module(self) -> ModuleType:
        return torch.cpu

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return without_accelerator()

    def current_device(self) -> str:
        # verl hands this to .to() and device=, where a number would mean an accelerator.
        return _Host("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        # Selects verl's shared-memory transfer of weights to the rollout.
        return False

    def cudart(self) -> None:
        return None


@patches("cpu_process_group")
def use_gloo_once(distributed: ModuleType) -> bool:
    """Make `initialize_global_process_group_ray` name gloo for the CPU only, and not again for the device."""
    initialize = distributed.initialize_global_process_group_ray

    def initialize_global_process_group_ray(timeout_second: int | None = None, backend: str | None = None) -> None:
        initialize(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    replace(distributed, "initialize_global_process_group_ray", initialize_global_process_group_ray)
    return True


@patches("cpu_offload")
def keep_weights_unpinned(transformer_impl: ModuleType) -> bool:
    """Make FSDP2 engines that would offload to pinned host memory keep their weights where they are: on the host."""

    def no_offload(pin_memory: bool = True) -> Any:
        return torch.distributed.fsdp.OffloadPolicy()

    replace(transformer_impl, "CPUOffloadPolicy", no_offload)
    return True


@patches("cpu_fsdp1_sync")
def sync_states_over_gloo(init_utils: ModuleType) -> bool:
    """Make FSDP1 send rank 0's weights to the other ranks although they are not on an accelerator."""
    replace(init_utils, "_check_module_states_for_sync_module_states", lambda states: None)
    return True


@patches("cpu_store")
def listen_where_the_ranks_are(rendezvous: ModuleType) -> bool:
    """Make the store of a process group whose ranks meet at a loopback address listen there, not everywhere."""
    store_class = rendezvous.TCPStore

    def make_store(*, host_name: str, port: int, is_master: bool = False, **options: Any) -> Any:
        """Return a `TCPStore`."""
        if is_master and host_name in ("127.0.0.1", "localhost"):
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # A store of this process may listen there already, and then serves this one, too.
            with contextlib.suppress(OSError):
                listener.bind(("127.0.0.1", port))
                listener.listen()
                port = listener.getsockname()[1]
                options["master_listen_fd"] = listener.detach()
        return store_class(host_name=host_name, port=port, is_master=is_master, **options)

    replace(rendezvous, "TCPStore", make_store)
    return True


@patches("cpu_device_module")
def complete_torch_cpu(torch_cpu: ModuleType) -> bool:
    """Add to torch.cpu the calls that verl makes on a device module, unless it has them already."""
    missing = [name for name in _MISSING_IN_TORCH_CPU if not hasattr(torch_cpu, name)]
    for name in missing:
        setattr(torch_cpu, name, _MISSING_IN_TORCH_CPU[name])
    return bool(missing)


def register_platform(platform: ModuleType) -> None:
    """Add the CPU to the platforms of `verl.plugin.platform`, given as the module."""
    platform.PlatformRegistry.register("cpu")(PlatformCPU)


def register_engines(transformer_impl: ModuleType) -> None:
    """Register verl's FSDP engines for the CPU, too: verl does so for CUDA and NPU only."""
    for model_type, engine in (
        ("language_model", transformer_impl.FSDPEngineWithLMHead),
        ("value_model", transformer_impl.FSDPEngineWithValueHead),
    ):
        register = transformer_impl.EngineRegistry.register
        register(model_type=model_type, backend=["fsdp", "fsdp2"], device="cpu")(engine)


def prepare_environment() -> None:
    """Set what the child processes of a run without an accelerator inherit. Idempotent."""
    # vLLM's CPU backend asks each part of a model whether it uses MLA, and fails on parts that name no architecture,
    # such as Qwen3-VL's language model.
    os.environ.setdefault("VLLM_MLA_DISABLE", "1")
    paths = [_STARTUP, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
