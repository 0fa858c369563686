# SPDX-License-Identifier: Apache-2.0
"""Check that the architecture of each teacher can be scored, by scoring with a small model of it."""

from typing import Any

from verl_gndpo.config import Teacher
from verl_gndpo.doctor.check import Check, select
from verl_gndpo.doctor.inputs import Inputs
from verl_gndpo.doctor.models import rows_with_images

OTHER_TEACHER = "choose another teacher, or teacher.backend=server, where the rollout engine runs it"


def check_architectures(inputs: Inputs) -> list[Check]:
    """Score with a small model of each teacher, as the workers do before they load the real one."""
    teacher = inputs.settings.teacher
    if teacher is None or teacher.backend == "server":
        return []
    checks = []
    seen = set()
    for model in teacher.teachers.values():
        key = (model.path, str(model.override_config))
        if key not in seen:
            seen.add(key)
            checks += _check_architecture(inputs, model)
    return checks


def _check_architecture(inputs: Inputs, model: Teacher) -> list[Check]:
    from verl_gndpo.doctor.compatibility import ModelNotFound, check_model_folder, is_remote
    from verl_gndpo.teacher.architecture import model_config

    def error(detail: str, remedy: str) -> list[Check]:
        return [Check("teacher", "error", f"{model.path}: {detail}", remedy)]

    try:
        if not is_remote(model.path):
            check_model_folder(model.path, "teacher")
    # `check_models` reports it.
    except ModelNotFound:
        return []
    try:
        verl_config = model_config(model)
    # verl and transformers raise whatever a config leads to.
    except Exception as problem:
        from verl_gndpo.doctor.check import describe_error

        return error(f"verl can't read its config: {describe_error(problem)}", "repair the folder, or choose another")
    return _try(inputs, model, verl_config, error)


def _try(inputs: Inputs, model: Teacher, verl_config: Any, error: Any) -> list[Check]:
    from verl_gndpo.teacher.architecture import try_teacher, why_attention_is_refused, why_weights_are_refused
    from verl_gndpo.teacher.trial import NotTriedError, TrialError

    teacher = inputs.settings.teacher
    assert teacher is not None
    config = verl_config.hf_config
    refused = why_weights_are_refused(config)
    if refused is not None:
        return error(refused, f"the checkpoint that it was quantized from; or {OTHER_TEACHER}")
    refused = why_attention_is_refused(config, model.trust_remote_code)
    if refused is not None:
        section = "model" if not select(inputs.config, "teacher.models") else "models.<name>"
        remedy = f"++teacher.{section}.override_config.attn_implementation=sdpa, or eager"
        return error(f"transformers refuses its attention: {refused}", remedy)
    images = rows_with_images(inputs, model.path)
    options: dict[str, Any] = {"sharing": teacher.sharing, "trust_remote_code": model.trust_remote_code}
    try:
        try:
            verdict = try_teacher(config, verl_config.local_path, images=images != 0, **options)
        except NotTriedError:
            raise
        except TrialError as problem:
            if images or images == 0:
                raise
            verdict = try_teacher(config, verl_config.local_path, images=False, **options)
            detail = f"{model.path}: rows with images, of which nothing is known here, can't be scored: {problem}"
            return [Check("teacher", "warning", detail, OTHER_TEACHER)]
    except NotTriedError as problem:
        detail = f"{model.path}: not tried before the run, whose self-check remains: {problem}"
        return [Check("teacher", "warning", detail)]
    except TrialError as problem:
        remedy = OTHER_TEACHER if teacher.sharing == "auto" else f"teacher.sharing=auto; or {OTHER_TEACHER}"
        return error(f"a small model of it can't be scored: {problem}", remedy)
    size = teacher.ulysses_sequence_parallel_size
    if size > 1 and verdict.sharing != "attention":
        detail = f"teacher.ulysses_sequence_parallel_size={size} needs prompts shared through attention, but {verdict}"
        return error(detail, "teacher.ulysses_sequence_parallel_size=1")
    return [Check("teacher", "ok", f"{model.path}: {verdict}")]
