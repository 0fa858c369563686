# SPDX-License-Identifier: Apache-2.0
"""Decide from two model folders whether a teacher can score a student's tokens. Loads no weights.

The teacher gets the student's own token ids and pixel values. Both models must therefore map ids to the same tokens and
cut images into the same patches. Other differences, such as the chat template, only mean that the teacher was trained
on somewhat different inputs.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants as hub

from verl_gndpo.doctor.check import describe_error
from verl_gndpo.export.folders import find_actor
from verl_gndpo.families import family_of
from verl_gndpo.model_files import (
    WEIGHT_FILES,
    DamagedModel,
    check_descriptions,
    code_of,
    read_object,
    shards_of,
)
from verl_gndpo.platforms import torchvision_ops

# Importing an image processor imports torchvision.
torchvision_ops.install()

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer  # noqa: E402

# Settings of a vision config that describe its input. Only models with images of one size have `image_size`.
VISION_KEYS = ("patch_size", "spatial_merge_size", "temporal_patch_size", "image_size", "in_channels")
# Settings of an image processor that determine the patches, their values and their number. A worker gets the student's
# pixels regardless of the last ones. But a teacher for other sizes was trained on other inputs, and a server cuts
# images itself.
IMAGE_KEYS = (
    "patch_size",
    "merge_size",
    "temporal_patch_size",
    "image_mean",
    "image_std",
    "do_normalize",
    "do_rescale",
    "rescale_factor",
    "size",
    "min_pixels",
    "max_pixels",
    "do_resize",
    "resample",
    "crop_to_patches",
    "min_patches",
    "max_patches",
)

# Texts on which tokenizers differ: words, digits, code, formulas, whitespace, other scripts, emoji.
PROBES = (
    "Find the measure of angle ABC. It is 42.5 degrees, isn't it?",
    "def f(x):\n\treturn {'a': x ** 2, \"b\": [1234567890]}\n\n\n",
    "$\\frac{\\sqrt{3}}{2} \\times 10^{-7} \\approx 0.000\\,000\\,087$ \\boxed{\\text{C}}",
    "  leading,   inner and trailing spaces   ",
    "图中三角形的面积是多少？ Größe, naïve, Ελληνικά, русский, عربى, हिन्दी 🙂👩‍🔬",
)


class ModelNotFound(ValueError):
    """A model folder or hub id is wrong or unreadable; the message says which and what to do."""


@dataclass(frozen=True)
class ModelFiles:
    """The parts of a model folder that describe the model's input."""

    name: str
    config: Any
    tokenizer: Any
    image_processor: Any | None
    """None for a text-only model."""

    @property
    def is_multimodal(self) -> bool:
        return self.vision is not None

    @property
    def vision(self) -> Any | None:
        """Return the part of the config that describes the vision tower; None for a text-only model."""
        return family_of(self.config).vision_config_of(self.config)

    @property
    def vocab_size(self) -> int:
        """Return the number of rows of the embedding: the tokenizer's length plus padding."""
        return self.config.get_text_config().vocab_size


@dataclass(frozen=True)
class Difference:
    """One difference between teacher and student."""

    topic: str
    """tokenizer, vocabulary, special tokens, images or chat template."""

    detail: str
    """The difference, with both values."""

    fatal: bool
    """True if scores would be wrong or impossible. Otherwise the teacher only fits less well."""

    remedy: str = ""
    """What to do about it; "" if there is nothing to do."""


ANOTHER_FAMILY = "choose a teacher of the student's family"


def is_remote(path: str) -> bool:
    """Return True if verl copies a path from another system (such as hdfs://), so that it can't be read here."""
    return re.match(r"[a-z][a-z0-9]*://", path) is not None


def check_model_folder(path: str, role: str) -> None:
    """Look for a config and complete weights, without asking a hub, where `path` is meant as a folder.

    A path is meant as a folder if one of that name exists or if it can't be a hub id ("model" or "organisation/model").

    Raises:
        ModelNotFound: no such folder, no config.json, a damaged description, no weights, or some of the weights
            missing.
    """
    if path.startswith("~"):
        raise ModelNotFound(
            f"{role} path {path}: nothing expands the ~ of a model path; write {os.path.expanduser(path)}"
        )
    if not os.path.exists(path):
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path):
            return
        raise ModelNotFound(f"{role} folder {path} does not exist")
    try:
        _check_parts(Path(path), role)
    except DamagedModel as error:
        raise ModelNotFound(f"{role} {error}") from error
    except OSError as error:
        raise ModelNotFound(f"{role} folder {path} can't be read: {error.strerror}: {error.filename}") from error


