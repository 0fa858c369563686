# SPDX-License-Identifier: Apache-2.0
"""Declare and read the config sections that this project adds to verl's: `algorithm.gndpo`, `teacher` and `student`.

A `...Section` is what a config gives: each key is declared once, by a `Setting` with its default, range and meaning.
Hydra's groups (`default_groups`), the checks and docs/settings.md follow from these declarations. A `...Config` is what
the code reads: resolved against preset and student, complete and valid. An unknown key or a wrong type is an error that
names the key, its section and the nearest known key.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_gndpo.advantage import BASELINES, BOUNDS, SCALES, Signal
from verl_gndpo.platforms import without_accelerator
from verl_gndpo.presets import PRESETS, RECIPE
from verl_gndpo.setting import Setting, of, setting

EVERY_SAMPLE = "*"
"""The key of a teacher that scores every sample."""

TRAINER_MODES = ("sync", "colocate_async", "separate_async")
"""Values of `trainer.v1.trainer_mode`: the trainers of verl that this project extends."""


class ConfigError(ValueError):
    """A setting of ours is missing, unknown or out of range; the message says which and what to do.

    Attributes:
        detail: the message without the remedy.
        remedy: overrides that remedy it, where they can be named; otherwise "".
    """

    def __init__(self, detail: str, remedy: str = "") -> None:
        super().__init__(f"{detail} -> {remedy}" if remedy else detail)
        self.detail, self.remedy = detail, remedy


@dataclass
class TaskReward:
    """`algorithm.gndpo.task_reward`: the task's own reward, mixed into the advantages."""

    coef: float = setting(
        0.0,
        "Root mean square of the task's part over that of the teacher's, in each batch. 0: the reward is only logged.",
        at_least=0,
        below=math.inf,
    )
    estimator: str = setting("grpo", "The estimator of verl that turns rewards into advantages.")


@dataclass
class WorstTokens:
    """`algorithm.gndpo.worst_tokens`: the tokens with the largest abs(log-ratio) of a step, with their context."""

    every: int = setting(
        10,
        "Write the tokens of every so many steps. 0: of none. A step that raises a warning is written, too, unless one "
        "within the last `every` steps was.",
        at_least=0,
    )
    count: int = setting(10, "Tokens per step.", at_least=1)
    path: str | None = setting(
        None,
        "File of JSON lines.",
        null="gndpo_worst_tokens.jsonl beside the file of verl's file logger (VERL_FILE_LOGGER_PATH), else in "
        "`trainer.default_local_dir`",
    )


@dataclass
class Warn:
    """`algorithm.gndpo.warn`: limits of a step's metrics that raise a warning (observe/limits.py)."""

    gain: float | None = setting(20.0, "Warn when `gndpo/gain` is above this.", above=0, null="never")
    sign_flip_share: float | None = setting(
        0.3, "Warn when `gndpo/sign_flip_share` is above this.", above=0, at_most=1, null="never"
    )
    truncated_share_rise: float | None = setting(
        0.1,
        "Warn when `gndpo/response/truncated_share` exceeds that of the run's first steps by more than this.",
        above=0,
        at_most=1,
        null="never",
    )
    correlation: float | None = setting(
        0.99, "Warn when `training/rollout_actor_probs_pearson_corr` is below this.", above=0, at_most=1, null="never"
    )
    data_source_gradient_share: float | None = setting(
        0.8,
        "Warn when one of several data sources has more than this share of the gradient.",
        above=0,
        at_most=1,
        null="never",
    )


STAGES = ("bound", "baseline", "scale")
TOP_K = Setting(
    64,
    "With baseline=kl: number of the student's most likely tokens that the KL divergence compares one by one. It takes "
    "all others as one token, which makes it a lower bound.",
    at_least=1,
)
BOUND = Setting(None, "How far a single log-ratio may go.", null="as the preset has it")
EMA_DECAY = Setting(0.9, "With scale=ema: weight of the steps before.", at_least=0, below=1)


