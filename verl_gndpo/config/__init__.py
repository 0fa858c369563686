# SPDX-License-Identifier: Apache-2.0
"""The two config sections that this project adds to verl's: `algorithm.gndpo` and `teacher`.

Both are plain sections of verl's Hydra config. They are read here, once, into typed and validated objects; an unknown
key or a wrong type is an error that names the key, its section and the nearest known key.
"""

import difflib
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_gndpo import ESTIMATORS

EVERY_SAMPLE = "*"
# Keys of `teacher` that only `backend=worker` reads.
WORKER_SETTINGS = (
    *("dtype", "max_token_len_per_gpu", "logits_chunk_tokens", "ulysses_sequence_parallel_size"),
    *("attention", "self_check", "fsdp"),
)


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

    scope: str = "batch"
    """Over which tokens mean and deviation run: all of the "batch", or with several teachers those of each "teacher"
    apart."""

    def validate(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"algorithm.gndpo.clip must be positive or null (raw log-ratios), got {self.clip}")
        if not self.std_floor > 0:
            raise ConfigError(
                f"algorithm.gndpo.std_floor must be positive, got {self.std_floor}: it is what is left to divide by "
                "where all log-ratios are equal"
            )
        if self.scope not in ("batch", "teacher"):
            raise ConfigError(f"algorithm.gndpo.scope must be batch or teacher, got {self.scope!r}")


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
