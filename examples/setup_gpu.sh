#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Create .venv-gpu for a machine with NVIDIA GPUs: the versions that verl 0.9.1 pins for CUDA 13, all of them wheels.
#
#   bash examples/setup_gpu.sh
#   PYTHON=python3.12 bash examples/setup_gpu.sh     # with this interpreter: 3.10 to 3.12
#   bash examples/setup_gpu.sh --dry-run             # only show what would be installed
#
# VENV names another folder. Arguments go to `uv pip install`. flash-attn is not installed; see examples/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv-gpu}
PYTHON=${PYTHON:-python3}

"$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || {
    echo "$PYTHON is $("$PYTHON" --version), and this needs Python 3.10 to 3.12: set PYTHON" >&2
    exit 2
}
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet uv
# Compile once, because a run starts dozens of processes that import everything.
UV_COMPILE_BYTECODE=1 "$VENV/bin/uv" pip install --python "$VENV/bin/python" --editable ".[gpu]" "$@"
[[ " $* " == *" --dry-run "* ]] || "$VENV/bin/python" -m verl_gndpo.cli doctor
