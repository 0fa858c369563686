# SPDX-License-Identifier: Apache-2.0
"""What a run needs of its models: student, teachers and the processor of images."""

import os
import warnings
from typing import Any

from verl_gndpo.doctor.check import Check, select


def check_models(config: Any) -> list[Check]:
    """Student and teachers exist, and the teachers can score what the student writes."""
    from verl.utils.fs import copy_to_local

    from verl_gndpo.doctor.compatibility import ModelFiles, ModelNotFound, is_remote, read_model_files
    from verl_gndpo.teacher.sequence_parallel import check_sequence_parallel

    checks: list[Check] = []

    def read(role: str, key: str, path: str, trusted: bool, tokenizer_path: str | None = None) -> ModelFiles | None:
        if is_remote(path):
            # As verl does in the workers, which find it in the same cache. It raises nothing if it fails.
            local = copy_to_local(path)
            if not os.path.isdir(local):
                detail = f"{path} can't be copied here, so it can't be compared with the other model"
                checks.append(Check(role, "error", detail, f"make it readable from here, or correct {key}"))
                return None
            path = local
        try:
            files = read_model_files(path, role, trust_remote_code=trusted, tokenizer_path=tokenizer_path)
        except ModelNotFound as error:
            checks.append(Check(role, "error", str(error), f"correct {key}"))
            return None
        kind = "multimodal" if files.is_multimodal else "text-only"
        checks.append(Check(role, "ok", f"{path}: {files.config.model_type}, {kind}"))
        return files

    model = config.actor_rollout_ref.model
    student = read(
        "student", "actor_rollout_ref.model.path", model.path, model.trust_remote_code, model.get("tokenizer_path")
    )
    if student is not None and student.is_multimodal:
        checks += _check_processor(model)
        frozen = select(config, "actor_rollout_ref.actor.freeze_vision_tower")
        as_adapters = model.get("lora_rank") and not select(model, "lora.merge")
        if as_adapters and not model.get("exclude_modules"):
            if frozen:
                detail = "LoRA trains the language model only: vLLM would ignore adapters in the projector"
                remedy = "actor_rollout_ref.model.lora.merge=True trains a projector outside the vision tower, too"
                checks.append(Check("student", "ok", detail, remedy))
            else:
                detail = "LoRA adapters in the vision tower and the projector are trained, but vLLM ignores them"
                remedy = "actor_rollout_ref.actor.freeze_vision_tower=True, or actor_rollout_ref.model.exclude_modules"
                checks.append(Check("student", "warning", detail, remedy))
    # A missing path is check_settings' to report; a wrong one is of interest whatever else is wrong with the section.
    sections = {"teacher.model": select(config, "teacher.model")}
    sections |= {f"teacher.models.{name}": model for name, model in (select(config, "teacher.models") or {}).items()}
    seen = set()
    for section, model in sections.items():
        path = select(model, "path")
        if not path or path in seen:
            continue
        seen.add(path)
        teacher = read("teacher", f"{section}.path", path, bool(select(model, "trust_remote_code")))
        if student is not None and teacher is not None:
            checks += _compare_models(student, teacher)
        if teacher is not None:
            try:
                check_sequence_parallel(teacher.config, select(config, "teacher.ulysses_sequence_parallel_size", 1))
            except ValueError as error:
                remedy = "another teacher.ulysses_sequence_parallel_size"
                checks.append(Check("teacher", "error", f"{path}: {error}", remedy))
    return checks


def _compare_models(student: Any, teacher: Any) -> list[Check]:
    """`compatibility.compare` of two models' files, as findings."""
    from verl_gndpo.doctor.compatibility import compare

    checks = []
    differences = compare(student, teacher)
    for difference in differences:
        remedy = "choose a teacher of the student's family" if difference.fatal else ""
        if difference.fatal and difference.detail.startswith("image processor"):
            remedy += ", or copy the student's image processor settings into the teacher's folder"
        status = "error" if difference.fatal else "warning"
        checks.append(Check(difference.topic, status, difference.detail, remedy))
    if not any(difference.fatal for difference in differences):
        sizes = f"vocabularies padded to {student.vocab_size} (student) and {teacher.vocab_size} (teacher)"
        images = ", same image patches" if student.is_multimodal else ""
        detail = f"same {len(student.tokenizer)} tokens and special ids{images}; {sizes}"
        checks.append(Check("teacher and student", "ok", detail))
    return checks


def _check_processor(model: Any) -> list[Check]:
    """verl makes do without a processor that it can't use, and then no image reaches a model."""
    from verl.utils.tokenizer import hf_processor

    path = model.get("tokenizer_path") or model.path
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        processor = hf_processor(path, trust_remote_code=model.trust_remote_code)
    if processor is not None:
        return []
    said = "; ".join(str(w.message) for w in caught if "processor" in str(w.message)) or "AutoProcessor finds none"
    remedy = "choose a student of a family that verl knows, or add the missing processor files"
    detail = f"verl can't use the processor of {path}, so images would be lost: {said}"
    return [Check("images", "error", detail, remedy)]
