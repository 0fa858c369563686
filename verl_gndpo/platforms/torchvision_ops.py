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
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

from verl_gndpo.platforms import without_accelerator
from verl_gndpo.verl_patches.patch import patches


class _DeclareOps(MetaPathFinder):
    """Declares the operators when somebody first looks for torchvision. It finds no module itself."""

    asked = False
    library: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name == "torchvision":
            self.asked = True
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is None or not without_accelerator():
                return None
            if not _compiled_part_loads(os.path.dirname(spec.origin)):
                import torch

                # The declarations live as long as this object.
                self.library = torch.library.Library("torchvision", "DEF")
                self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


_finder = _DeclareOps()


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
    if not _finder.asked and "torchvision" not in sys.modules and _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    return _finder.asked or _finder in sys.meta_path
