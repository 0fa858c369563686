# SPDX-License-Identifier: Apache-2.0
"""Check the settings of a run: this project's, verl's, and that they go together."""

import contextlib
import difflib
import importlib.util
import inspect
import io
import warnings
from pathlib import Path
from typing import Any

from verl_gndpo.config import (
    TRAINER_MODES,
    ConfigError,
    GNDPOConfig,
    TeacherConfig,
    WorstTokens,
)
from verl_gndpo.doctor.check import Check, describe_error, select
from verl_gndpo.doctor.inputs import Inputs
from verl_gndpo.export.folders import TRACKER
from verl_gndpo.hydra_groups import RECIPE_OVERRIDE, as_override
from verl_gndpo.observe.worst_tokens import why_not_writable
from verl_gndpo.platforms import HOST_BACKEND, without_accelerator
from verl_gndpo.presets import PRESETS, RECIPE
from verl_gndpo.verl_settings import ignored_settings, recipe_differences


def check_estimator(config: Any) -> list[Check]:
    """Check that verl has the estimator `algorithm.adv_estimator`, and say whether it is one of this project's."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    name = config.algorithm.adv_estimator
    name = getattr(name, "value", name)
    if name in PRESETS:
        return [Check("estimator", "ok", f"algorithm.adv_estimator={name}")]
    if name not in ADV_ESTIMATOR_REGISTRY:
        near = difflib.get_close_matches(name, ADV_ESTIMATOR_REGISTRY, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(sorted(ADV_ESTIMATOR_REGISTRY))}"
        return [Check("estimator", "error", f"algorithm.adv_estimator={name}: verl has no such estimator", hint)]
    detail = f"algorithm.adv_estimator={name}: GNDPO is not selected, so verl runs unchanged"
    remedy = f"algorithm.adv_estimator={next(iter(PRESETS))} selects it"
    if select(config, "teacher") is not None:
        return [Check("estimator", "warning", f"{detail}, and the section teacher has no effect", remedy)]
    return [Check("estimator", "ok", detail, remedy)]


def check_verl_settings(config: Any) -> list[Check]:
    """Run verl's own validation, which a training runs before anything else."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            validate_config(config, need_reference_policy(config), need_critic(config))
    # It builds verl's dataclasses, which raise errors of many types, AssertionError and Hydra's own among them.
    except Exception as error:
        return [Check("settings", "error", f"verl refuses this config: {describe_error(error)}")]
    return [Check("settings", "ok", "verl's own validation passes")]


def check_settings(inputs: Inputs) -> list[Check]:
    """Check `algorithm.gndpo` and `teacher`, and name settings of verl that do not go with them."""
    config, (signal, teacher, problems) = inputs.config, inputs.settings
    found = [Check("settings", "error", problem.detail, problem.remedy) for problem in problems]

    def error(detail: str, remedy: str) -> None:
        found.append(Check("settings", "error", detail, remedy))

    if teacher is not None:
        found += _check_servers(config, teacher) if teacher.backend == "server" else _check_ranks(config, teacher)
    if signal is not None:
        found += _check_worst_tokens(signal.worst_tokens)
        found += _check_ignored(config, signal)
        if signal.signal.baseline == "kl":
            found += _check_kl(config, teacher)
        if signal.rollout_seed is not None:
            found += _check_rollout_seed(config, signal.rollout_seed)
        if signal.task_reward.coef:
            found += _check_task_reward(signal.task_reward.estimator)
    if select(config, "gndpo") is not None:
        error("nothing reads the section gndpo at the top level", "move its keys to algorithm.gndpo")
    if not config.trainer.use_v1:
        error("trainer.use_v1=False: verl's old trainer does not use a teacher", "trainer.use_v1=True")
    if select(config, "async_training") is not None:
        detail = "the section async_training belongs to verl's fully_async_main, whose trainer does not ask a teacher"
        error(detail, "verl.trainer.main_ppo with trainer.v1.trainer_mode=separate_async")
    mode = config.trainer.v1.trainer_mode
    if mode not in TRAINER_MODES:
        error(f"trainer.v1.trainer_mode={mode} is not supported", f"one of {', '.join(TRAINER_MODES)}")
    elif mode == "separate_async":
        found += _check_separate_async(config)
    if select(config, "critic.enable"):
        error("critic.enable=True: this estimator does not use a critic", "critic.enable=False or null")
    found += _check_checkpoints(config.trainer)
    found += _check_frozen_tower(config.actor_rollout_ref.actor)
    found += _check_sampling(config.actor_rollout_ref.rollout)
    found += _check_engine(config.actor_rollout_ref.actor.strategy)
    return found or [Check("settings", "ok", "algorithm.gndpo and teacher go with the rest of the config")]


