#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train with GNDPO on Geometry3K: a Qwen2.5-VL-3B student learns from a Qwen2.5-VL-7B teacher on its own answers.
#
#   python data_prep/geo3k.py --local_save_dir ~/data/geo3k
#   bash examples/run_qwen2_5vl_gndpo.sh                                  # the published settings, on all GPUs found
#   TEACHER=/models/teacher LR=2e-6 bash examples/run_qwen2_5vl_gndpo.sh trainer.total_epochs=2
#   PROFILE=cpu STUDENT=... TEACHER=... bash examples/run_qwen2_5vl_gndpo.sh   # the same overrides on tiny models
#
# Needs, by `verl-gndpo plan`: 8 GPUs, of which scoring takes 18 GB each and the update 26 GB, beside what vLLM reserves while
# it generates (60 %). 65 steps: an estimated 2 to 4 hours on H100s, not measured.
#
# Set any capitalised setting of recipe.sh in the environment. Arguments are Hydra overrides, and win over the settings.
STUDENT=${STUDENT:-Qwen/Qwen2.5-VL-3B-Instruct}
TEACHER=${TEACHER:-Qwen/Qwen2.5-VL-7B-Instruct}
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
train "$@"
