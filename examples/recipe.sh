# SPDX-License-Identifier: Apache-2.0
# The settings of all recipes, and the function that starts a run. A recipe sets its own defaults (STUDENT, TEACHER, ...),
# sources this file, adds to OVERRIDES what is its own, and calls `train "$@"`. Set any capitalised setting in the
# environment. Arguments of a recipe are Hydra overrides, and win over the settings.
set -euo pipefail

PYTHON=${PYTHON:-python}
PROFILE=${PROFILE:-gpu}                       # gpu | cpu
RECIPE=$(basename "$0" .sh) && RECIPE=${RECIPE#run_}
DATA_DIR=${DATA_DIR:-$HOME/data/geo3k}
TRAIN_FILE=${TRAIN_FILE:-$DATA_DIR/train.parquet}
VAL_FILE=${VAL_FILE:-$DATA_DIR/test.parquet}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/$RECIPE}
ESTIMATOR=${ESTIMATOR:-gndpo}                 # gndpo, opd, another preset of docs/signal.md, or any of verl's own
TEACHER_BACKEND=${TEACHER_BACKEND:-worker}    # worker | server: verl's own replicas, on TEACHER_GPUS of their own
TEACHER_GPUS=${TEACHER_GPUS:-0}               # GPUs of one node that only the teacher uses; 0: it shares the actor's
ROLLOUT_GPUS=${ROLLOUT_GPUS:-0}               # GPUs of one node that only generate, with trainer_mode=separate_async (docs/modes.md)

BATCH=${BATCH:-32}                            # prompts per step, and per update
N=${N:-16}                                    # responses per prompt
LR=${LR:-1e-6}
EPOCHS=${EPOCHS:-1}
TEMPERATURE=${TEMPERATURE:-1.0}
SHARE_PROMPTS=${SHARE_PROMPTS:-True}          # the student, too, runs a prompt and its images once for all its responses
FREEZE_VISION=${FREEZE_VISION:-True}
NNODES=${NNODES:-1}
CHECK=${CHECK:-True}                          # run verl-gndpo doctor before anything starts; the trainer checks settings, too

EXPORTS=()                                    # variables that all processes of a run need
if [ "$PROFILE" = gpu ]; then
    # The devices that a process may use, and whether flash-attn is there.
    probe='import importlib.util, torch; print(torch.accelerator.device_count(), importlib.util.find_spec("flash_attn") is not None)'
    read -r detected flash_attn < <("$PYTHON" -c "$probe" || echo 0 True)
    # A head node may have no GPU of its own: assume the published eight.
    GPUS=${GPUS:-$(( (detected > 0 ? detected : 8) - TEACHER_GPUS - ROLLOUT_GPUS ))}
    MAX_PROMPT=${MAX_PROMPT:-8192}
    MAX_RESPONSE=${MAX_RESPONSE:-16384}
    TOKENS_PER_GPU=${TOKENS_PER_GPU:-$(( MAX_PROMPT + MAX_RESPONSE ))}
    ROLLOUT_TP=${ROLLOUT_TP:-1}
    DTYPE=${DTYPE:-bfloat16}
    LOGGER=${LOGGER:-'["console","file","tensorboard"]'}
elif [ "$PROFILE" = cpu ]; then
    GPUS=${GPUS:-1}                           # a logical number: Ray places one worker on each
    MAX_PROMPT=${MAX_PROMPT:-128}
    MAX_RESPONSE=${MAX_RESPONSE:-24}
    TOKENS_PER_GPU=${TOKENS_PER_GPU:-8192}
    ROLLOUT_TP=1
    DTYPE=float32
    LOGGER=${LOGGER:-'["console","file"]'}
    # Compilation costs more than it saves on tiny models. The hub settings keep the run offline.
    TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
    HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 RAY_DEDUP_LOGS=0
    EXPORTS+=(
        TORCHDYNAMO_DISABLE OMP_NUM_THREADS VLLM_CPU_KVCACHE_SPACE HF_HUB_OFFLINE TRANSFORMERS_OFFLINE VLLM_NO_USAGE_STATS
        RAY_USAGE_STATS_ENABLED RAY_DEDUP_LOGS
    )
    if [ -z "${RAY_ADDRESS:-}" ]; then
        # Nothing of the run listens beyond this machine (docs/security.md). Ray takes 127.0.0.1 for its own address only
        # where it may not form a cluster, and verl's servers and TransferQueue follow it.
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 VLLM_HOST_IP=127.0.0.1
        EXPORTS+=(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER VLLM_HOST_IP)
    fi
