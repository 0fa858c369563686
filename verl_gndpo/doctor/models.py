# SPDX-License-Identifier: Apache-2.0
"""Check the models of a run: student, teachers, and the processor of images."""

import os
import warnings
from typing import TYPE_CHECKING, Any

from verl_gndpo.config import teacher_paths
from verl_gndpo.doctor.check import Check, Status, select

if TYPE_CHECKING:
    from verl_gndpo.doctor.compatibility import ModelFiles


def check_models(config: Any) -> list[Check]:
    """Check that student and teachers exist, and that the teachers can score what the student writes.

    Args:
        config: verl's whole config. The section `teacher` may be invalid: a wrong path in it is reported in any case.
    """
    checks, student = _check_student(config)
    seen = set()
    # `check_settings` reports a path that is not given.
    for key, model in teacher_paths(config).items():
        if model.path not in seen:
            seen.add(model.path)
            checks += _check_teacher(config, key, model, student)
    return checks


def _check_student(config: Any) -> tuple[list[Check], "ModelFiles | None"]:
    """Read the student's files, and check its processor and its LoRA adapters. The files are None if unreadable."""
    model = config.actor_rollout_ref.model
    check, student = _read(
        "student", "actor_rollout_ref.model.path", model.path, model.trust_remote_code, model.get("tokenizer_path")
    )
    checks = [check]
    if student is not None and student.is_multimodal:
        checks += _check_processor(model)
        as_adapters = model.get("lora_rank") and not select(model, "lora.merge")
        if as_adapters and not model.get("exclude_modules"):
            if select(config, "actor_rollout_ref.actor.freeze_vision_tower"):
                detail = "LoRA trains the language model only: vLLM would ignore adapters in the projector"
                remedy = "actor_rollout_ref.model.lora.merge=True trains a projector outside the vision tower, too"
                checks.append(Check("student", "ok", detail, remedy))
            else:
                detail = "LoRA adapters in the vision tower and the projector are trained, but vLLM ignores them"
                remedy = "actor_rollout_ref.actor.freeze_vision_tower=True, or actor_rollout_ref.model.exclude_modules"
                checks.append(Check("student", "warning", detail, remedy))
    return checks, student


def _check_teacher(config: Any, key: str, model: Any, student: "ModelFiles | None") -> list[Check]:
    """Read a teacher's files, and compare them with the student's.

    Args:
        key: setting that names the teacher, for messages.
        model: the section that describes it.
        student: None if the student can't be read.
    """
    from verl_gndpo.teacher.sequence_parallel import check_sequence_parallel

    check, teacher = _read("teacher", key, model.path, bool(select(model, "trust_remote_code")))
    checks = [check]
    if teacher is None:
        return checks
    if student is not None:
        checks += _compare_models(student, teacher)
    try:
        check_sequence_parallel(teacher.config, select(config, "teacher.ulysses_sequence_parallel_size", 1))
    except ValueError as error:
        remedy = "another teacher.ulysses_sequence_parallel_size"
        checks.append(Check("teacher", "error", f"{model.path}: {error}", remedy))
    return checks


def _read(
    role: str, key: str, path: str, trusted: bool, tokenizer_path: str | None = None
) -> tuple[Check, "ModelFiles | None"]:
    """Read the files of a model.

    Args:
        role: "student" or "teacher".
        key: setting that names the model, for messages.
        path: folder, hub id, or a place that verl copies models from.
        trusted: `trust_remote_code`.
        tokenizer_path: where tokenizer and image processor are, if not in `path`.

    Returns:
        The finding, and the files; None if they can't be read.
    """
    from verl.utils.fs import copy_to_local

    from verl_gndpo.doctor.compatibility import ModelNotFound, is_remote, read_model_files

    if is_remote(path):
        # The workers find the copy in the same cache. verl raises nothing if it can't copy.
        local = copy_to_local(path)
        if not os.path.isdir(local):
            detail = f"{path} can't be copied here, so it can't be compared with the other model"
            return Check(role, "error", detail, f"make it readable from here, or correct {key}"), None
        path = local
    try:
        files = read_model_files(path, role, trust_remote_code=trusted, tokenizer_path=tokenizer_path)
    except ModelNotFound as error:
        return Check(role, "error", str(error), f"correct {key}"), None
    kind = "multimodal" if files.is_multimodal else "text-only"
    return Check(role, "ok", f"{path}: {files.config.model_type}, {kind}"), files


def _compare_models(student: "ModelFiles", teacher: "ModelFiles") -> list[Check]:
    """Return the differences between two models as findings."""
    from verl_gndpo.doctor.compatibility import compare

    checks = []
    differences = compare(student, teacher)
    for difference in differences:
        remedy = "choose a teacher of the student's family" if difference.fatal else ""
        if difference.fatal and difference.detail.startswith("image processor"):
            remedy += ", or copy the student's image processor settings into the teacher's folder"
        status: Status = "error" if difference.fatal else "warning"
        checks.append(Check(difference.topic, status, difference.detail, remedy))
    if not any(difference.fatal for difference in differences):
        sizes = f"vocabularies padded to {student.vocab_size} (student) and {teacher.vocab_size} (teacher)"
        images = ", same image patches" if student.is_multimodal else ""
        detail = f"same {len(student.tokenizer)} tokens and special ids{images}; {sizes}"
        checks.append(Check("teacher and student", "ok", detail))
    return checks


def _check_processor(model: Any) -> list[Check]:
    """Check that verl can use the student's processor. Without one it goes on, and no image reaches a model."""
    from verl.utils.tokenizer import hf_processor

    path = model.get("tokenizer_path") or model.path
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        processor = hf_processor(path, trust_remote_code=model.trust_remote_code)
    if processor is not None:
        return []
    reason = "; ".join(str(w.message) for w in caught if "processor" in str(w.message)) or "AutoProcessor finds none"
    remedy = "choose a student of a family that verl supports, or add the missing processor files"
    detail = f"verl can't use the processor of {path}, so images would be lost: {reason}"
    return [Check("images", "error", detail, remedy)]