@dataclass
class GNDPOSection:
    """`algorithm.gndpo` as a config gives it; `gndpo_section` adds the parameters of all bounds.

    What is given here wins over the preset, setting by setting. null leaves a setting to the preset, and what the
    preset does not name has the default of its `Setting`.
    """

    preset: str | None = setting(
        None, "Published signal to start from (presets.py).", null="the one that `algorithm.adv_estimator` names"
    )
    bound: str | None = BOUND.as_field()
    baseline: str | None = setting(
        None,
        "Subtract nothing, or the mean over the batch, the group of a prompt, the position in the response, or the "
        "teacher; or kl, the value of the state in closed form.",
        choices=BASELINES,
        null="as the preset has it",
    )
    scale: str | None = setting(
        None,
        "Divide by nothing, or by the deviation over the batch, the group or the teacher, or by its average over steps "
        "(ema); or rank, which keeps only the order.",
        choices=SCALES,
        null="as the preset has it",
    )
    top_k: int | None = TOP_K.as_optional_field()
    ema_decay: float | None = EMA_DECAY.as_optional_field()
    std_floor: float = setting(
        1e-4,
        "Floor of the standard deviation in the bound's unit, added in quadrature: sqrt(var + std_floor^2). 1e-4 is "
        "the published 1e-8 under the root. It is what is left to divide by where all log-ratios are equal.",
        above=0,
    )
    gain_limit: float | None = setting(
        None, "Largest factor that the scale may be.", above=0, null="only `std_floor` limits it"
    )
    max_lost_share: float = setting(
        0.5,
        "End the run before it trains on a step that has lost more than this share of its responses, because the "
        "rollout engine, a server, a reward or an image failed. 0: before any loss. 1: train on whatever is left.",
        at_least=0,
        at_most=1,
    )
    rollout_timeout_s: float | None = setting(
        None,
        "End the run when no response was finished for so many seconds, because the rollout engine or the reward "
        "function hangs.",
        above=0,
        below=math.inf,
        null="an hour until the first response, then ten times the longest time without one, and at least 30 minutes",
    )
    rollout_seed: int | None = setting(
        None,
        "Sample each response with a seed of its own, made of this one, the step, the row's `extra_info.index` and the "
        "response's number. Two runs then sample the same responses, and a resumed run those of an uninterrupted one. "
        "vLLM only.",
        at_least=0,
        null="responses differ from run to run",
    )
    task_reward: TaskReward = field(default_factory=TaskReward)
    worst_tokens: WorstTokens = field(default_factory=WorstTokens)
    warn: Warn = field(default_factory=Warn)


def gndpo_section() -> type[GNDPOSection]:
    """Return the type of `algorithm.gndpo`, with the bounds that are registered now and a key for each parameter."""
    parameters = {key: declared for bound in BOUNDS.values() for key, declared in bound.parameters.items()}
    known = replace(BOUND, choices=tuple(BOUNDS))
    fields_of_bounds = [(key, float | None, declared.as_optional_field()) for key, declared in parameters.items()]
    return make_dataclass(
        "GNDPOSection", [("bound", str | None, known.as_field()), *fields_of_bounds], bases=(GNDPOSection,)
    )


@dataclass(frozen=True)
class GNDPOConfig:
    """`algorithm.gndpo`, resolved: every value is there and valid."""

    preset: str
    signal: Signal
    max_lost_share: float
    rollout_timeout_s: float | None
    rollout_seed: int | None
    task_reward: TaskReward
    worst_tokens: WorstTokens
    warn: Warn


def _resolve_signal(section: GNDPOSection, name: str, preset: Mapping[str, Any]) -> GNDPOConfig:
    """Fill in a section from a preset and from the settings' defaults, and check all ranges."""

    def value(key: str, default: Any = None) -> Any:
        given = getattr(section, key)
        return preset.get(key, default) if given is None else given

    bound = value("bound")
    signal = Signal(
        bound=bound,
        parameters={key: value(key, declared.default) for key, declared in BOUNDS[bound].parameters.items()},
        baseline=value("baseline"),
        scale=value("scale"),
        top_k=value("top_k", TOP_K.default),
        std_floor=section.std_floor,
        gain_limit=math.inf if section.gain_limit is None else section.gain_limit,
        ema_decay=value("ema_decay", EMA_DECAY.default),
    )
    return GNDPOConfig(
        name,
        signal,
        section.max_lost_share,
        section.rollout_timeout_s,
        section.rollout_seed,
        section.task_reward,
        section.worst_tokens,
        section.warn,
    )