def _check_parts(folder: Path, role: str) -> None:
    """Check each part of a folder, as `check_model_folder` does.

    Raises:
        ModelNotFound, DamagedModel, OSError: a part is missing, damaged or not readable.
    """
    if not folder.is_dir():
        raise ModelNotFound(f"{role} path {folder} is a file; give the folder that holds config.json")
    if not (folder / "config.json").is_file():
        raise ModelNotFound(_describe_folder(folder, role))
    check_descriptions(folder)
    if not any(path for pattern in WEIGHT_FILES for path in folder.glob(pattern)):
        if find_actor(folder) is not None:
            raise ModelNotFound(_describe_folder(folder, role))
        raise ModelNotFound(f"{role} folder {folder} has a config.json but no weights ({' or '.join(WEIGHT_FILES)})")
    shards_of(folder)


def _describe_folder(folder: Path, role: str) -> str:
    """Say what a folder that is no whole model holds, and how it becomes one."""
    actor = find_actor(folder)
    if actor is not None:
        out = (actor.parent if actor.name == "actor" else actor) / "exported"
        return (
            f"{role} folder {folder} is a checkpoint of verl, which has to be exported: verl-gndpo export "
            f"{shlex.quote(str(folder))} --out {shlex.quote(str(out))}, and then give {out}"
        )
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = read_object(adapter).get("base_model_name_or_path") or "BASE"
        merge = (
            f"import peft, transformers as t; base, here = '{base}', '{folder}'; "
            "seeing = t.AutoModelForImageTextToText; config = t.AutoConfig.from_pretrained(base); "
            "kind = seeing if type(config) in seeing._model_mapping else t.AutoModelForCausalLM; "
            "peft.PeftModel.from_pretrained(kind.from_pretrained(base, dtype='auto'), here).merge_and_unload()"
            ".save_pretrained(here + '/merged'); "
            "t.AutoProcessor.from_pretrained(base).save_pretrained(here + '/merged')"
        )
        return (
            f"{role} folder {folder} holds LoRA adapters of {base}, which have to be merged into it: python -c "
            f'"{merge}", and then give {folder}/merged'
        )
    return f"{role} folder {folder} has no config.json, so it is not a Hugging Face model folder"


def read_model_files(
    path: str, role: str, *, trust_remote_code: bool = False, tokenizer_path: str | None = None
) -> ModelFiles:
    """Read config, tokenizer and image processor of a model.

    Args:
        path: folder or hub id.
        role: "student" or "teacher", for messages.
        tokenizer_path: where tokenizer and image processor are, if not in `path`.

    Raises:
        ModelNotFound: something is missing or can't be read.
    """
    check_model_folder(path, role)
    tokenizer_path = tokenizer_path or path
    part = "config"
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        part = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=trust_remote_code)
        # A tokenizer may be read and fail at the first text.
        if not tokenizer(PROBES[0], add_special_tokens=False)["input_ids"]:
            raise ValueError("it makes no tokens of a text")
        image_processor = None
        if family_of(config).vision_config_of(config) is not None:
            part = "image processor"
            image_processor = AutoImageProcessor.from_pretrained(tokenizer_path, trust_remote_code=trust_remote_code)
    # transformers raises whatever a malformed file leads to: KeyError, TypeError, json's and the hub's own errors.
    except Exception as error:
        where = path if part == "config" else tokenizer_path
        message = _cannot_read(role, part, where, error)
        code = {} if trust_remote_code else code_of(Path(where))
        if not code:
            raise ModelNotFound(message) from error
        named = "; ".join(f"{file}: {', '.join(classes)}" for file, classes in code.items())
        raise CodeNeeded(f"{message}. Its auto_map asks for code that comes with it ({named})") from error
    return ModelFiles(path, config, tokenizer, image_processor)


class CodeNeeded(ModelNotFound):
    """A model can't be read without running code that comes with it."""