def check_recipe(inputs: Inputs) -> list[Check]:
    """List all differences from the published recipe, and the overrides that remove them."""
    signal = inputs.settings.signal
    if signal is None:
        return []
    differences = recipe_differences(inputs.config)
    if not differences:
        return [Check("recipe", "ok", f"as published, with the signal {signal.preset}")]

    found = [f"{key}={as_override(value)} ({as_override(published)})" for key, value, published in differences]
    # The recipe sets verl's settings only.
    own = [f"++{key}={as_override(published)}" for key, _, published in differences if key not in RECIPE]
    estimator = inputs.config.algorithm.adv_estimator
    if estimator != RECIPE["algorithm.adv_estimator"]:
        own.append(f"algorithm.adv_estimator={estimator}")
    remedy = f"{' '.join([RECIPE_OVERRIDE, *own])} at the end of the command"
    return [Check("recipe", "warning", f"not as published (in brackets): {', '.join(found)}", remedy)]


def _check_rollout_seed(config: Any, seed: int) -> list[Check]:
    """Check that responses with seeds of their own are the same in each run."""
    found = []
    name, mode = select(config, "actor_rollout_ref.rollout.name"), select(config, "trainer.v1.trainer_mode")
    setting = f"algorithm.gndpo.rollout_seed={seed}"
    if name not in ("vllm", None):
        remedy = "algorithm.gndpo.rollout_seed=null, or actor_rollout_ref.rollout.name=vllm"
        found.append(Check("settings", "error", f"{setting}: rollout.name={name} is not given seeds", remedy))
    if mode in ("colocate_async", "separate_async"):
        detail = (
            f"{setting} does not make a run with trainer_mode={mode} repeatable: which weights sample a response "
            "depends on time"
        )
        found.append(Check("settings", "warning", detail, "trainer.v1.trainer_mode=sync"))
    return found


def _check_ignored(config: Any, signal: GNDPOConfig) -> list[Check]:
    """Name the settings of verl that the run turns off, and a filter that it keeps and that may never end."""
    found = []
    for key, value, instead, why in ignored_settings(config, signal):
        found.append(Check("settings", "warning", f"{key}={value} is ignored: {why}", f"{key}={instead}"))
    if select(config, "algorithm.filter_groups.enable") and signal.task_reward.coef:
        detail = (
            "algorithm.filter_groups.enable=True replaces every group whose rewards are equal, without a limit: the "
            "run takes no step if they never differ"
        )
        found.append(Check("settings", "warning", detail, "algorithm.filter_groups.enable=False"))
    return found


def _check_sampling(rollout: Any) -> list[Check]:
    """Warn where responses are not sampled from the distribution whose log-probs are compared with the teacher's."""
    off = {"top_p": 1.0} if rollout.top_p < 1 else {}
    off |= {"top_k": -1} if rollout.top_k > 0 else {}
    return [
        Check(
            "settings",
            "warning",
            f"actor_rollout_ref.rollout.{key}={rollout[key]} never samples the student's less likely tokens, but their "
            "probability counts in the log-ratio to the teacher, whose mean is then not the reverse KL divergence",
            f"actor_rollout_ref.rollout.{key}={value}",
        )
        for key, value in off.items()
    ]


def _check_engine(strategy: str) -> list[Check]:
    """Warn if verl's engine for the actor can't be imported here. verl goes on until the actor's workers start."""
    name = f"verl.workers.engine.{strategy}"
    if importlib.util.find_spec(name) is None:
        return []
    try:
        importlib.import_module(name)
    except ImportError as reason:
        detail = f"actor_rollout_ref.actor.strategy={strategy}: {name} can't be imported here: {reason}"
        return [Check("settings", "warning", detail, "install what it needs where the actor's workers run")]
    return []


