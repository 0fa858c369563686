# SPDX-License-Identifier: Apache-2.0
"""The extras resolve, without an installation. Skipped where no package index can be reached."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")
PINNED = {"torch": "2.11.0", "vllm": "0.24.0", "transformers": "5.9.0", "cupy-cuda13x": "14.0.1", "verl": "0.9.1"}
UNREACHABLE = r"(?i)failed to fetch|error sending request|connection|dns|timed out|network"

pytestmark = pytest.mark.skipif(not UV.exists(), reason="uv is not installed beside this Python")


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=os.environ | environment, timeout=500)
    if done.returncode and re.search(UNREACHABLE, done.stderr):
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[0]}")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_the_gpu_extra_resolves_to_wheels_on_every_python(python):
    """For glibc 2.31 and newer. antlr is pure Python, and has no wheel of the version that hydra needs."""
    options = ["--python-version", python, "--python-platform", "x86_64-manylinux_2_31", "--no-header", "--no-annotate"]
    wheels = ["--only-binary", ":all:", "--no-binary", "antlr4-python3-runtime"]
    found = run(str(UV), "pip", "compile", "--quiet", *options, *wheels, "pyproject.toml", "--extra", "gpu")
    versions = dict(re.findall(r"^([\w-]+)==(\S+)$", found, re.MULTILINE))
    assert PINNED.items() <= versions.items()
    # It would be compiled.
    assert "flash-attn" not in versions


def test_the_script_for_a_gpu_machine_finds_all_that_it_installs(tmp_path):
    """Up to the installation itself, on this interpreter."""
    found = run("bash", "examples/setup_gpu.sh", "--dry-run", PYTHON=sys.executable, VENV=str(tmp_path / "venv"))
    for name, version in PINNED.items():
        assert f"+ {name}=={version}" in found
    assert not list((tmp_path / "venv").glob("lib/*/site-packages/torch"))
