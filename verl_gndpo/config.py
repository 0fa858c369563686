# SPDX-License-Identifier: Apache-2.0
"""The two config sections that this project adds to verl's: `algorithm.gndpo` and `teacher`.

Both are plain sections of verl's Hydra config. They are read here, once, into typed and validated objects; an unknown
key or a wrong type is an error that names the key, its section and the nearest known key.
"""

import difflib
import math
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_gndpo import ESTIMATORS, PRESETS

EVERY_SAMPLE = "*"
# Keys of `teacher` that only `backend=worker` reads.
WORKER_SETTINGS = (
    *("dtype", "max_token_len_per_gpu", "logits_chunk_tokens", "ulysses_sequence_parallel_size"),
    *("attention", "self_check", "fsdp"),
)


class ConfigError(ValueError):
    """A setting of ours is missing, unknown or out of range; the message says which and what to do."""


@dataclass
class TaskRewardConfig:
    """`algorithm.gndpo.task_reward`: the task's own reward, mixed into the advantages."""

    coef: float = 0.0
    """Root mean square of the task's part over that of the teacher's, in each batch; 0: the reward is only logged."""

    estimator: str = "grpo"
    """Which of verl's estimators turns rewards into advantages."""


@dataclass
class WorstTokensConfig:
    """`algorithm.gndpo.worst_tokens`: the tokens with the largest abs(log-ratio) of a step, with their context."""

    every: int = 10
    """Steps from one that is written down to the next; 0: none is. A step that raises a warning is, too, unless one
    within the last `every` steps was."""

    count: int = 10
    """Tokens of a step."""

    path: str | None = None
    """File of JSON lines; null: gndpo_worst_tokens.jsonl beside the file of verl's file logger
    (VERL_FILE_LOGGER_PATH), else in `trainer.default_local_dir`."""


@dataclass
class WarnConfig:
    """`algorithm.gndpo.warn`: when to warn of what a step's metrics show (signal_warnings.py); null: never."""

    gain: float | None = 20.0
    """Above this `gndpo/gain`."""

    sign_flip_share: float | None = 0.3
    """Above this `gndpo/sign_flip_share`."""

    truncated_share_rise: float | None = 0.1
    """When `gndpo/response/truncated_share` is by more than this above that of the run's first steps."""

    correlation: float | None = 0.99
    """Below this `training/rollout_actor_probs_pearson_corr`."""

    data_source_gradient_share: float | None = 0.8
    """When one of several data sources has more than this of the gradient."""


@dataclass
class SignalConfig:
    """`algorithm.gndpo`: how the teacher-student log-ratio becomes an advantage (advantage.py has the formulas).

    One rule: what is given here wins over the preset, setting by setting; null leaves a setting to the preset, and what
    the preset does not name has the value of `STAGE_DEFAULTS`.
    """

    preset: str | None = None
    """Which published signal to start from (presets.py); null: the one that `algorithm.adv_estimator` names."""

    bound: str | None = None
    """none, clamp, tanh, sign, power, gap, odds, log_odds, proximal, soft_clamp or mask."""

    limit: float | None = None
    """Of bound=clamp, mask and log_odds, nats, on both sides."""

    power_alpha: float | None = None
    """Of bound=power: the exponent of both probabilities."""

    negative_limit: float | None = None
    """Of bound=gap and odds: how far below 0 they may go before they are weighted, 0 to 1."""

    proximal_alpha: float | None = None
    """Of bound=proximal: the teacher's share of the mixture that the student is drawn to."""

    soft_clamp_factor: float | None = None
    """Of bound=soft_clamp: the limit as a multiple of the batch mean of abs(log-ratio)."""

    baseline: str | None = None
    """none, or the mean over the batch, the prompt's group, the position in the response, or the teacher; or kl, the
    value of the state in closed form."""

    top_k: int | None = None
    """Of baseline=kl: how many of the student's most likely tokens count one by one in the KL divergence; all others
    count as one, which makes it a lower bound."""

    scale: str | None = None
    """none, or divide by the deviation over the batch, the group or the teacher, or by its average over steps (ema); or
    rank, which keeps only the order."""

    std_floor: float = 1e-4
    """Floor of the standard deviation in the bound's unit, added in quadrature: sqrt(var + std_floor^2). 1e-4 is the
    published 1e-8."""

    gain_limit: float | None = None
    """Largest factor that the scale may be; null: only `std_floor` limits it."""

    ema_decay: float | None = None
    """Of scale=ema: weight of the steps before, 0 to 1."""

    task_reward: TaskRewardConfig = field(default_factory=TaskRewardConfig)

    worst_tokens: WorstTokensConfig = field(default_factory=WorstTokensConfig)

    warn: WarnConfig = field(default_factory=WarnConfig)

    def validate(self) -> None:
        """Of a resolved config."""
        for key, known in STAGES.items():
            if getattr(self, key) not in known:
                raise ConfigError(f"algorithm.gndpo.{key} must be {' | '.join(known)}, got {getattr(self, key)!r}")
        for key in ("limit", "power_alpha", "soft_clamp_factor", "gain_limit"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ConfigError(f"algorithm.gndpo.{key} must be positive, got {value}")
        if not self.std_floor > 0:
            raise ConfigError(
                f"algorithm.gndpo.std_floor must be positive, got {self.std_floor}: it is what is left to divide by "
                "where all log-ratios are equal"
            )
        if self.top_k < 1:
            raise ConfigError(f"algorithm.gndpo.top_k must be at least 1, got {self.top_k}")
        if not 0 < self.negative_limit <= 1:
            raise ConfigError(f"algorithm.gndpo.negative_limit must be above 0, at most 1, got {self.negative_limit}")
        if not 0 < self.proximal_alpha < 1:
            raise ConfigError(f"algorithm.gndpo.proximal_alpha must be between 0 and 1, got {self.proximal_alpha}")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"algorithm.gndpo.ema_decay must be at least 0 and below 1, got {self.ema_decay}")
        if not 0 <= self.task_reward.coef < math.inf:
            raise ConfigError(f"algorithm.gndpo.task_reward.coef must be at least 0, got {self.task_reward.coef}")
        for key, least in (("every", 0), ("count", 1)):
            value = getattr(self.worst_tokens, key)
            if value < least:
                raise ConfigError(f"algorithm.gndpo.worst_tokens.{key} must be at least {least}, got {value}")
        if self.worst_tokens.path == "":
            raise ConfigError("algorithm.gndpo.worst_tokens.path is empty; null stands for the default")
        for key, value in vars(self.warn).items():
            most = math.inf if key == "gain" else 1.0
            if value is not None and not 0 < value <= most:
                allowed = "positive" if key == "gain" else "above 0 and at most 1"
                raise ConfigError(f"algorithm.gndpo.warn.{key} must be {allowed}, or null for no warning, got {value}")


