# SPDX-License-Identifier: Apache-2.0
"""What scores is importable where only torch and transformers are installed, as benchmarks/gpu_check.py needs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
ABSENT = ("verl", "ray", "omegaconf", "hydra", "tensordict", "transfer_queue", "vllm", "wrapt")
MODULES = ("scorer", "attention", "packing", "scoring", "distinct_images", "sequence_parallel")
SCRIPT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ImportError(f"{{name}} is absent on purpose")

sys.meta_path.insert(0, Absent())
import {module}
"""


OTHERS = ["verl_gndpo.advantage", "verl_gndpo.student.projection"]


@pytest.mark.parametrize("module", [f"verl_gndpo.teacher.{name}" for name in MODULES] + OTHERS)
def test_it_is_imported_without_verl_and_its_dependencies(module):
    # -I leaves out plugins of the environment; the tree comes first.
    script = f"import sys; sys.path.insert(0, {str(REPO)!r})\n" + SCRIPT.format(absent=set(ABSENT), module=module)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