def _check_separate_async(config: Any) -> list[Check]:
    """Check what verl's trainer `separate_async` asserts when it is created (trainer_separate_async.py)."""
    rollout, reward_model = config.actor_rollout_ref.rollout, config.reward.reward_model
    steps, batch = config.trainer.v1.separate_async.parameter_sync_step, config.data.train_batch_size
    mini = config.actor_rollout_ref.actor.ppo_mini_batch_size
    found = []
    if batch != steps * mini:
        whole, rest = divmod(batch, max(mini, 1))
        found.append(
            (
                f"data.train_batch_size={batch} is not trainer.v1.separate_async.parameter_sync_step={steps} times "
                f"actor_rollout_ref.actor.ppo_mini_batch_size={mini}",
                f"data.train_batch_size={steps * mini}"
                if rest or not whole
                else f"trainer.v1.separate_async.parameter_sync_step={whole}",
            )
        )
    for key in ("nnodes", "n_gpus_per_node"):
        if not rollout[key] > 0:
            detail = f"actor_rollout_ref.rollout.{key}={rollout[key]}: the rollout needs GPUs of its own"
            found.append((detail, f"actor_rollout_ref.rollout.{key}=1, or more"))
    if rollout.checkpoint_engine.backend == "naive":
        engine = "actor_rollout_ref.rollout.checkpoint_engine"
        remedy = f"{engine}.backend=nccl"
        if without_accelerator():
            module = "verl_gndpo.platforms.host_checkpoint_engine"
            remedy = f"{engine}.backend={HOST_BACKEND} {engine}.custom_backend_module={module}"
        found.append((f"{engine}.backend=naive can't send weights to other processes", remedy))
    if reward_model.enable and not reward_model.enable_resource_pool:
        found.append(
            (
                "reward.reward_model.enable_resource_pool=False: the rollout never leaves its GPUs to a reward model",
                "reward.reward_model.enable_resource_pool=True, with nnodes and n_gpus_per_node of its own",
            )
        )
    return [Check("settings", "error", f"trainer.v1.trainer_mode=separate_async: {d}", r) for d, r in found]


def _check_servers(config: Any, teacher: TeacherConfig) -> list[Check]:
    """Check that verl accepts the teacher's servers."""
    from verl_gndpo.teacher.server import distillation_section

    try:
        distillation_section(config, teacher)
    except ConfigError as problem:
        return [Check("settings", "error", str(problem))]
    return []


def _check_ranks(config: Any, teacher: TeacherConfig) -> list[Check]:
    """Check that the ranks of a teacher worker form whole groups, and that each gets a row of every batch."""
    place = teacher if teacher.placement == "dedicated" else config.trainer
    gpus = (place.n_gpus_per_node or 0) * place.nnodes
    size = teacher.ulysses_sequence_parallel_size
    ranks, rest = divmod(gpus, size)
    if rest:
        detail = f"teacher.ulysses_sequence_parallel_size={size} does not divide the teacher's {gpus} GPUs"
        return [Check("settings", "error", detail, f"a divisor of {gpus}")]
    shards = teacher.fsdp.fsdp_size
    if shards != -1 and shards < gpus and gpus % shards:
        detail = f"teacher.fsdp.fsdp_size={shards} does not divide the teacher's {gpus} GPUs"
        return [Check("settings", "error", detail, f"a divisor of {gpus}, or -1 for all")]
    flash = [
        f"models.{name}" if select(config, "teacher.models") else "model"
        for name, model in teacher.teachers.items()
        if model.override_config.get("attn_implementation") in (None, "flash_attention_2")
    ]
    if teacher.dtype == "float32" and not without_accelerator() and flash:
        detail = (
            "teacher.dtype=float32, but flash_attention_2, verl's default for a vision tower, does not support float32"
        )
        remedy = " ".join(f"++teacher.{section}.override_config.attn_implementation=sdpa" for section in flash)
        return [Check("settings", "error", detail, remedy)]
    rows = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    mode = config.trainer.v1.trainer_mode
    rows //= select(config, f"trainer.v1.{mode}.parameter_sync_step", 1)
    if rows < ranks:
        detail = (
            f"the teacher has {ranks} ranks, but a batch has {rows} rows (data.train_batch_size times "
            "actor_rollout_ref.rollout.n): the others repeat rows"
        )
        return [Check("settings", "warning", detail, "fewer GPUs for the teacher, or a larger batch, cost less")]
    return []


