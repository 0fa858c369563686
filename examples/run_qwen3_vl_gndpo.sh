#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Qwen3-VL students learn from a larger Qwen3-VL on Geometry3K.
#
#   python data_prep/geo3k.py --local_save_dir ~/data/geo3k
#   bash examples/run_qwen3_vl_gndpo.sh                           # SIZE=2B TEACHER_SIZE=8B
#   SIZE=4B TEACHER_SIZE=32B bash examples/run_qwen3_vl_gndpo.sh
#   TEACHER_SIZE=30B-A3B bash examples/run_qwen3_vl_gndpo.sh      # the teacher as a vLLM server on two GPUs of its own
#
# Needs, by `verl-gndpo plan`: 8 GPUs, of which scoring takes 15 to 28 GB each and the update 22 to 29 GB, beside what vLLM
# reserves while it generates (60 %). 65 steps: an estimated 2 to 5 hours on H100s, not measured.
SIZE=${SIZE:-2B}                              # 2B | 4B
TEACHER_SIZE=${TEACHER_SIZE:-8B}              # 8B | 32B | 30B-A3B
STUDENT=${STUDENT:-Qwen/Qwen3-VL-$SIZE-Instruct}
TEACHER=${TEACHER:-Qwen/Qwen3-VL-$TEACHER_SIZE-Instruct}
# A server runs the experts of a mixture with vLLM's kernels.
if [ "$TEACHER_SIZE" = 30B-A3B ]; then TEACHER_BACKEND=${TEACHER_BACKEND:-server} TEACHER_GPUS=${TEACHER_GPUS:-2}; fi
OUTPUT_DIR=${OUTPUT_DIR:-outputs/qwen3_vl_${SIZE}_from_$TEACHER_SIZE}
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
train "$@"
