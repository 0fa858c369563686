# SPDX-License-Identifier: Apache-2.0
"""Makes a torchvision whose compiled part is for CUDA importable beside a CPU torch.

PyPI has no CPU build of torchvision, and importing the CUDA one fails: its Python part describes two operators that
only its compiled part declares. The Qwen-VL processors need only its Python part. So when torchvision is about to be
imported and its compiled part does not load, the two operators are declared here. This module imports neither torch nor
verl, because every process of a run without an accelerator loads it at start-up.
"""

import importlib.machinery
import importlib.util
import os
from typing import Any

from verl_gndpo.platforms import without_accelerator
from verl_gndpo.platforms.first_import import FirstImport
from verl_gndpo.verl_patches.patch import patches

_declared: list[Any] = []
"""The declarations live as long as these objects."""


def _declare_operators() -> None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or not without_accelerator():
        return
    if not _compiled_part_loads(os.path.dirname(spec.origin)):
        import torch

        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)


_first_import = FirstImport("torchvision", _declare_operators)


def _compiled_part_loads(folder: str) -> bool:
    import torch

    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        library = os.path.join(folder, f"_C{suffix}")
        if os.path.exists(library):
            try:
                torch.ops.load_library(library)
            except (OSError, RuntimeError):
                return False
            return True
    return False


@patches("torchvision_ops")
def install() -> bool:
    """Watch for the import of torchvision. Idempotent; has an effect only where there is no accelerator.

    Returns:
        False if torchvision had been imported before it could be watched for.
    """
    return _first_import.watch()