else
    echo "PROFILE must be gpu or cpu, got '$PROFILE'" >&2
    exit 2
fi
mkdir -p "$OUTPUT_DIR"
VERL_FILE_LOGGER_PATH=${VERL_FILE_LOGGER_PATH:-$OUTPUT_DIR/metrics.jsonl}
EXPORTS+=(VERL_FILE_LOGGER_PATH)
export "${EXPORTS[@]}"

OVERRIDES=(
    # The method, as published: signal, loss, one update per batch, no KL and no entropy term.
    +recipe=gndpo
    algorithm.adv_estimator="$ESTIMATOR"
    +gndpo=default
    +teacher="$TEACHER_BACKEND"
    +student.share_prompts="$SHARE_PROMPTS"

    data.train_files="$TRAIN_FILE"
    data.val_files="$VAL_FILE"
    data.image_key=images
    data.train_batch_size="$BATCH"
    data.max_prompt_length="$MAX_PROMPT"
    data.max_response_length="$MAX_RESPONSE"
    data.filter_overlong_prompts=True
    data.truncation=error

    actor_rollout_ref.model.path="$STUDENT"
    actor_rollout_ref.model.enable_gradient_checkpointing=True
    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.freeze_vision_tower="$FREEZE_VISION"
    actor_rollout_ref.actor.optim.lr="$LR"
    actor_rollout_ref.actor.grad_clip=1.0
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu="$TOKENS_PER_GPU"

    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.n="$N"
    actor_rollout_ref.rollout.temperature="$TEMPERATURE"
    actor_rollout_ref.rollout.dtype="$DTYPE"
    actor_rollout_ref.rollout.tensor_model_parallel_size="$ROLLOUT_TP"
    # verl's default, `dummy`, fills buffers with random values, and a weight sync does not replace those.
    actor_rollout_ref.rollout.load_format=auto
    actor_rollout_ref.rollout.calculate_log_probs=True

    trainer.use_v1=True
    trainer.v1.trainer_mode=sync
    trainer.nnodes="$NNODES"
    trainer.n_gpus_per_node="$GPUS"
    trainer.total_epochs="$EPOCHS"
    trainer.project_name=verl-gndpo
    trainer.experiment_name="$(basename "$OUTPUT_DIR")"
    trainer.logger="$LOGGER"
    trainer.default_local_dir="$OUTPUT_DIR/checkpoints"
    trainer.save_freq=20
    trainer.test_freq=10
)
if [ -n "${RAY_ADDRESS:-}" ]; then
    # The processes of a Ray that runs already don't have this script's environment.
    for name in "${EXPORTS[@]}"; do OVERRIDES+=("+ray_kwargs.ray_init.runtime_env.env_vars.$name='${!name}'"); done
fi
if [ -n "${TEACHER:-}" ]; then OVERRIDES+=(teacher.model.path="$TEACHER"); fi
if [ "$TEACHER_GPUS" != 0 ]; then OVERRIDES+=(teacher.placement=dedicated teacher.n_gpus_per_node="$TEACHER_GPUS"); fi
if [ "$ROLLOUT_GPUS" != 0 ]; then
    OVERRIDES+=(
        trainer.v1.trainer_mode=separate_async
        actor_rollout_ref.rollout.nnodes=1
        actor_rollout_ref.rollout.n_gpus_per_node="$ROLLOUT_GPUS"
    )
fi