def _cannot_read(role: str, part: str, path: str, error: Exception) -> str:
    message = f"{role} {path}: its {part} can't be read: {describe_error(error)}"
    if os.path.isdir(path):
        return message
    message += f"; there is no folder of that name here, so it was looked up as a hub id at {hub.ENDPOINT}"
    if hub.HF_HUB_OFFLINE:
        message += ", in the local cache only, because HF_HUB_OFFLINE is set"
    return message


def compare(student: ModelFiles, teacher: ModelFiles, images: int | None = None) -> list[Difference]:
    """Return all differences between the inputs of teacher and student.

    Vocabularies that are padded to different sizes are equal if both hold all of the tokenizer's tokens.

    Args:
        images: number of rows with images that the teacher scores; None if unknown. Without any, it does not matter how
            the models see images.
    """
    found = [
        *_compare_tokenizers(student, teacher),
        *_compare_vocabulary_sizes(student, teacher),
        *_compare_special_tokens(student, teacher),
        *(_compare_images(student, teacher, images) if images != 0 else ()),
        *_compare_chat_templates(student, teacher),
    ]
    return [
        replace(difference, remedy=ANOTHER_FAMILY) if difference.fatal and not difference.remedy else difference
        for difference in found
    ]


def _compare_tokenizers(student: ModelFiles, teacher: ModelFiles) -> Iterator[Difference]:
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    moved = sorted((i, token) for token, i in ours.items() if token in theirs and theirs[token] != i)
    missing = sorted((i, token) for token, i in ours.items() if token not in theirs)
    # Ids beyond the student's, which the student's text never holds, have no say in what its ids mean.
    added = sorted((i, token) for token, i in theirs.items() if token not in ours)
    if moved:
        i, token = moved[0]
        yield Difference(
            "tokenizer",
            f"{len(moved)} tokens have other ids, first {token!r}: student {i}, teacher {theirs[token]}",
            True,
        )
    if missing:
        i, token = missing[0]
        yield Difference(
            "tokenizer",
            f"{len(missing)} of the student's {len(ours)} tokens are not in the teacher's {len(theirs)}, "
            f"first {token!r} (id {i})",
            True,
        )
    if added and not (moved or missing):
        i, token = added[0]
        yield Difference(
            "tokenizer", f"the teacher has {len(added)} tokens that the student lacks, first {token!r} (id {i})", False
        )

    merges, their_merges = _merges(student.tokenizer), _merges(teacher.tokenizer)
    if merges is not None and their_merges is not None and merges != their_merges:
        n = next(
            (n for n, pair in enumerate(zip(merges, their_merges, strict=False)) if pair[0] != pair[1]),
            min(len(merges), len(their_merges)),
        )
        yield Difference(
            "tokenizer",
            f"the merges differ: student {len(merges)}, teacher {len(their_merges)}; "
            f"at {n}: student {_at(merges, n)}, teacher {_at(their_merges, n)}",
            True,
        )
    elif not (moved or missing):
        for text in PROBES:
            ids, their_ids = (x.tokenizer(text, add_special_tokens=False)["input_ids"] for x in (student, teacher))
            if ids != their_ids:
                yield Difference(
                    "tokenizer",
                    f"{text!r} becomes {len(ids)} tokens with the student's and {len(their_ids)} with the teacher's: "
                    f"{_from_first_difference(ids, their_ids)}",
                    True,
                )
                break


