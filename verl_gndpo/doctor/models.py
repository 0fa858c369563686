# SPDX-License-Identifier: Apache-2.0
"""Check the models of a run: student, teachers, and the processor of images."""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_gndpo.config import EVERY_SAMPLE, teacher_paths
from verl_gndpo.doctor.check import Check, Status, describe_error, select
from verl_gndpo.doctor.inputs import Inputs
from verl_gndpo.model_files import code_of

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
    if student is None:
        return checks, None
    checks += _check_chat_template(student, dict(config.data.get("apply_chat_template_kwargs") or {}))
    if student.is_multimodal:
        checks += _check_processor(inputs, model, student)
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
        try:
            checks += _compare_models(student, teacher, images)
        # A config may hold anything in the place of a size, and a tokenizer fail at a text.
        except Exception as error:
            detail = f"{student.name} and {teacher.name} can't be compared: {describe_error(error)}"
            checks.append(Check("teacher and student", "error", detail, "repair the folder, or choose another model"))
    try:
        check_sequence_parallel(teacher.config, select(config, "teacher.ulysses_sequence_parallel_size", 1))
    # Of a config without its sizes, too.
    except (ValueError, TypeError, AttributeError) as error:
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

    from verl_gndpo.doctor.compatibility import CodeNeeded, ModelNotFound, is_remote, read_model_files

    if is_remote(path):
        # The workers find the copy in the same cache. verl raises nothing if it can't copy.
        local = copy_to_local(path)
        if not os.path.isdir(local):
            detail = f"{path} can't be copied here, so it can't be compared with the other model"
            return Check(role, "error", detail, f"make it readable from here, or correct {key}"), None
        path = local
    try:
        files = read_model_files(path, role, trust_remote_code=trusted, tokenizer_path=tokenizer_path)
    except CodeNeeded as error:
        setting = f"{key.removesuffix('path')}trust_remote_code"
        remedy = f"read that code, and set ++{setting}=True to run it; or choose another model"
        return Check(role, "error", str(error), remedy), None
    except ModelNotFound as error:
        return Check(role, "error", str(error), f"correct {key}"), None
    if trusted and (code := code_of(Path(path))):
        named = ", ".join(sorted({name for classes in code.values() for name in classes}))
        return Check(role, "ok", f"{path}: {files.config.model_type}, runs code that comes with it: {named}"), files
    kind = "multimodal" if files.is_multimodal else "text-only"
    return Check(role, "ok", f"{path}: {files.config.model_type}, {kind}"), files


def _compare_models(student: "ModelFiles", teacher: "ModelFiles", images: int | None) -> list[Check]:
    """Return the differences between two models as findings.

    Args:
        images: number of training rows with images that the teacher scores; None if unknown.
    """
    from verl_gndpo.doctor.compatibility import compare

    checks = []
    names = teacher.name if teacher.name == student.name else f"{teacher.name} beside {student.name}"
    differences = compare(student, teacher, images)
    for difference in differences:
        status: Status = "error" if difference.fatal else "warning"
        checks.append(Check(difference.topic, status, f"{names}: {difference.detail}", difference.remedy))
    if not any(difference.fatal for difference in differences):
        sizes = f"vocabularies padded to {student.vocab_size} (student) and {teacher.vocab_size} (teacher)"
        same = ", same image patches" if student.is_multimodal and teacher.is_multimodal else ""
        detail = f"same {len(student.tokenizer)} tokens and special ids{same}; {sizes}"
        checks.append(Check("teacher and student", "ok", detail))
    return checks


def _check_chat_template(student: "ModelFiles", arguments: dict[str, Any]) -> list[Check]:
    """Check that the student's chat template can write a plain question.

    Args:
        arguments: `data.apply_chat_template_kwargs`.
    """
    question = [{"role": "user", "content": "?"}]
    try:
        student.tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False, **arguments)
    # A template may raise anything. There is none if tokenizer and processor have none.
    except Exception as error:
        detail = f"{student.name}: its chat template can't write a question: {describe_error(error)}"
        remedy = "repair chat_template.jinja, or chat_template in tokenizer_config.json; or choose a chat model"
        return [Check("chat template", "error", detail, remedy)]
    return []


def _check_processor(inputs: Inputs, model: Any, student: "ModelFiles") -> list[Check]:
    """Check that verl can use the student's processor. Without one it goes on, and no image reaches a model."""
    from verl.utils.tokenizer import hf_processor

    from verl_gndpo.teacher.trial import make_image_prompt

    path = model.get("tokenizer_path") or model.path
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        processor = hf_processor(path, trust_remote_code=model.trust_remote_code)
    if processor is not None:
        try:
            make_image_prompt(processor, student.config)
            return []
        # A processor raises whatever its settings lead to.
        except Exception as error:
            reason = describe_error(error)
            detail = f"the processor of {path} makes no prompt with images for the model: {reason}"
            remedy = "restore the files of tokenizer and processor, or choose another student"
    else:
        reason = "; ".join(str(w.message) for w in caught if "processor" in str(w.message))
        remedy = "choose a student of a family that verl supports, or add the missing processor files"
        detail = f"verl can't use the processor of {path}, so images would be lost: "
        detail += reason or "AutoProcessor finds none"
    rows = [inputs.rows_with_images(key) for key in ("train_files", "val_files")]
    if all(of_key is not None and not of_key for of_key in rows):
        return [Check("images", "ok", f"{detail}; no row has any")]
    known = any(rows)
    return [Check("images", "error" if known else "warning", detail, remedy if known else f"text only, or {remedy}")]
