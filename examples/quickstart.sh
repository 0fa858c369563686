#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GNDPO through verl's real trainer and vLLM on a machine without a GPU: sets up .venv, trains a tiny teacher and student
# on a visual task of our own, distils, and leaves summary.json, metrics.jsonl and a picture in outputs/quickstart.
#
#   bash examples/quickstart.sh                      # about 7 minutes on two cores after the installation
#   PYTHON=python bash examples/quickstart.sh        # in an environment that you have
#   bash examples/quickstart.sh trainer.total_training_steps=60   # any of verl's overrides
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup.sh
exec "$PYTHON" -m examples.quickstart.run "$@"