def _merges(tokenizer: Any) -> list | None:
    """Return the merges of a BPE tokenizer in order; None for another kind of tokenizer, or without a fast backend."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())["model"].get("merges")


def _at(merges: list, n: int) -> str:
    return repr(merges[n]) if n < len(merges) else "none"


def _from_first_difference(ids: list[int], their_ids: list[int]) -> str:
    n = next((n for n, (a, b) in enumerate(zip(ids, their_ids, strict=False)) if a != b), min(len(ids), len(their_ids)))
    return f"from position {n} on {ids[n : n + 4]} and {their_ids[n : n + 4]}"


def _compare_vocabulary_sizes(student: ModelFiles, teacher: ModelFiles) -> Iterator[Difference]:
    used = max(student.tokenizer.get_vocab().values()) + 1
    for role, model in (("student", student), ("teacher", teacher)):
        if model.vocab_size < used:
            yield Difference(
                "vocabulary",
                f"the {role}'s config has vocab_size={model.vocab_size}, the student's tokenizer ids up to {used - 1}",
                True,
            )
    if used <= teacher.vocab_size < student.vocab_size:
        yield Difference(
            "vocabulary",
            f"the student's vocabulary is padded to {student.vocab_size}, the teacher's to {teacher.vocab_size}: "
            f"if the student ever samples a padding id from {teacher.vocab_size} on, the teacher can't score it",
            False,
        )


def _compare_special_tokens(student: ModelFiles, teacher: ModelFiles) -> Iterator[Difference]:
    for role in ("eos", "bos", "pad"):
        a, b = (_token_id(model.tokenizer, role) for model in (student, teacher))
        if a != b:
            detail, remedy = f"{role}: student {a}, teacher {b}", ""
            if role == "eos":
                detail += (
                    ". The student ends each response with a token that the teacher hardly ever writes there, so one "
                    "token per response gets a large negative log-ratio"
                )
                remedy = (
                    f"set eos_token to {teacher.tokenizer.eos_token!r} in the student's tokenizer_config.json, and "
                    f"eos_token_id to {teacher.tokenizer.eos_token_id} in its config.json and generation_config.json; "
                    "or choose a teacher that ends its answers as the student does (a base model for a base model)"
                )
            # No padding is ever scored, and what comes before the prompt is in the student's ids.
            yield Difference("special tokens", detail, False, remedy)
    if student.is_multimodal and teacher.is_multimodal:
        families = [family_of(model.config) for model in (student, teacher)]
        for key in dict.fromkeys(key for family in families for key in family.id_attributes):
            own, other = (getattr(model.config, key, None) for model in (student, teacher))
            if own != other:
                yield Difference("special tokens", f"config.{key}: student {own}, teacher {other}", True)


def _token_id(tokenizer: Any, role: str) -> str:
    token = getattr(tokenizer, f"{role}_token")
    return "none" if token is None else f"{token!r} ({getattr(tokenizer, f'{role}_token_id')})"


def _compare_images(student: ModelFiles, teacher: ModelFiles, images: int | None) -> Iterator[Difference]:
    if student.is_multimodal and not teacher.is_multimodal:
        detail = "the student sees images, the teacher is a text-only model"
        if images is None:
            yield Difference("images", f"{detail}; a row with images would stop the run", False)
            return
        remedy = "choose a teacher that sees images, or give these rows to another one (teacher.models.<name>.keys)"
        yield Difference("images", f"{detail}, and {images} training rows that it scores have images", True, remedy)
        return
    if not student.is_multimodal:
        return
    if student.config.model_type != teacher.config.model_type:
        yield Difference(
            "images",
            f"another model type: student {student.config.model_type}, teacher {teacher.config.model_type}; "
            "the teacher gets the student's pixel values and position ids",
            False,
        )
    for key in VISION_KEYS:
        a, b = (getattr(model.vision, key, None) for model in (student, teacher))
        if a != b:
            where = f"config.{family_of(student.config).vision_attribute}.{key}"
            yield Difference("images", f"{where}: student {a}, teacher {b}", True)
    for key in IMAGE_KEYS:
        a, b = (_plain(getattr(model.image_processor, key, None)) for model in (student, teacher))
        if a != b:
            remedy = f"{ANOTHER_FAMILY}, or copy the student's image processor settings into the teacher's folder"
            yield Difference("images", f"image processor's {key}: student {a}, teacher {b}", True, remedy)


def _plain(value: Any) -> Any:
    """Return a setting in the form that JSON has, from any of transformers' classes."""
    if isinstance(value, tuple):
        return list(value)
    # SizeDict is a mapping-like dataclass that lists the fields of every kind of size.
    if hasattr(value, "items"):
        return {k: v for k, v in value.items() if v is not None}
    return value


def _compare_chat_templates(student: ModelFiles, teacher: ModelFiles) -> Iterator[Difference]:
    if student.tokenizer.chat_template != teacher.tokenizer.chat_template:
        yield Difference(
            "chat template",
            "the chat templates differ; the teacher scores prompts in the student's, which may not be what it was "
            "trained with",
            False,
        )
