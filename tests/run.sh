#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole test suite, on a machine without a GPU: sets up .venv when PYTHON is not given. Arguments go to pytest:
#
#   bash tests/run.sh                     # everything
#   bash tests/run.sh tests/unit          # one level: unit, integration or end_to_end
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest --durations=10 "$@"
