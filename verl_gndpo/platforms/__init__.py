# SPDX-License-Identifier: Apache-2.0
"""Makes verl's stock loop run on a machine without an accelerator."""

import importlib.util
import os

HOST_BACKEND = "host_file"
"""Name of the checkpoint engine in host_checkpoint_engine.py."""

BUILDS = ("cuda", "hip", "xpu")
"""Accelerators that torch itself is built for: the attributes of torch.version."""

PLUGINS = ("npu", "mlu", "musa")
"""Accelerators that a package torch_<name> adds to torch as torch.<name>."""


def without_accelerator() -> bool:
    """Return whether this process belongs to a run on CPUs only.

    It does if VERL_PLATFORM=cpu says so, or if that is unset and torch itself is built without any accelerator. With a
    build for one, a node without a visible device (a head node, a CPU-only Ray actor) belongs to a run on accelerators.
    """
    chosen = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if chosen:
        return chosen == "cpu"
    # Here, because a process that never uses torch must not pay for importing it.
    import torch

    built = any(getattr(torch.version, name, None) for name in BUILDS)
    return not built and not any(hasattr(torch, name) or importlib.util.find_spec(f"torch_{name}") for name in PLUGINS)