def check_preset(name: str, preset: Mapping[str, Any]) -> None:
    """Refuse a preset that does not resolve.

    Args:
        name: of the preset.
        preset: bound, baseline, scale and parameters, as in presets.py.

    Raises:
        ConfigError: unknown key or stage, or value out of range; or a parameter that the bound does not have.
    """
    resolved = _resolve_signal(_read(f"preset {name}", gndpo_section(), dict(preset)), name, preset)
    foreign = set(preset) - {*STAGES, "top_k", "ema_decay", *resolved.signal.parameters}
    if foreign:
        raise ConfigError(f"preset {name}: bound {resolved.signal.bound} has no parameter {', '.join(sorted(foreign))}")


@dataclass
class TeacherModelSection:
    """`teacher.model`: the teacher's weights. The keys mean the same as in `actor_rollout_ref.model`."""

    path: str | None = setting(None, "Folder or hub id of the teacher. Required.")
    trust_remote_code: bool = setting(False, "Run code that comes with the checkpoint.")
    external_lib: str | None = setting(None, "Module to import in the worker before the model is built.", null="none")
    override_config: dict[str, Any] = setting(
        {},
        "Overrides of the Hugging Face config. `attn_implementation` defaults to the student's and sets the attention "
        "of the vision tower; `teacher.attention` sets that of the language model.",
    )


@dataclass
class NamedTeacherSection(TeacherModelSection):
    """`teacher.models.<name>`: one of several teachers."""

    keys: list[str] | None = setting(
        None,
        'Values of `teacher.routing_key` whose samples this teacher scores; "*" stands for every sample.',
        null="the teacher's own name",
    )
    weight: float = setting(
        1.0,
        "Share of this teacher where several teachers score one sample. Their log-probs are averaged with these "
        "weights, which minimises the weighted sum of the reverse KL divergences.",
        above=0,
        below=math.inf,
    )


@dataclass
class TeacherFSDPSection:
    """`teacher.fsdp`: how the teacher is sharded."""

    strategy: str = setting("fsdp2", "Version of FSDP.", choices=("fsdp2", "fsdp"))
    fsdp_size: int = setting(-1, "Number of ranks that share one copy of the weights. -1: all.", at_least=1, also=(-1,))
    param_offload: bool | None = setting(
        None,
        "Keep the weights on the host between calls. Without an accelerator there is nothing to offload from.",
        null="true where the teacher shares the actor's GPUs",
    )
    reshard_after_forward: bool = setting(True, "Free the gathered weights of a layer after its forward pass.")
    wrap_policy: dict[str, Any] = setting({}, "Which modules FSDP wraps, as in verl's `fsdp_config.wrap_policy`.")


