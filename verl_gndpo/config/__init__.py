# SPDX-License-Identifier: Apache-2.0
"""The two config sections that this project adds to verl's: `algorithm.gndpo` and `teacher`.

Both are plain sections of verl's Hydra config. They are read here, once, into typed and validated objects; an unknown
key or a wrong type is an error that names the key, its section and the nearest known key.
"""

import difflib
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_gndpo import ESTIMATORS


class ConfigError(ValueError):
    """A setting of ours is missing, unknown or out of range; the message says which and what to do."""


@dataclass
class SignalConfig:
    """`algorithm.gndpo`: how the teacher-student log-ratio becomes an advantage."""

    clip: float | None = 5.0
    """Bound of the log-ratio in nats, on both sides; null leaves it raw."""

    center: bool | None = None
    """Subtract the mean over all response tokens of the batch; null: what the estimator's name says (gndpo yes, opd
    no)."""

    scale: bool | None = None
    """Divide by the standard deviation over all response tokens; null: what the estimator's name says (gndpo yes, opd
    no)."""

    std_floor: float = 1e-4
    """Floor of the standard deviation in nats, added in quadrature: sqrt(var + std_floor^2). 1e-4 is the published
    1e-8."""

    def validate(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"algorithm.gndpo.clip must be positive or null (raw log-ratios), got {self.clip}")
        if not self.std_floor > 0:
            raise ConfigError(
                f"algorithm.gndpo.std_floor must be positive, got {self.std_floor}: it is what is left to divide by "
                "where all log-ratios are equal"
            )


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
    the vision tower: the language model attends by `teacher.shared_prompt`."""


@dataclass
class TeacherFSDPConfig:
    """`teacher.fsdp`: how the teacher is sharded."""

    strategy: str = "fsdp2"
    """fsdp2 or fsdp."""

    fsdp_size: int = -1
    """Ranks that share one copy of the weights; -1: all of them."""

    param_offload: bool = True
    """Keep the weights on the host between calls. Without an accelerator there is nothing to offload from."""

    reshard_after_forward: bool = True

    wrap_policy: dict[str, Any] = field(default_factory=dict)


@dataclass
class TeacherConfig:
    """`teacher`: the reference worker that scores the student's tokens."""

    model: TeacherModelConfig = field(default_factory=TeacherModelConfig)

    temperature: float | None = None
    """Divides the teacher's logits; null: the rollout's temperature, which the student's log-probs use. 1.0 reproduces
    the released code."""

    dtype: str | None = None
    """float32, bfloat16 or float16; null: bfloat16 with an accelerator, float32 without."""

    max_token_len_per_gpu: int | None = None
    """Tokens of one micro-batch; null: `actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu`."""

    logits_chunk_tokens: int = 256
    """Response tokens whose logits exist at the same time: the peak is this times the vocabulary, in float32."""

    fsdp: TeacherFSDPConfig = field(default_factory=TeacherFSDPConfig)

    def validate(self) -> None:
        if not self.model.path:
            raise ConfigError(
                "no teacher is configured: give teacher.model.path (a folder or hub id), "
                "for example +teacher.model.path=Qwen/Qwen2.5-VL-7B-Instruct"
            )
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(f"teacher.temperature must be positive or null (the rollout's), got {self.temperature}")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"teacher.dtype must be float32, bfloat16, float16 or null, got {self.dtype!r}")
        if self.fsdp.strategy not in ("fsdp", "fsdp2"):
            raise ConfigError(f"teacher.fsdp.strategy must be fsdp2 or fsdp, got {self.fsdp.strategy!r}")
        for key in ("max_token_len_per_gpu", "logits_chunk_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"teacher.{key} must be at least 1, got {value}")


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
    config.validate()
    return config


def _get(config: Any, key: str) -> Any:
    if config is None:
        return None
    return config.get(key) if hasattr(config, "get") else getattr(config, key, None)


def read_signal_config(algorithm: Any, estimator: str) -> SignalConfig:
    """The settings of `algorithm.gndpo`, with `center` and `scale` resolved.

    Args:
        algorithm: verl's `algorithm` section (DictConfig, dict, dataclass) or None for the defaults.
        estimator: "gndpo" or "opd". An explicit `center` or `scale` wins over what the name stands for.

    Raises:
        ConfigError: unknown key, wrong type or value out of range.
    """
    if estimator not in ESTIMATORS:
        raise ConfigError(f"unknown estimator {estimator!r}; this project has {', '.join(ESTIMATORS)}")
    config = _read("algorithm.gndpo", SignalConfig, _get(algorithm, "gndpo"))
    whiten = estimator == "gndpo"
    config.center = whiten if config.center is None else config.center
    config.scale = whiten if config.scale is None else config.scale
    return config


def read_teacher_config(config: Any) -> TeacherConfig:
    """The settings of `teacher`, with what follows the student filled in.

    Args:
        config: verl's whole config.

    Raises:
        ConfigError: no teacher configured, unknown key, wrong type or value out of range.
    """
    teacher = _read("teacher", TeacherConfig, _get(config, "teacher"))
    student = config.actor_rollout_ref
    if teacher.temperature is None:
        teacher.temperature = float(student.rollout.temperature)
    if teacher.max_token_len_per_gpu is None:
        teacher.max_token_len_per_gpu = int(student.rollout.get("log_prob_max_token_len_per_gpu") or 16384)
    attention = (student.model.get("override_config") or {}).get("attn_implementation")
    if attention is not None:
        teacher.model.override_config.setdefault("attn_implementation", attention)
    return teacher


def uses_gndpo(config: Any) -> bool:
    """Whether a verl config selects one of this project's estimators."""
    name = config.algorithm.adv_estimator
    return getattr(name, "value", name) in ESTIMATORS