def _check_checkpoints(trainer: Any) -> list[Check]:
    """Check that checkpoints can be written, before the first of them ends a run."""
    folder = trainer.default_local_dir
    problem = why_not_writable(Path(folder).expanduser() / TRACKER) if trainer.save_freq > 0 else None
    if problem is None:
        return []
    remedy = "a folder that can be written to, or trainer.save_freq=-1"
    return [Check("settings", "error", f"trainer.default_local_dir={folder}: {problem}", remedy)]


def _check_worst_tokens(worst: WorstTokens) -> list[Check]:
    """Check that the file of the worst tokens can be written."""
    problem = why_not_writable(Path(worst.path).expanduser()) if worst.path and worst.every else None
    if problem is None:
        return []
    remedy = "a file in a folder that can be written to, or null for the default"
    return [Check("settings", "error", f"algorithm.gndpo.worst_tokens.path={worst.path}: {problem}", remedy)]


def _check_kl(config: Any, teacher: TeacherConfig | None) -> list[Check]:
    """Check that the workers of both models can return what baseline=kl compares at every position."""
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    found = []
    if teacher is not None and teacher.backend == "server":
        found.append(("teacher.backend=server returns log-probs of the server's own choice", "teacher.backend=worker"))
    if actor.strategy not in ("fsdp", "fsdp2"):
        detail = f"actor_rollout_ref.actor.strategy={actor.strategy} does not return the student's most likely tokens"
        found.append((detail, "actor_rollout_ref.actor.strategy=fsdp2"))
    else:
        for key in ("ulysses_sequence_parallel_size", "fsdp_config.ulysses_sequence_parallel_size"):
            if select(actor, key, 1) > 1:
                detail = f"actor_rollout_ref.actor.{key}={select(actor, key)} spreads a row's logits over several ranks"
                found.append((detail, f"actor_rollout_ref.actor.{key}=1"))
    if model.get("use_fused_kernels"):
        detail = "actor_rollout_ref.model.use_fused_kernels=True never computes the student's logits"
        found.append((detail, "actor_rollout_ref.model.use_fused_kernels=False"))
    if select(config, "algorithm.rollout_correction.bypass_mode"):
        detail = "algorithm.rollout_correction.bypass_mode=True skips the student's pass over the batch"
        found.append((detail, "algorithm.rollout_correction.bypass_mode=False"))
    return [
        Check("settings", "error", f"algorithm.gndpo.baseline=kl: {detail}", f"{remedy}, or another baseline")
        for detail, remedy in found
    ]


def _check_task_reward(name: str) -> list[Check]:
    """Check that the estimator of the task reward is one of verl's, and needs nothing that the step does not have."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    given = {"token_level_rewards", "response_mask", "index", "config"}
    usable = []
    for known, estimator in ADV_ESTIMATOR_REGISTRY.items():
        parameters = inspect.signature(estimator).parameters.values()
        needs = {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
        if known not in PRESETS and needs <= given:
            usable.append(known)
    if name in usable:
        return []
    reason = "verl has no such estimator"
    if name in PRESETS:
        reason = "it computes advantages from a teacher, not from rewards"
    elif name in ADV_ESTIMATOR_REGISTRY:
        reason = "it needs more than the rewards and the prompt of each row"
    detail = f"algorithm.gndpo.task_reward.estimator={name}: {reason}"
    return [Check("settings", "error", detail, f"one of {', '.join(sorted(usable))}")]


def _check_frozen_tower(actor: Any) -> list[Check]:
    """Check that the actor's strategy can freeze the vision tower."""
    if not actor.get("freeze_vision_tower"):
        return []
    if actor.strategy not in ("fsdp", "fsdp2"):
        detail = f"actor_rollout_ref.actor.freeze_vision_tower=True has no effect with strategy={actor.strategy}"
        return [Check("settings", "error", detail, "actor_rollout_ref.actor.strategy=fsdp2")]
    if actor.strategy == "fsdp" and not select(actor, "fsdp_config.use_orig_params"):
        detail = (
            "actor_rollout_ref.actor.freeze_vision_tower=True: strategy=fsdp flattens frozen and trained weights "
            "together unless fsdp_config.use_orig_params=True"
        )
        remedy = "actor_rollout_ref.actor.strategy=fsdp2, or actor_rollout_ref.actor.fsdp_config.use_orig_params=True"
        return [Check("settings", "error", detail, remedy)]
    return []