@dataclass
class TeacherSection:
    """`teacher`: what scores the student's tokens, and where; as a config gives it."""

    backend: str = setting(
        "worker",
        "worker: FSDP workers of this project, forward only. server: verl's own teacher replicas (vLLM or SGLang).",
        choices=("worker", "server"),
    )
    placement: str | None = setting(
        None,
        "colocated: on the actor's GPUs, between generation and update. dedicated: on GPUs of its own, where it scores "
        "finished responses while others are still generated. Servers support dedicated only.",
        choices=("colocated", "dedicated"),
        null="colocated for workers, dedicated for servers",
    )
    n_gpus_per_node: int | None = setting(
        None, "GPUs of a dedicated teacher on each node. Required for a dedicated teacher.", at_least=1
    )
    nnodes: int = setting(1, "Nodes of a dedicated teacher.", at_least=1)
    from_distillation: bool = setting(
        False,
        "Take the teachers from verl's section `distillation`, instead of `model` or `models`, and turn verl's own "
        "distillation loss off. Paths and routing come from there, and the GPUs and servers of a dedicated teacher.",
    )
    model: TeacherModelSection = field(default_factory=TeacherModelSection)
    models: dict[str, NamedTeacherSection] = setting({}, "Several teachers by name, instead of `model`.")
    routing_key: str = setting(
        "data_source", "Column of the data that decides which of several teachers scores a sample."
    )
    temperature: float | None = setting(
        None,
        "Divides the teacher's logits. 1.0 reproduces the released code.",
        above=0,
        null="the rollout's temperature, which the student's log-probs use",
    )
    dtype: str | None = setting(
        None,
        "Precision of the teacher's weights.",
        choices=("float32", "bfloat16", "float16"),
        null="bfloat16 with an accelerator, float32 without",
    )
    max_token_len_per_gpu: int | None = setting(
        None, "Tokens per micro-batch.", at_least=1, null="`actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu`"
    )
    logits_chunk_tokens: int = setting(
        256,
        "Number of response tokens whose logits exist at once: the peak is at most this times the vocabulary, in "
        "float32.",
        at_least=1,
    )
    ulysses_sequence_parallel_size: int = setting(
        1,
        "Number of ranks that share one row of tokens. It divides the number of ranks and of attention heads.",
        at_least=1,
    )
    attention: str = setting(
        "sdpa",
        "sdpa: torch's own kernels, prompt by prompt. flex: FlexAttention, one kernel over all prompts of a "
        "micro-batch without padding, compiled on an accelerator.",
        choices=("sdpa", "flex"),
    )
    sharing: str = setting(
        "auto",
        "How the responses to a prompt share it. attention: in one row, through the attention. cache: they continue "
        "from the model's own cache, which also holds the states of linear attention. none: each runs its prompt. "
        "auto: the fastest of them that is exact for the model, which a small model of its architecture shows.",
        choices=("auto", "attention", "cache", "none"),
    )
    self_check: bool = setting(True, "Compare the first scores of a run with a plain forward pass.")
    nccl_timeout: int | None = setting(
        None,
        "Seconds that ranks wait for each other, also while the first one reads the weights. More for a large model on "
        "slow storage.",
        at_least=1,
        null="`actor_rollout_ref.nccl_timeout`",
    )
    timeout_s: float | None = setting(
        None,
        "Seconds that the workers may take to score a batch, or a server to answer any request. Then they count as "
        "lost.",
        above=0,
        below=math.inf,
        null="30 minutes for the first one, then ten times what the slowest one has taken, and at least 10 minutes",
    )
    max_restarts: int = setting(
        3,
        "How often in a run lost workers or servers are replaced. New ones load the weights and score the same rows "
        "again.",
        at_least=0,
    )
    fsdp: TeacherFSDPSection = field(default_factory=TeacherFSDPSection)
    server: dict[str, Any] = setting(
        {},
        "With backend=server: settings of the replicas, by the keys of verl's "
        "`distillation.teacher_models.*.inference` (name, tensor_model_parallel_size, gpu_memory_utilization, "
        "max_num_batched_tokens, ...).",
    )


# Keys of `teacher` that only `backend=worker` reads.
WORKER_SETTINGS = (
    *("dtype", "max_token_len_per_gpu", "logits_chunk_tokens", "ulysses_sequence_parallel_size"),
    *("attention", "sharing", "self_check", "nccl_timeout", "fsdp"),
)


@dataclass
class StudentSection:
    """`student`: how the actor's passes over a batch are laid out. It has no part in what they compute."""

    share_prompts: bool = setting(
        False,
        "Run each prompt and each image once for all of its responses, in `old_log_prob` and in the update, and make "
        "logits for response tokens only. It works with every estimator, and with the engines fsdp and fsdp2.",
    )
    logits_chunk_tokens: int = setting(
        256,
        "Number of response tokens whose logits exist at once, in the backward pass, too: the peak is at most this "
        "times the vocabulary, in float32.",
        at_least=1,
    )
    attention: str = setting(
        "sdpa",
        "sdpa: torch's own kernels, prompt by prompt. flex: FlexAttention, one kernel over all prompts of a "
        "micro-batch without padding, compiled on an accelerator.",
        choices=("sdpa", "flex"),
    )


@dataclass(frozen=True)
class Teacher:
    """One teacher, resolved.

    Attributes:
        keys: values of the routing column whose samples it scores; EVERY_SAMPLE stands for all.
        weight: its share where several teachers score one sample.
    """

    path: str
    trust_remote_code: bool
    external_lib: str | None
    override_config: dict[str, Any]
    keys: tuple[str, ...]
    weight: float


@dataclass(frozen=True)
class TeacherFSDP:
    """`teacher.fsdp`, resolved."""

    strategy: str
    fsdp_size: int
    param_offload: bool
    reshard_after_forward: bool
    wrap_policy: dict[str, Any]


