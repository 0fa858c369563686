# SPDX-License-Identifier: Apache-2.0
"""What verl's stock loop needs on a machine without an accelerator."""

import os


def without_accelerator() -> bool:
    """Whether this process belongs to a run on CPUs only.

    True when VERL_PLATFORM=cpu says so, or when it is unset and torch itself is built without any accelerator. A CUDA
    build on a node that merely shows no GPU (a head node, a CPU-only Ray actor) is not such a run.
    """
    chosen = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if chosen:
        return chosen == "cpu"
    # Here, because a process that never uses torch must not pay for importing it.
    import torch

    return torch.version.cuda is None and torch.version.hip is None and not hasattr(torch, "npu")
