# SPDX-License-Identifier: Apache-2.0
"""The two config sections that this project adds to verl's: `algorithm.gndpo` and `teacher`.

Both are plain sections of verl's Hydra config. They are read here, once, into typed and validated objects; an unknown
key or a wrong type is an error that names the key, its section and the nearest known key.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_gndpo.advantage import BASELINES, BOUNDS, SCALES, Signal
from verl_gndpo.presets import PRESETS
from verl_gndpo.setting import Setting, of, setting

EVERY_SAMPLE = "*"
TRAINER_MODES = ("sync", "colocate_async", "separate_async")
"""Values of `trainer.v1.trainer_mode`: the trainers of verl that this project extends."""
# Keys of `teacher` that only `backend=worker` reads.
WORKER_SETTINGS = (
    *("dtype", "max_token_len_per_gpu", "logits_chunk_tokens", "ulysses_sequence_parallel_size"),
    *("attention", "self_check", "fsdp"),
)


class ConfigError(ValueError):
    """A setting of ours is missing, unknown or out of range; the message says which and what to do."""


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
    bound: str | None = setting(None, "How far a single log-ratio may go.", null="as the preset has it")
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
    task_reward: TaskReward = field(default_factory=TaskReward)
    worst_tokens: WorstTokens = field(default_factory=WorstTokens)
    warn: Warn = field(default_factory=Warn)


def gndpo_section() -> type[GNDPOSection]:
    """Return the type of `algorithm.gndpo`, with a key for each parameter of each bound that is registered now."""
    parameters = {key: declared for bound in BOUNDS.values() for key, declared in bound.parameters.items()}
    fields_of_bounds = [(key, float | None, declared.as_optional_field()) for key, declared in parameters.items()]
    return make_dataclass("GNDPOSection", fields_of_bounds, bases=(GNDPOSection,))


@dataclass(frozen=True)
class GNDPOConfig:
    """`algorithm.gndpo`, resolved: every value is there and valid."""

    preset: str
    signal: Signal
    task_reward: TaskReward
    worst_tokens: WorstTokens
    warn: Warn


def _resolve_signal(section: GNDPOSection, name: str, preset: Mapping[str, Any]) -> GNDPOConfig:
    """Fill in a section from a preset and from the settings' defaults, and check all ranges."""

    def value(key: str, default: Any = None) -> Any:
        given = getattr(section, key)
        return preset.get(key, default) if given is None else given

    bound = value("bound")
    if bound not in BOUNDS:
        raise ConfigError(f"algorithm.gndpo.bound must be {' | '.join(BOUNDS)}, got {bound!r}")
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
    return GNDPOConfig(name, signal, section.task_reward, section.worst_tokens, section.warn)


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
class TeacherModelConfig:
    """`teacher.model`: which weights the teacher has. Same meaning as the keys of `actor_rollout_ref.model`."""

    path: str | None = None
    """Folder or hub id of the teacher. Required."""

    trust_remote_code: bool = False

    external_lib: str | None = None
    """Module to import in the worker before the model is built."""

    override_config: dict[str, Any] = field(default_factory=dict)
    """Overrides of the Hugging Face config; `attn_implementation` follows the student's unless given, and is that of
    the vision tower: the language model attends by `teacher.attention`."""


@dataclass
class NamedTeacherConfig(TeacherModelConfig):
    """`teacher.models.<name>`: one of several teachers."""

    keys: list[str] | None = None
    """Values of `teacher.routing_key` whose samples it scores; "*" stands for every sample, null for its own name."""

    weight: float = 1.0
    """Its share where several teachers score one sample: their log-probs are averaged with these weights, which
    minimises the weighted sum of the reverse KL divergences."""


@dataclass
class TeacherFSDPConfig:
    """`teacher.fsdp`: how the teacher is sharded."""

    strategy: str = "fsdp2"
    """fsdp2 or fsdp."""

    fsdp_size: int = -1
    """Ranks that share one copy of the weights; -1: all of them."""

    param_offload: bool | None = None
    """Keep the weights on the host between calls; null: where the teacher shares the actor's GPUs. Without an
    accelerator there is nothing to offload from."""

    reshard_after_forward: bool = True

    wrap_policy: dict[str, Any] = field(default_factory=dict)