@dataclass(frozen=True)
class TeacherConfig:
    """`teacher`, resolved: what follows the student is filled in, and every value is valid.

    Attributes:
        from_distillation: the teachers, and the servers of backend=server, are those of verl's section `distillation`.
        n_gpus_per_node: 0 for a colocated teacher, which has no GPUs of its own.
        teachers: by name. A single one is called "teacher" and scores every sample.
    """

    backend: str
    from_distillation: bool
    placement: str
    n_gpus_per_node: int
    nnodes: int
    teachers: dict[str, Teacher]
    routing_key: str
    temperature: float
    dtype: str
    max_token_len_per_gpu: int
    logits_chunk_tokens: int
    ulysses_sequence_parallel_size: int
    attention: str
    sharing: str
    self_check: bool
    nccl_timeout: int
    timeout_s: float | None
    max_restarts: int
    fsdp: TeacherFSDP
    server: dict[str, Any]

    @property
    def column_setting(self) -> str:
        """Return the setting that names the column by which samples are routed, for messages."""
        return "distillation.teacher_key" if self.from_distillation else "teacher.routing_key"

    @property
    def keys_setting(self) -> str:
        """Return the setting that gives a teacher its samples, for messages."""
        return "distillation.teacher_models.<name>.key" if self.from_distillation else "teacher.models.<name>.keys"


def _named(section: TeacherSection) -> dict[str, NamedTeacherSection]:
    """Return all teachers of a section by name, with their keys."""
    if not section.models:
        return {"teacher": NamedTeacherSection(**vars(section.model), keys=[EVERY_SAMPLE])}
    return {
        name: replace(model, keys=[name] if model.keys is None else model.keys)
        for name, model in section.models.items()
    }


def _distillation_models(distillation: Any) -> dict[str, Any]:
    """Return the teachers of verl's section `distillation` by name.

    verl drops the entry `teacher_model` if there are others (DistillationConfig).
    """
    models = dict(_get(distillation, "teacher_models") or {})
    return {name: model for name, model in models.items() if name != "teacher_model"} or models


def _with_distillation(section: TeacherSection, distillation: Any) -> TeacherSection:
    """Return a section with the teachers, the routing and, unless it gives them, the GPUs of verl's `distillation`."""
    plain = TeacherSection()
    for key in ("model", "models", "routing_key", "server"):
        if getattr(section, key) != getattr(plain, key):
            raise ConfigError(
                f"teacher.{key} and teacher.from_distillation=True are both given: the section distillation has the "
                "teachers, their routing and their servers"
            )
    models = _distillation_models(distillation)
    if not models:
        raise ConfigError("teacher.from_distillation=True: there is no distillation.teacher_models")
    for name, model in models.items():
        for key in ("model_path", "key") if len(models) > 1 else ("model_path",):
            if not _get(model, key):
                raise ConfigError(f"teacher.from_distillation=True: distillation.teacher_models.{name}.{key} is null")
    section = replace(section, **_gpus_of_distillation(section, distillation))
    if len(models) == 1:
        # verl sends it every sample, whatever its key.
        (model,) = models.values()
        return replace(section, model=TeacherModelSection(path=_get(model, "model_path")))
    keys = [str(_get(model, "key")) for model in models.values()]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ConfigError(f"several distillation.teacher_models have the key {twice[0]}")
    named = {
        name: NamedTeacherSection(path=_get(model, "model_path"), keys=[key])
        for (name, model), key in zip(models.items(), keys, strict=True)
    }
    return replace(section, models=named, routing_key=_get(distillation, "teacher_key"))


def _gpus_of_distillation(section: TeacherSection, distillation: Any) -> dict[str, Any]:
    """Return the GPUs of a dedicated teacher as verl's `distillation` has them; nothing if the section gives them."""
    on_server = section.backend == "server"
    if section.n_gpus_per_node is not None or section.nnodes != TeacherSection().nnodes:
        if on_server:
            raise ConfigError(
                "teacher.n_gpus_per_node and teacher.nnodes have no effect with teacher.from_distillation=True and "
                "teacher.backend=server: distillation.n_gpus_per_node and distillation.nnodes"
            )
        return {}
    if not on_server and section.placement != "dedicated":
        return {}
    gpus = {key: int(_get(distillation, key) or 0) for key in ("n_gpus_per_node", "nnodes")}
    for key, number in gpus.items():
        if number < 1:
            raise ConfigError(f"distillation.{key}={number}: a dedicated teacher needs GPUs of its own")
    return gpus


