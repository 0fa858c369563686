# SPDX-License-Identifier: Apache-2.0
"""Check the models of a run: student, teachers, and the processor of images."""

import os
import warnings
from typing import TYPE_CHECKING, Any

from verl_gndpo.config import EVERY_SAMPLE, teacher_paths
from verl_gndpo.doctor.check import Check, Status, select
from verl_gndpo.doctor.inputs import Inputs

if TYPE_CHECKING:
    from verl_gndpo.doctor.compatibility import ModelFiles


def check_models(inputs: Inputs) -> list[Check]:
    """Check that student and teachers exist, and that the teachers can score what the student writes.

    The section `teacher` may be invalid: a wrong path in it is reported in any case.
    """
    config = inputs.config
    checks, student = _check_student(inputs)
    seen = set()
    # `check_settings` reports a path that is not given.
    for key, model in teacher_paths(config).items():
        if model.path not in seen:
            seen.add(model.path)
            checks += _check_teacher(config, key, model, student, rows_with_images(inputs, model.path))
    return checks


def rows_with_images(inputs: Inputs, path: str) -> int | None:
    """Return how many training rows with images a teacher scores; None if unknown.

    Args:
        path: of the teacher. Teachers of invalid settings may score every row.
    """
    rows = inputs.rows_with_images("train_files")
    if rows is None:
        return None
    teacher = inputs.settings.teacher
    keys = (
        {key for model in teacher.teachers.values() if model.path == path for key in model.keys} if teacher else set()
    )
    return rows.total() if EVERY_SAMPLE in keys or not keys else sum(rows[key] for key in keys)


def _check_student(inputs: Inputs) -> tuple[list[Check], "ModelFiles | None"]:
    """Read the student's files, and check its processor and its LoRA adapters. The files are None if unreadable."""
    config = inputs.config
    model = config.actor_rollout_ref.model
    check, student = _read(
        "student", "actor_rollout_ref.model.path", model.path, model.trust_remote_code, model.get("tokenizer_path")
    )
    checks = [check]
    if student is not None and student.is_multimodal:
        checks += _check_processor(inputs, model)
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


def _check_teacher(config: Any, key: str, model: Any, student: "ModelFiles | None", images: int | None) -> list[Check]:
    """Read a teacher's files, and compare them with the student's.

    Args:
        key: setting that names the teacher, for messages.
        model: the section that describes it.
        student: None if the student can't be read.
        images: number of training rows with images that this teacher scores; None if unknown.
    """
    from verl_gndpo.teacher.sequence_parallel import check_sequence_parallel

    check, teacher = _read("teacher", key, model.path, bool(select(model, "trust_remote_code")))
    checks = [check]
    if teacher is None:
        return checks
    if student is not None:
        checks += _compare_models(student, teacher, images)
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


def _compare_models(student: "ModelFiles", teacher: "ModelFiles", images: int | None) -> list[Check]:
    """Return the differences between two models as findings.

    Args:
        images: number of training rows with images that the teacher scores; None if unknown.
    """
    from verl_gndpo.doctor.compatibility import compare

    checks = []
    differences = compare(student, teacher, images)
    for difference in differences:
        status: Status = "error" if difference.fatal else "warning"
        checks.append(Check(difference.topic, status, f"{teacher.name}: {difference.detail}", difference.remedy))
    if not any(difference.fatal for difference in differences):
        sizes = f"vocabularies padded to {student.vocab_size} (student) and {teacher.vocab_size} (teacher)"
        same = ", same image patches" if student.is_multimodal and teacher.is_multimodal else ""
        detail = f"same {len(student.tokenizer)} tokens and special ids{same}; {sizes}"
        checks.append(Check("teacher and student", "ok", detail))
    return checks


def _check_processor(inputs: Inputs, model: Any) -> list[Check]:
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
    rows = [inputs.rows_with_images(key) for key in ("train_files", "val_files")]
    if all(of_key is not None and not of_key for of_key in rows):
        return [Check("images", "ok", f"{detail}; no row has any")]
    known = any(rows)
    return [Check("images", "error" if known else "warning", detail, remedy if known else f"text only, or {remedy}")]
