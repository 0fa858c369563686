# SPDX-License-Identifier: Apache-2.0
"""Makes verl's stock loop run on a machine without an accelerator."""

import os

HOST_BACKEND = "host_file"
"""Name of the checkpoint engine in host_checkpoint_engine.py."""


def without_accelerator() -> bool:
    """Return whether this process belongs to a run on CPUs only.

    It does if VERL_PLATFORM=cpu says so, or if that is unset and torch itself is built without any accelerator. With a
    CUDA build, a node without a visible GPU (a head node, a CPU-only Ray actor) belongs to a run on GPUs.
    """
    chosen = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if chosen:
        return chosen == "cpu"
    # Here, because a process that never uses torch must not pay for importing it.
    import torch

    return torch.version.cuda is None and torch.version.hip is None and not hasattr(torch, "npu")