def teacher_paths(config: Any) -> dict[str, Any]:
    """Return the section of each teacher that a config names, with its `path`, by the full key of the path.

    Args:
        config: verl's whole config. The section `teacher` may be invalid.
    """
    section = _get(config, "teacher")
    if _get(section, "from_distillation"):
        return {
            f"distillation.teacher_models.{name}.model_path": OmegaConf.create({"path": _get(model, "model_path")})
            for name, model in _distillation_models(_get(config, "distillation")).items()
        }
    models = {"teacher.model.path": _get(section, "model")}
    models |= {f"teacher.models.{name}.path": model for name, model in (_get(section, "models") or {}).items()}
    return {key: model for key, model in models.items() if _get(model, "path")}


def _check_teacher(section: TeacherSection) -> None:
    """Refuse settings of a teacher that do not go together."""
    if not section.model.path and not section.models:
        raise ConfigError(
            "no teacher is configured: give teacher.model.path (a folder or hub id), "
            "for example +teacher.model.path=Qwen/Qwen2.5-VL-7B-Instruct"
        )
    _check_models(section)
    _check_placement(section)


def _check_models(section: TeacherSection) -> None:
    if section.models and section.model != TeacherModelSection():
        raise ConfigError(
            "both teacher.model and teacher.models are given: use teacher.model for one teacher, teacher.models for "
            "several"
        )
    if not section.models and section.routing_key != TeacherSection().routing_key:
        raise ConfigError("teacher.routing_key has no effect with a single teacher; teacher.models holds several")
    for name, model in section.models.items():
        if not model.path:
            raise ConfigError(f"teacher.models.{name}.path is not given: a folder or hub id")
        if model.keys is not None and not model.keys:
            raise ConfigError(f"teacher.models.{name}.keys is empty, so that this teacher would score nothing")


def _check_placement(section: TeacherSection) -> None:
    on_server = section.backend == "server"
    if on_server and section.placement == "colocated":
        raise ConfigError("teacher.backend=server needs GPUs of its own: teacher.placement=dedicated")
    if section.server and not on_server:
        raise ConfigError("teacher.server has no effect with teacher.backend=worker")
    if not (on_server or section.placement == "dedicated"):
        for key in ("n_gpus_per_node", "nnodes"):
            if getattr(section, key) != getattr(TeacherSection(), key):
                raise ConfigError(f"teacher.{key} has no effect without teacher.placement=dedicated")
        return
    if section.n_gpus_per_node is None:
        raise ConfigError("a dedicated teacher needs teacher.n_gpus_per_node (and teacher.nnodes, default 1)")
    if on_server:
        _check_server(section)


def _check_server(section: TeacherSection) -> None:
    defaults, plain = TeacherSection(), NamedTeacherSection()
    unused = [key for key in WORKER_SETTINGS if getattr(section, key) != getattr(defaults, key)]
    teachers = _named(section)
    for name, model in teachers.items():
        where = f"models.{name}" if section.models else "model"
        read = ("path", "keys")
        unused += [f"{where}.{f.name}" for f in fields(plain) if f.name not in read and _differs(model, plain, f.name)]
    if unused:
        raise ConfigError(
            f"teacher.{unused[0]} has no effect with teacher.backend=server, whose settings are in teacher.server"
        )
    if not section.models:
        return
    claimed: dict[str, str] = {}
    for name, model in teachers.items():
        keys = model.keys or []
        if len(keys) != 1 or EVERY_SAMPLE in keys:
            raise ConfigError(
                f"teacher.models.{name}.keys: with teacher.backend=server each teacher has one key, got "
                f"{', '.join(keys)}; teacher.backend=worker has no such limit"
            )
        other = claimed.setdefault(keys[0], name)
        if other != name:
            raise ConfigError(
                f"teacher.models.{other} and .{name} have the same key {keys[0]}: only teacher.backend=worker lets "
                "several teachers score one sample"
            )


def _differs(one: Any, other: Any, key: str) -> bool:
    return getattr(one, key) != getattr(other, key)


