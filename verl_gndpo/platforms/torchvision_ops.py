# SPDX-License-Identifier: Apache-2.0
"""Makes a torchvision whose compiled part is for CUDA importable beside a CPU torch.

PyPI has no CPU build of torchvision, and importing the CUDA one fails: its Python part describes two operators that
only its compiled part declares. The Qwen-VL processors need nothing but its Python part. So when torchvision is about
to be imported and its compiled part does not load, the two are declared here. Imports neither torch nor verl:
every process of a run without an accelerator loads it at start-up.
"""

import importlib.machinery
import importlib.util
import os
import sys

from verl_gndpo.platforms import without_accelerator


class _DeclareOps:
    """A meta-path finder that finds nothing itself: it is told when somebody first looks for torchvision."""

    asked = False
    library = None

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision":
            cls.asked = True
            sys.meta_path.remove(cls)
            spec = importlib.util.find_spec(name)
            if spec is not None and without_accelerator() and not _compiled_part_loads(os.path.dirname(spec.origin)):
                import torch

                # The declarations live as long as this object.
                cls.library = torch.library.Library("torchvision", "DEF")
                cls.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                cls.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


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


def install() -> None:
    """Watch for the import of torchvision; act only where there is no accelerator. Idempotent."""
    if not _DeclareOps.asked and "torchvision" not in sys.modules and _DeclareOps not in sys.meta_path:
        sys.meta_path.insert(0, _DeclareOps)
