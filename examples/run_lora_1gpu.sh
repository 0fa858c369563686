#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A LoRA student on one card of 24 or 48 GB: Qwen3-VL-2B from 4B, or 4B from 8B, with short sequences.
#
#   python data_prep/geo3k.py --local_save_dir ~/data/geo3k
#   MEMORY=24 bash examples/run_lora_1gpu.sh
#   MEMORY=48 bash examples/run_lora_1gpu.sh
#
# `verl-gndpo export` writes the trained model, merged or as an adapter.
#
# Needs one GPU and 40 GB (MEMORY=24) or 80 GB (48) of host memory. By hand, because `verl-gndpo plan` knows no LoRA: of the
# card, the teacher takes 9 or 18 GB while it scores, the student's update 11 or 16 GB, each with 5 GB of CUDA contexts and
# libraries. An estimated 10 hours on an RTX 4090, not measured.
MEMORY=${MEMORY:-24}                          # GB of the card: 24 | 48
case $MEMORY in
    24) SIZE=2B TEACHER_SIZE=4B ;;
    48) SIZE=4B TEACHER_SIZE=8B ;;
    *) echo "MEMORY must be 24 or 48, got '$MEMORY'" >&2 && exit 2 ;;
esac
STUDENT=${STUDENT:-Qwen/Qwen3-VL-$SIZE-Instruct}
TEACHER=${TEACHER:-Qwen/Qwen3-VL-$TEACHER_SIZE-Instruct}
RANK=${RANK:-64}
GPUS=1
BATCH=${BATCH:-16}
N=${N:-8}
# Adapters take a larger step than whole weights.
LR=${LR:-2e-5}
if [ "${PROFILE:-gpu}" = gpu ]; then
    MAX_PROMPT=${MAX_PROMPT:-1536}
    MAX_RESPONSE=${MAX_RESPONSE:-2048}
fi
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
OVERRIDES+=(
    actor_rollout_ref.model.lora_rank="$RANK"
    actor_rollout_ref.model.lora_alpha=$(( 2 * RANK ))
    actor_rollout_ref.model.target_modules=all-linear
)
if [ "$PROFILE" = gpu ]; then
    OVERRIDES+=(
        # The frozen weights need no float32 copy, and leave the card while the teacher or the rollout engine works.
        actor_rollout_ref.actor.fsdp_config.model_dtype=bfloat16
        actor_rollout_ref.actor.fsdp_config.param_offload=True
        actor_rollout_ref.actor.fsdp_config.optimizer_offload=True
        actor_rollout_ref.rollout.gpu_memory_utilization=0.5
        # The rollout engine gets the base model once, and then the adapters.
        actor_rollout_ref.rollout.load_format=safetensors
    )
fi
train "$@"