def default_groups() -> dict[tuple[str, str], dict[str, Any]]:
    """Return Hydra's config groups of this project by (group, name).

    `+gndpo=default` belongs into `algorithm.gndpo`, `+teacher=worker` and `+teacher=server` into `teacher`, and
    `+student=default` into `student`. They hold all settings with their defaults. `+recipe=gndpo` belongs into the
    whole config, and holds settings of verl.
    """
    teacher = _defaults(TeacherSection)
    recipe = OmegaConf.create()
    for key, value in RECIPE.items():
        OmegaConf.update(recipe, key, value)
    return {
        ("recipe", "gndpo"): as_dict(recipe, resolve=False),
        ("gndpo", "default"): _defaults(gndpo_section()),
        ("teacher", "worker"): teacher,
        ("teacher", "server"): teacher | {"backend": "server", "placement": "dedicated"},
        ("student", "default"): _defaults(StudentSection),
    }


def _defaults(schema: type) -> dict[str, Any]:
    return as_dict(OmegaConf.structured(schema))


def as_dict(section: Any, *, resolve: bool = True) -> dict[str, Any]:
    """Return a section of an OmegaConf config as dicts and lists.

    Args:
        resolve: put values in the place of interpolations.

    Raises:
        TypeError: it is not a section but a list or a value.
    """
    container = OmegaConf.to_container(section, resolve=resolve)
    if not isinstance(container, dict):
        raise TypeError(f"a section of settings is expected, got {section!r}")
    return {str(key): value for key, value in container.items()}


def declared_settings(section: str, schema: type) -> dict[str, Setting]:
    """Return the settings of a section and of those within it, by their full keys."""
    found: dict[str, Setting] = {}
    for declared in fields(schema):
        key, own = f"{section}.{declared.name}", of(declared)
        if own is not None:
            found[key] = own
        if is_dataclass(declared.default_factory):
            found |= declared_settings(key, declared.default_factory)
        if schema is TeacherSection and declared.name == "models":
            found |= declared_settings(f"{key}.<name>", NamedTeacherSection)
    return found


def _check_keys(section: str, schema: type, given: dict[str, Any]) -> None:
    known = {f.name: f for f in fields(schema)}
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {section}.{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"unknown key {section}.{key}; {hint}")
        factory = known[key].default_factory
        if is_dataclass(factory) and isinstance(value, dict):
            _check_keys(f"{section}.{key}", factory, value)
        elif schema is TeacherSection and key == "models" and isinstance(value, dict):
            for name, model in value.items():
                if isinstance(model, dict):
                    _check_keys(f"{section}.{key}.{name}", NamedTeacherSection, model)


def _read(section: str, schema: type, given: Any) -> Any:
    """Merge a config section over the defaults of `schema` and check keys, types and ranges."""
    if given is None:
        given = {}
    if is_dataclass(given) and not isinstance(given, type):
        given = OmegaConf.structured(given)
    if OmegaConf.is_config(given):
        given = OmegaConf.to_container(given, resolve=True)
    if not isinstance(given, dict):
        raise ConfigError(f"{section} must be a section of settings, got {given!r}")
    _check_keys(section, schema, given)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    except OmegaConfBaseException as error:
        key = f"{section}.{error.full_key}" if error.full_key else section
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error
    _check_ranges(section, config)
    return config


def _check_ranges(section: str, config: Any) -> None:
    """Hold every value of a section, and of those within it, to the range that its setting declares."""
    for declared in fields(config):
        value, key = getattr(config, declared.name), f"{section}.{declared.name}"
        if is_dataclass(value):
            _check_ranges(key, value)
        elif isinstance(value, dict):
            for name, model in value.items():
                if is_dataclass(model):
                    _check_ranges(f"{key}.{name}", model)
        if value == "":
            raise ConfigError(f"{key} is empty")
        found = of(declared)
        if found is not None and value is not None and not found.allows(value):
            null = f", or null ({found.null})" if found.null else ""
            raise ConfigError(f"{key} must be {found.range}{null}, got {value!r}")


def _get(config: Any, key: str) -> Any:
    if config is None:
        return None
    return config.get(key) if hasattr(config, "get") else getattr(config, key, None)


