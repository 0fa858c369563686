#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One student learns from two teachers: each scores the samples of some data sources, and both together score others.
#
#   python data_prep/geo3k.py --local_save_dir ~/data/geo3k
#   python data_prep/mmk12.py --local_save_dir ~/data/mmk12
#   python data_prep/mix.py --train ~/data/geo3k/train.parquet ~/data/mmk12/train.parquet --weights 1 1 \
#       --val ~/data/geo3k/test.parquet --local_save_dir ~/data/geometry_and_science
#   bash examples/run_multi_teacher.sh
#
# Needs, by `verl-gndpo plan`: 8 GPUs of 80 GB, and 150 GB of host memory for both teachers. An estimated 4 to 8 hours on
# H100s, not measured.
STUDENT=${STUDENT:-Qwen/Qwen2.5-VL-3B-Instruct}
TEACHER_1=${TEACHER_1:-Qwen/Qwen2.5-VL-7B-Instruct}
TEACHER_2=${TEACHER_2:-Qwen/Qwen2.5-VL-32B-Instruct}
KEYS_1=${KEYS_1:-[hiyouga/geometry3k]}        # data sources that the first teacher scores
KEYS_2=${KEYS_2:-[\"*\"]}                     # "*": every source
TEACHER=                                      # the one of the other recipes
DATA_DIR=${DATA_DIR:-$HOME/data/geometry_and_science}
VAL_FILE=${VAL_FILE:-$DATA_DIR/val.parquet}
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
OVERRIDES+=(
    +teacher.models.first.path="$TEACHER_1"
    +teacher.models.first.keys="$KEYS_1"
    +teacher.models.second.path="$TEACHER_2"
    +teacher.models.second.keys="$KEYS_2"
    # The scores of a sample with both teachers are their mean by weight.
    +teacher.models.first.weight=1
    +teacher.models.second.weight=1
    # The gaps to different teachers have different sizes, so each teacher's samples have statistics of their own.
    algorithm.gndpo.baseline=teacher
    algorithm.gndpo.scale=teacher
)
train "$@"
