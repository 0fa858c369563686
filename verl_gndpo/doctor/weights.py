# SPDX-License-Identifier: Apache-2.0
"""Check that the weights of student and teachers are whole and fit their configs. Reads the headers of the files only.

transformers gives random values to what a checkpoint lacks, with a warning that is lost among others.
"""

import contextlib
import copy
from pathlib import Path
from typing import Any

from verl_gndpo.config import teacher_paths
from verl_gndpo.doctor.check import Check, describe_error, select
from verl_gndpo.doctor.inputs import Inputs
from verl_gndpo.model_files import INDEX, MODEL, WEIGHT_FILES, DamagedModel, check_descriptions, shards_of

Shapes = dict[str, tuple[str, list[int]]]
"""Type, as safetensors names it, and shape of each weight."""

COPY_AGAIN = "copy the model again, or choose another"


def check_weights(inputs: Inputs) -> list[Check]:
    """Check the weights of each model that is a folder here."""
    student = inputs.config.actor_rollout_ref.model
    models = {student.path: ("student", bool(student.get("trust_remote_code")))}
    for model in teacher_paths(inputs.config).values():
        models.setdefault(model.path, ("teacher", bool(select(model, "trust_remote_code"))))
    return [
        check
        for path, (role, trusted) in models.items()
        # `check_models` reports a folder without a config, and one whose files are missing.
        if isinstance(path, str) and (Path(path) / "config.json").is_file()
        for check in _check_folder(Path(path), role, trusted)
    ]


def _check_folder(folder: Path, role: str, trusted: bool) -> list[Check]:
    # `check_models` reports a config that is damaged, or from which no model can be built.
    with contextlib.suppress(DamagedModel):
        check_descriptions(folder)
        return _check_files(folder, role, trusted)
    return []


def _check_files(folder: Path, role: str, trusted: bool) -> list[Check]:
    try:
        shapes = _read_shapes(folder)
    except DamagedModel as error:
        return [Check(role, "error", str(error), COPY_AGAIN)]
    if shapes is None:
        return []
    try:
        return _compare(folder, role, shapes, trusted)
    # transformers raises whatever a config leads to. `check_models` and `check_architectures` report it.
    except Exception as error:
        return [
            Check(role, "warning", f"{folder}: its weights are not compared with its config: {describe_error(error)}")
        ]


def _read_shapes(folder: Path) -> Shapes | None:
    """Return the shapes of the weights that transformers would load; None if they are not in safetensors.

    Raises:
        DamagedModel: a file is damaged or cut off, or lacks a weight that an index looks for there.
    """
    shapes = {}
    for pattern in WEIGHT_FILES:
        for path in sorted(folder.glob(pattern)):
            shapes[path.name] = _read_header(path)
    shards = shards_of(folder)
    for name, shard in shards.items():
        if shard.endswith(".safetensors") and name not in shapes[shard]:
            raise DamagedModel(f"{folder / shard} lacks {name}, for which the index names it")
    if MODEL in shapes:
        return shapes[MODEL]
    if not (folder / INDEX).is_file():
        return None
    return {name: found for shard in set(shards.values()) for name, found in shapes[shard].items()}


def _read_header(path: Path) -> Shapes:
    """Return the shapes in a file of weights; empty if it is not safetensors, whose content nothing describes."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DamagedModel(f"{path} is no file")
    try:
        if path.stat().st_size == 0:
            raise DamagedModel(f"{path} is empty")
        if path.suffix != ".safetensors":
            return {}
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise DamagedModel(f"{path} is damaged or cut off: {error}") from error


def _compare(folder: Path, role: str, shapes: Shapes, trusted: bool) -> list[Check]:
    """Let transformers match the weights with the model of the config, names and all, without reading any."""
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging
    from verl.utils.model import get_hf_auto_model_class

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    model_class = get_hf_auto_model_class(config)._model_mapping.get(type(config), None)
    if model_class is None or getattr(config, "quantization_config", None):
        # A checkpoint's own classes, and packed weights, don't have the shapes of their config.
        return []
    weights = {name: torch.empty(shape, device="meta") for name, (_, shape) in shapes.items()}
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with contextlib.suppress(AttributeError):
            config = copy.deepcopy(config)
            config._attn_implementation = "eager"
        _, loading = model_class.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
    return _report(folder, role, loading)


def _report(folder: Path, role: str, loading: Any) -> list[Check]:
    def check(status: Any, count: int, what: str, first: str) -> Check:
        more = f" and {count - 1} more" if count > 1 else ""
        detail = f"{folder}: the weights don't fit config.json: {what} {first}{more}"
        return Check(role, status, detail, "give the weights and the config of the same model")

    found = []
    mismatched = sorted(loading["mismatched_keys"], key=lambda entry: entry[0])
    if mismatched:
        name, given, wanted = mismatched[0]
        first = f"{name} is {list(given)}, and the config says {list(wanted)}"
        found.append(check("error", len(mismatched), "", first))
    missing, left = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    if missing:
        what = "transformers would give random values to what is missing,"
        found.append(check("error", len(missing), what, missing[0]))
    if left:
        found.append(check("warning", len(left), "nothing uses", left[0]))
    return found or [Check(role, "ok", f"{folder}: the weights fit the config")]