def read_signal_config(algorithm: Any, estimator: str) -> GNDPOConfig:
    """Read `algorithm.gndpo` and resolve it.

    Args:
        algorithm: verl's `algorithm` section (DictConfig, dict, dataclass) or None for the defaults.
        estimator: `algorithm.adv_estimator`, the preset unless `algorithm.gndpo.preset` names another.

    Raises:
        ConfigError: unknown key, wrong type or value out of range.
    """
    if estimator not in PRESETS:
        raise ConfigError(f"unknown estimator {estimator!r}; this project has {', '.join(PRESETS)}")
    section = _read("algorithm.gndpo", gndpo_section(), _get(algorithm, "gndpo"))
    preset = section.preset or estimator
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known presets: {', '.join(PRESETS)}"
        raise ConfigError(f"algorithm.gndpo.preset={preset} is unknown; {hint}")
    return _resolve_signal(section, preset, PRESETS[preset])


def read_teacher_config(config: Any) -> TeacherConfig:
    """Read `teacher` and resolve it: fill in what follows the student.

    Args:
        config: verl's whole config.

    Raises:
        ConfigError: no teacher configured, unknown key, wrong type or value out of range.
    """
    section: TeacherSection = _read("teacher", TeacherSection, _get(config, "teacher"))
    distillation = _get(config, "distillation")
    if section.from_distillation:
        section = _with_distillation(section, distillation)
    elif _get(distillation, "enabled"):
        own = section.model.path or section.models
        raise ConfigError(
            "distillation.enabled=True: verl would add its own distillation to this one"
            + ("" if own else ", which can take its teachers"),
            "distillation.enabled=False" if own else "++teacher.from_distillation=True",
        )
    _check_teacher(section)
    student = config.actor_rollout_ref
    temperature = section.temperature
    if temperature is None:
        temperature = float(student.rollout.temperature)
        if not temperature > 0:
            raise ConfigError(
                f"actor_rollout_ref.rollout.temperature={temperature}: greedy rollouts have no log-probs to compare; "
                "set it, or teacher.temperature, above 0"
            )
    # vLLM and SGLang return log-probs of a prompt at temperature 1 only.
    if section.backend == "server" and temperature != 1.0:
        raise ConfigError(
            f"teacher.backend=server scores at temperature 1, and teacher.temperature is {temperature} (null: the "
            "rollout's); set it to 1.0, or use teacher.backend=worker"
        )
    placement = section.placement or ("dedicated" if section.backend == "server" else "colocated")
    attention = (student.model.get("override_config") or {}).get("attn_implementation")
    follows = {} if attention is None else {"attn_implementation": attention}
    teachers = {
        name: Teacher(
            path=model.path or "",
            trust_remote_code=model.trust_remote_code,
            external_lib=model.external_lib,
            override_config=follows | model.override_config,
            keys=tuple(model.keys or ()),
            weight=model.weight,
        )
        for name, model in _named(section).items()
    }
    offload = section.fsdp.param_offload
    return TeacherConfig(
        backend=section.backend,
        from_distillation=section.from_distillation,
        placement=placement,
        n_gpus_per_node=section.n_gpus_per_node or 0,
        nnodes=section.nnodes,
        teachers=teachers,
        routing_key=section.routing_key,
        temperature=temperature,
        dtype=section.dtype or ("float32" if without_accelerator() else "bfloat16"),
        max_token_len_per_gpu=section.max_token_len_per_gpu
        or int(student.rollout.get("log_prob_max_token_len_per_gpu") or 16384),
        logits_chunk_tokens=section.logits_chunk_tokens,
        ulysses_sequence_parallel_size=section.ulysses_sequence_parallel_size,
        attention=section.attention,
        sharing=section.sharing,
        self_check=section.self_check,
        nccl_timeout=section.nccl_timeout or int(student.get("nccl_timeout") or 600),
        timeout_s=section.timeout_s,
        max_restarts=section.max_restarts,
        fsdp=TeacherFSDP(
            strategy=section.fsdp.strategy,
            fsdp_size=section.fsdp.fsdp_size,
            param_offload=placement == "colocated" if offload is None else offload,
            reshard_after_forward=section.fsdp.reshard_after_forward,
            wrap_policy=section.fsdp.wrap_policy,
        ),
        server=section.server,
    )


def read_student_config(config: Any) -> StudentSection:
    """Read `student`.

    Args:
        config: verl's whole config.

    Raises:
        ConfigError: unknown key, wrong type or value out of range.
    """
    section: StudentSection = _read("student", StudentSection, _get(config, "student"))
    return section


def uses_gndpo(config: Any) -> bool:
    """Return True if a verl config selects one of this project's estimators."""
    name = config.algorithm.adv_estimator
    return getattr(name, "value", name) in PRESETS
