# SPDX-License-Identifier: Apache-2.0
"""Resolved settings for tests, read as a run would read them."""

from typing import Any

from omegaconf import OmegaConf

from verl_gndpo.config import TeacherConfig, read_teacher_config


def teacher_config(path: Any = "T", **section: Any) -> TeacherConfig:
    """Resolve a `teacher` section beside a student that samples at temperature 1.

    Args:
        path: of a single teacher; not used where `section` holds `models`.
        section: other keys of `teacher`; those of `teacher.model` as `model`.
    """
    if "models" not in section:
        section["model"] = {"path": str(path)} | section.get("model", {})
    student = {"rollout": {"temperature": 1.0, "log_prob_max_token_len_per_gpu": 4096}, "model": {}}
    return read_teacher_config(OmegaConf.create({"teacher": section, "actor_rollout_ref": student}))
