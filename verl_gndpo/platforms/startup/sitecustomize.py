# SPDX-License-Identifier: Apache-2.0
"""Python runs this at start-up in the child processes of a run without an accelerator.

`platforms.cpu.prepare_environment` puts this folder on their PYTHONPATH.
vLLM starts interpreters of its own, which import torchvision before they load any plugin.
"""

import importlib.machinery
import importlib.util
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))

try:
    from verl_gndpo.platforms import every_interpreter
except ImportError:
    pass  # Another interpreter, without this package, may have inherited PYTHONPATH.
else:
    every_interpreter.watch()

# This file hides the sitecustomize that would have run without it.
_hidden = importlib.machinery.PathFinder.find_spec(
    "sitecustomize", [p for p in sys.path if os.path.abspath(p or ".") != _HERE]
)
if _hidden is not None and _hidden.loader is not None:
    _hidden.loader.exec_module(importlib.util.module_from_spec(_hidden))