@dataclass
class TeacherConfig:
    """`teacher`: what scores the student's tokens, and where."""

    backend: str = "worker"
    """worker: FSDP workers of this project, forward only. server: verl's own teacher replicas (vLLM or SGLang)."""

    placement: str | None = None
    """colocated: on the actor's GPUs, between generation and update. dedicated: on GPUs of its own, where responses are
    scored while others are still generated. null: colocated for workers, dedicated for servers, which know no other."""

    n_gpus_per_node: int | None = None
    """GPUs of a dedicated teacher on each node."""

    nnodes: int = 1
    """Nodes of a dedicated teacher."""

    model: TeacherModelConfig = field(default_factory=TeacherModelConfig)

    models: dict[str, NamedTeacherConfig] = field(default_factory=dict)
    """Several teachers by name, instead of `model`."""

    routing_key: str = "data_source"
    """Column of the data that decides which of several teachers scores a sample."""

    temperature: float | None = None
    """Divides the teacher's logits; null: the rollout's temperature, which the student's log-probs use. 1.0 reproduces
    the released code."""

    dtype: str | None = None
    """float32, bfloat16 or float16; null: bfloat16 with an accelerator, float32 without."""

    max_token_len_per_gpu: int | None = None
    """Tokens of one micro-batch; null: `actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu`."""

    logits_chunk_tokens: int = 256
    """Response tokens whose logits exist at once: the peak is at most this times the vocabulary, in float32."""

    ulysses_sequence_parallel_size: int = 1
    """Ranks that share one row of tokens; it divides the number of ranks and of attention heads."""

    attention: str = "sdpa"
    """sdpa: torch's own kernels, prompt by prompt. flex: FlexAttention, one kernel over all prompts of a micro-batch
    without padding, compiled on an accelerator."""

    self_check: bool = True
    """Compare the first scores of a run with a plain forward pass."""

    fsdp: TeacherFSDPConfig = field(default_factory=TeacherFSDPConfig)

    server: dict[str, Any] = field(default_factory=dict)
    """Of `backend=server`: settings of the replicas, by the keys of verl's `distillation.teacher_models.*.inference`
    (name, tensor_model_parallel_size, gpu_memory_utilization, max_num_batched_tokens, ...)."""

    @property
    def named(self) -> dict[str, NamedTeacherConfig]:
        """All teachers by name, with their keys; a single one is called "teacher" and scores every sample."""
        if not self.models:
            return {"teacher": NamedTeacherConfig(**vars(self.model), keys=[EVERY_SAMPLE])}
        return {
            name: replace(model, keys=[name] if model.keys is None else model.keys)
            for name, model in self.models.items()
        }

    def validate(self) -> None:
        if not self.model.path and not self.models:
            raise ConfigError(
                "no teacher is configured: give teacher.model.path (a folder or hub id), "
                "for example +teacher.model.path=Qwen/Qwen2.5-VL-7B-Instruct"
            )
        self._validate_models()
        self._validate_placement()
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(f"teacher.temperature must be positive or null (the rollout's), got {self.temperature}")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"teacher.dtype must be float32, bfloat16, float16 or null, got {self.dtype!r}")
        if self.attention not in ("sdpa", "flex"):
            raise ConfigError(f"teacher.attention must be sdpa or flex, got {self.attention!r}")
        if self.fsdp.strategy not in ("fsdp", "fsdp2"):
            raise ConfigError(f"teacher.fsdp.strategy must be fsdp2 or fsdp, got {self.fsdp.strategy!r}")
        keys = ("max_token_len_per_gpu", "logits_chunk_tokens", "ulysses_sequence_parallel_size", "nnodes")
        for key in (*keys, "n_gpus_per_node"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"teacher.{key} must be at least 1, got {value}")
        if self.fsdp.fsdp_size != -1 and self.fsdp.fsdp_size < 1:
            raise ConfigError(f"teacher.fsdp.fsdp_size must be -1 (all ranks) or at least 1, got {self.fsdp.fsdp_size}")

    def _validate_models(self) -> None:
        if self.models and self.model != TeacherModelConfig():
            raise ConfigError(
                "both teacher.model and teacher.models are given; one teacher goes into the first, several into the "
                "second"
            )
        if not self.models and self.routing_key != TeacherConfig.routing_key:
            raise ConfigError("teacher.routing_key has no effect with a single teacher; teacher.models holds several")
        for name, model in self.models.items():
            if not model.path:
                raise ConfigError(f"teacher.models.{name}.path is not given: a folder or hub id")
            if not 0 < model.weight < float("inf"):
                raise ConfigError(f"teacher.models.{name}.weight must be positive, got {model.weight}")
            if model.keys is not None and not model.keys:
                raise ConfigError(f"teacher.models.{name}.keys is empty, so that it would score nothing")

    def _validate_placement(self) -> None:
        if self.backend not in ("worker", "server"):
            raise ConfigError(f"teacher.backend must be worker or server, got {self.backend!r}")
        if self.placement not in (None, "colocated", "dedicated"):
            raise ConfigError(f"teacher.placement must be colocated, dedicated or null, got {self.placement!r}")
        on_server = self.backend == "server"
        if on_server and self.placement == "colocated":
            raise ConfigError("teacher.backend=server needs GPUs of its own: teacher.placement=dedicated")
        if self.server and not on_server:
            raise ConfigError("teacher.server has no effect with teacher.backend=worker")
        if not (on_server or self.placement == "dedicated"):
            for key in ("n_gpus_per_node", "nnodes"):
                if getattr(self, key) != getattr(TeacherConfig, key):
                    raise ConfigError(f"teacher.{key} has no effect without teacher.placement=dedicated")
            return
        if self.n_gpus_per_node is None:
            raise ConfigError("a dedicated teacher needs teacher.n_gpus_per_node (and teacher.nnodes, default 1)")
        if on_server:
            self._validate_server()

    def _validate_server(self) -> None:
        defaults, plain = TeacherConfig(), TeacherModelConfig()
        unused = [key for key in WORKER_SETTINGS if getattr(self, key) != getattr(defaults, key)]
        for name, model in self.named.items():
            section = f"models.{name}" if self.models else "model"
            given = [f.name for f in fields(TeacherModelConfig) if getattr(model, f.name) != getattr(plain, f.name)]
            unused += [f"{section}.{key}" for key in given if key != "path"]
            unused += [f"{section}.weight"] if model.weight != NamedTeacherConfig.weight else []
        if unused:
            raise ConfigError(
                f"teacher.{unused[0]} has no effect with teacher.backend=server, whose settings are in teacher.server"
            )
        claimed: dict[str, str] = {}
        if self.models:
            for name, model in self.named.items():
                if len(model.keys) != 1 or EVERY_SAMPLE in model.keys:
                    raise ConfigError(
                        f"teacher.models.{name}.keys: with teacher.backend=server each teacher has one key, got "
                        f"{', '.join(model.keys)}; teacher.backend=worker knows no such limit"
                    )
                other = claimed.setdefault(model.keys[0], name)
                if other != name:
                    raise ConfigError(
                        f"teacher.models.{other} and .{name} have the same key {model.keys[0]}: only "
                        "teacher.backend=worker lets several teachers score one sample"
                    )


