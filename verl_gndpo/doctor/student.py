# SPDX-License-Identifier: Apache-2.0
"""Check whether the student's passes can share prompts, with any estimator."""

from typing import Any

from verl_gndpo.config import ConfigError, Teacher, read_student_config
from verl_gndpo.doctor.check import Check


def check_student(config: Any) -> list[Check]:
    """Check the section `student`, and that the rest of the config and the student's architecture go with it."""
    try:
        section = read_student_config(config)
    except ConfigError as error:
        return [Check("student", "error", error.detail, error.remedy)]
    if not section.share_prompts:
        return []
    from verl_gndpo.student.run import why_prompts_cannot_be_shared

    problems = why_prompts_cannot_be_shared(config)
    if problems:
        return [Check("student", "error", problem.detail, problem.remedy) for problem in problems]
    return _check_architecture(config.actor_rollout_ref.model)


def _check_architecture(model: Any) -> list[Check]:
    from verl_gndpo.student.architecture import why_prompts_are_not_shared
    from verl_gndpo.teacher.architecture import model_config

    student = Teacher(
        path=model.path,
        trust_remote_code=bool(model.get("trust_remote_code")),
        external_lib=model.get("external_lib"),
        override_config=dict(model.get("override_config") or {}),
        keys=(),
        weight=1.0,
    )
    try:
        verl_config = model_config(student)
    # `check_models` reports a model that can't be read.
    except Exception:
        return []
    options = {"trust_remote_code": student.trust_remote_code}
    reason = why_prompts_are_not_shared(verl_config.hf_config, verl_config.local_path, **options)
    if reason is None:
        return [Check("student", "ok", f"{student.path}: responses share their prompt in the actor's passes, too")]
    detail = f"student.share_prompts=True has no effect: each response of {student.path} runs with its own prompt: "
    return [Check("student", "warning", detail + reason, "student.share_prompts=False says so in the config")]