if [ "$PROFILE" = gpu ]; then
    OVERRIDES+=(
        actor_rollout_ref.model.use_remove_padding=True
        actor_rollout_ref.rollout.gpu_memory_utilization=0.6
    )
    if [ "$ROLLOUT_GPUS" != 0 ]; then OVERRIDES+=(actor_rollout_ref.rollout.checkpoint_engine.backend=nccl); fi
    if [ "$flash_attn" = False ]; then
        echo "flash-attn is not installed: the models attend with SDPA, and the actor does not remove padding" >&2
        OVERRIDES+=(
            actor_rollout_ref.model.use_remove_padding=False
            +actor_rollout_ref.model.override_config.attn_implementation=sdpa
        )
    fi
else
    OVERRIDES+=(
        trainer.device=cpu
        transfer_queue.backend.SimpleStorage.num_data_storage_units=1
        data.dataloader_num_workers=0
        # Any number would fork a process in which torch has started threads. Such a fork may hang.
        data.filter_overlong_prompts_workers=null
        actor_rollout_ref.model.use_remove_padding=False
        +actor_rollout_ref.model.override_config.attn_implementation=sdpa
        actor_rollout_ref.model.enable_gradient_checkpointing=False
        actor_rollout_ref.actor.use_torch_compile=False
        actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
        actor_rollout_ref.actor.fsdp_config.dtype=float32
        +actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32
        +actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype=fp32
        +actor_rollout_ref.actor.fsdp_config.mixed_precision.buffer_dtype=fp32
        actor_rollout_ref.rollout.enforce_eager=True
        # vLLM asks for this fraction of the memory before it starts, whatever VLLM_CPU_KVCACHE_SPACE says.
        actor_rollout_ref.rollout.gpu_memory_utilization=0.1
        # vLLM does not support its sleep mode on the CPU.
        actor_rollout_ref.rollout.free_cache_engine=False
        +actor_rollout_ref.rollout.enable_sleep_mode=False
        actor_rollout_ref.rollout.max_model_len=$(( MAX_PROMPT + MAX_RESPONSE ))
        actor_rollout_ref.rollout.max_num_batched_tokens=4096
        actor_rollout_ref.rollout.max_num_seqs=64
        actor_rollout_ref.rollout.agent.num_workers=1
        actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=16
        reward.num_workers=1
    )
    # A Ray that runs already (multinode.sh) has its own.
    if [ -z "${RAY_ADDRESS:-}" ]; then
        OVERRIDES+=(
            +ray_kwargs.ray_init.num_gpus=$(( GPUS + TEACHER_GPUS + ROLLOUT_GPUS ))
            ray_kwargs.ray_init.num_cpus=32
            +ray_kwargs.ray_init.include_dashboard=False
            +ray_kwargs.ray_init.object_store_memory=500000000
        )
    fi
    if [ "$ROLLOUT_GPUS" != 0 ]; then
        OVERRIDES+=(
            actor_rollout_ref.rollout.checkpoint_engine.backend=host_file
            actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=verl_gndpo.platforms.host_checkpoint_engine
        )
    fi
    if [ "$TEACHER_BACKEND" = server ]; then
        OVERRIDES+=(
            +teacher.server.gpu_memory_utilization=0.1
            +teacher.server.free_cache_engine=False
            +teacher.server.enable_sleep_mode=False
            +teacher.server.tensor_model_parallel_size=1
            +teacher.server.max_model_len=$(( MAX_PROMPT + MAX_RESPONSE + 8 ))
            +teacher.server.max_num_batched_tokens=4096
            +teacher.server.max_num_seqs=64
        )
    fi
fi

# train OVERRIDE...: check the run, and start it.
train() {
    OVERRIDES+=("$@")
    "$PYTHON" -c 'import verl_gndpo' 2>/dev/null || {
        echo "verl-gndpo is not installed for $PYTHON: run 'pip install -e .' in this project, or set PYTHON" >&2
        exit 1
    }
    if [ "$CHECK" = True ]; then "$PYTHON" -m verl_gndpo.cli doctor "${OVERRIDES[@]}"; fi
    exec "$PYTHON" -m verl.trainer.main_ppo "${OVERRIDES[@]}"
}