def _check_keys(section: str, schema: type, given: dict) -> None:
    known = {f.name: f for f in fields(schema)}
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {section}.{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"unknown key {section}.{key}; {hint}")
        factory = known[key].default_factory
        if is_dataclass(factory) and isinstance(value, dict):
            _check_keys(f"{section}.{key}", factory, value)
        elif schema is TeacherConfig and key == "models" and isinstance(value, dict):
            for name, model in value.items():
                if isinstance(model, dict):
                    _check_keys(f"{section}.{key}.{name}", NamedTeacherConfig, model)


def _read(section: str, schema: type, given: Any):
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
        found = of(declared)
        if found is not None and value is not None and not found.allows(value):
            null = f", or null for {found.null}" if found.null else ""
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
    """The settings of `teacher`, with what follows the student filled in.

    Args:
        config: verl's whole config.

    Raises:
        ConfigError: no teacher configured, unknown key, wrong type or value out of range.
    """
    teacher = _read("teacher", TeacherConfig, _get(config, "teacher"))
    teacher.validate()
    student = config.actor_rollout_ref
    if teacher.temperature is None:
        teacher.temperature = float(student.rollout.temperature)
        if not teacher.temperature > 0:
            raise ConfigError(
                f"actor_rollout_ref.rollout.temperature={teacher.temperature}: greedy rollouts have no log-probs to "
                "compare; set it, or teacher.temperature, above 0"
            )
    if teacher.max_token_len_per_gpu is None:
        teacher.max_token_len_per_gpu = int(student.rollout.get("log_prob_max_token_len_per_gpu") or 16384)
    teacher.placement = teacher.placement or ("dedicated" if teacher.backend == "server" else "colocated")
    if teacher.fsdp.param_offload is None:
        teacher.fsdp.param_offload = teacher.placement == "colocated"
    attention = (student.model.get("override_config") or {}).get("attn_implementation")
    if attention is not None:
        for model in (teacher.model, *teacher.models.values()):
            model.override_config.setdefault("attn_implementation", attention)
    # vLLM and SGLang return log-probs of a prompt at temperature 1 only.
    if teacher.backend == "server" and teacher.temperature != 1.0:
        raise ConfigError(
            f"teacher.backend=server scores at temperature 1, and teacher.temperature is {teacher.temperature} (null: "
            "the rollout's); set it to 1.0, or use teacher.backend=worker"
        )
    return teacher


def uses_gndpo(config: Any) -> bool:
    """Whether a verl config selects one of this project's estimators."""
    name = config.algorithm.adv_estimator
    return getattr(name, "value", name) in PRESETS
