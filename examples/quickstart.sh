#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Run GNDPO through verl's real trainer and vLLM on a machine without a GPU. The script sets up .venv, trains a tiny teacher
# and student on drawn problems, distils, and writes summary.json, metrics.jsonl and a picture to outputs/quickstart.
#
#   bash examples/quickstart.sh                      # about 7 minutes on two cores after the installation
#   PYTHON=python bash examples/quickstart.sh        # in an existing environment
#   bash examples/quickstart.sh trainer.total_training_steps=60   # any of verl's overrides
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup.sh
exec "$PYTHON" -m examples.quickstart.run "$@"
