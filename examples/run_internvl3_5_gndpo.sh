#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The published experiment: InternVL3.5 students learn from an InternVL3.5-8B teacher on Geometry3K, and its two baselines.
#
#   python data_prep/geo3k.py --local_save_dir ~/data/geo3k
#   bash examples/run_internvl3_5_gndpo.sh                        # SIZE=2B METHOD=gndpo
#   for METHOD in gspo opd gndpo; do SIZE=1B METHOD=$METHOD bash examples/run_internvl3_5_gndpo.sh; done
#
# METHOD=gspo learns from the task's reward and needs no teacher; opd is distillation with the clamped log-ratio; gndpo
# normalises it. All three have the same loss, batch and learning rate.
#
# Needs, by `verl-gndpo plan`: 8 GPUs, of which scoring takes 13 to 18 GB each and the update 17 to 29 GB, beside what vLLM
# reserves while it generates (60 %). 65 steps: an estimated 2 to 4 hours on H100s, not measured; gspo scores nothing.
SIZE=${SIZE:-2B}                              # 1B | 2B | 4B
METHOD=${METHOD:-gndpo}                       # gspo | opd | gndpo
case $METHOD in
    gspo) ESTIMATOR=grpo ;;
    opd | gndpo) ESTIMATOR=$METHOD ;;
    *) echo "METHOD must be gspo, opd or gndpo, got '$METHOD'" >&2 && exit 2 ;;
esac
STUDENT=${STUDENT:-OpenGVLab/InternVL3_5-$SIZE-HF}
TEACHER=${TEACHER:-OpenGVLab/InternVL3_5-8B-HF}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/internvl3_5_${SIZE}_$METHOD}
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
train "$@"