STAGES = {
    "bound": ("none", "clamp", "tanh", "sign", "power", "gap", "odds", "log_odds", "proximal", "soft_clamp", "mask"),
    "baseline": ("none", "batch", "group", "position", "teacher", "kl"),
    "scale": ("none", "batch", "group", "teacher", "ema", "rank"),
}
STAGE_DEFAULTS = {
    "limit": 5.0,
    "power_alpha": 5.0,
    "negative_limit": 0.4,
    "proximal_alpha": 0.5,
    "soft_clamp_factor": 3.0,
    "top_k": 64,
    "ema_decay": 0.9,
}


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
    return config


def _get(config: Any, key: str) -> Any:
    if config is None:
        return None
    return config.get(key) if hasattr(config, "get") else getattr(config, key, None)


def read_signal_config(algorithm: Any, estimator: str) -> SignalConfig:
    """The settings of `algorithm.gndpo`, resolved: every stage and its parameters are filled in.

    Args:
        algorithm: verl's `algorithm` section (DictConfig, dict, dataclass) or None for the defaults.
        estimator: `algorithm.adv_estimator`, the preset unless `algorithm.gndpo.preset` names another.

    Raises:
        ConfigError: unknown key, wrong type or value out of range.
    """
    if estimator not in ESTIMATORS:
        raise ConfigError(f"unknown estimator {estimator!r}; this project has {', '.join(ESTIMATORS)}")
    config = _read("algorithm.gndpo", SignalConfig, _translate_old_keys(_get(algorithm, "gndpo")))
    preset = config.preset or estimator
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known presets: {', '.join(PRESETS)}"
        raise ConfigError(f"algorithm.gndpo.preset={preset} is unknown; {hint}")
    for key, value in (STAGE_DEFAULTS | PRESETS[preset]).items():
        if getattr(config, key) is None:
            setattr(config, key, value)
    config.preset = preset
    config.validate()
    return config


def _translate_old_keys(given: Any) -> Any:
    """The stages that `clip`, `center`, a bool as `scale`, and `scope` stood for, in configs from before there were
    stages."""
    if OmegaConf.is_config(given):
        given = OmegaConf.to_container(given, resolve=True)
    if not isinstance(given, dict):
        return given
    given = dict(given)
    if "clip" in given:
        limit = given.pop("clip")
        given |= {"bound": "none"} if limit is None else {"bound": "clamp", "limit": limit}
    segment = given.pop("scope", "batch")
    if segment not in ("batch", "teacher"):
        raise ConfigError(
            f"algorithm.gndpo.scope must be batch or teacher, got {segment!r}; baseline and scale know more"
        )
    for old, stage in (("center", "baseline"), ("scale", "scale")):
        if isinstance(given.get(old), bool):
            given[stage] = segment if given.pop(old) else "none"
    if given.get("center", False) is None:
        del given["center"]
    if segment == "teacher":
        given = {"baseline": segment, "scale": segment} | {k: x for k, x in given.items() if x is not None}
    return given


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
    return getattr(name, "value", name) in ESTIMATORS
