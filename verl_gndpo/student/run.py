# SPDX-License-Identifier: Apache-2.0
"""Brings the student's engine into a run, by verl's own settings: a name in its registry, and a type of config."""

from typing import Any

from omegaconf import DictConfig, open_dict

from verl_gndpo.config import ConfigError, StudentSection, read_student_config
from verl_gndpo.verl_patches.actor import apply_in_actor

ENGINE = "verl_gndpo.student.engine"
MODEL_TYPE = "gndpo_student"
"""The engine's name in verl's registry, for `actor_rollout_ref.model.model_type`."""


def why_prompts_cannot_be_shared(config: Any) -> list[ConfigError]:
    """Return what in a config does not go with `student.share_prompts=True`, with remedies; empty where nothing.

    Args:
        config: verl's whole config.
    """
    model, actor = config.actor_rollout_ref.model, config.actor_rollout_ref.actor
    found = []

    def refuse(key: str, value: Any, why: str, instead: Any) -> None:
        detail = f"student.share_prompts=True: {key}={value} {why}"
        found.append(ConfigError(detail, f"{key}={instead}, or student.share_prompts=False"))

    if not config.trainer.use_v1:
        refuse("trainer.use_v1", False, "is verl's old trainer, which would ignore it", True)
    if actor.strategy not in ("fsdp", "fsdp2"):
        refuse("actor_rollout_ref.actor.strategy", actor.strategy, "has no engine that shares prompts", "fsdp2")
        return found
    for name, plain, why in (
        ("ulysses_sequence_parallel_size", 1, "spreads a sequence over ranks"),
        ("pad_to_length", False, "pads micro-batches"),
    ):
        # verl's own config makes the second follow the first.
        for key in (name, f"fsdp_config.{name}"):
            if (_select(actor, key) or plain) != plain:
                refuse(f"actor_rollout_ref.actor.{key}", _select(actor, key), why, plain)
                break
    if model.get("use_fused_kernels"):
        refuse("actor_rollout_ref.model.use_fused_kernels", True, "replaces the output projection", False)
    distillation = config.get("distillation")
    mode = str(_select(distillation, "distillation_loss.loss_mode"))
    if _select(distillation, "enabled") and mode.endswith("topk"):
        refuse("distillation.distillation_loss.loss_mode", mode, "needs all logits", "k1")
    if model.get("model_type", "language_model") != "language_model":
        refuse("actor_rollout_ref.model.model_type", model.model_type, "names another engine", "language_model")
    return found


def share_prompts(config: DictConfig) -> bool:
    """Change a run's config so that its actor shares prompts, if `student.share_prompts` says so.

    The reference policy's engine shares them, too, because verl runs it in the actor's process.

    Args:
        config: verl's whole config; changed.

    Returns:
        `student.share_prompts`.

    Raises:
        ConfigError: the section `student`, or something else in the config that does not go with it.
    """
    student = read_student_config(config)
    if not student.share_prompts:
        return False
    for problem in why_prompts_cannot_be_shared(config):
        raise problem
    section = config.actor_rollout_ref
    apply_in_actor(section, "images_once")
    with open_dict(section):
        section.model.model_type = MODEL_TYPE
        for role in ("actor", "ref"):
            _use_engine(section[role].fsdp_config, student)
    return True


def _use_engine(engine: DictConfig, student: StudentSection) -> None:
    engine["_target_"] = f"{ENGINE}.StudentEngineConfig"
    engine.logits_chunk_tokens = student.logits_chunk_tokens
    engine.attention = student.attention


def _select(section: Any, key: str) -> Any:
    for part in key.split("."):
        section = section.get(part) if section is not None else None
    return section
