# SPDX-License-Identifier: Apache-2.0
"""Convert one row: check it, repair what has exactly one right repair, and write it in verl's schema."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from .errors import ConversionError, DroppedRow
from .images import ImageStore, Picture, image_bytes, image_entries, rgb_picture
from .matchable import is_matchable
from .prompt import Prompt
from .recipe import Recipe
from .split import SourceRow
from .text import (
    checked_text,
    listed_choices,
    place_images,
    plain_answer,
    plain_choices,
    split_choices,
    typed_answer,
    with_decimals,
)
from .videos import place_frames

# The Image feature makes `datasets` return decoded pictures to verl, as for files of verl's own recipe. "Sequence" is
# the only spelling of a list that both old and new versions of `datasets` read.
HF_METADATA = {"info": {"features": {"images": {"feature": {"_type": "Image"}, "_type": "Sequence"}}}}
# One schema for every data set: verl concatenates the files of `data.train_files`, and fails when their schemas differ.
SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [
                    ("split", pa.string()),
                    ("index", pa.int64()),
                    ("id", pa.string()),
                    ("answer", pa.string()),
                    ("question", pa.string()),
                    ("answer_type", pa.string()),
                    ("choices", pa.list_(pa.string())),
                    ("tolerance", pa.float64()),
                    ("unmatchable", pa.bool_()),
                    ("meta", pa.string()),
                ]
            ),
        ),
    ],
    metadata={"huggingface": json.dumps(HF_METADATA)},
)

UNMATCHABLE = "unmatchable: no natural form of the answer is graded right"
"""The note for a row that is usable for distillation, but not for grading, such as one whose answer is a proof."""


@dataclass
class ConvertedRow:
    """A row in verl's schema, with its part of the report.

    Args:
        values: the row, one value for each column of `SCHEMA`.
        pictures: its images, with sizes and pixel digests.
        repairs: kinds of repairs that were made.
        notes: kinds of faults that were left as they are.
    """

    values: dict[str, Any]
    pictures: list[Picture]
    repairs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _known(meta: dict[str, Any]) -> dict[str, Any]:
    """Return the entries that have a value. pandas writes NaN for a missing one, which JSON does not have."""
    return {key: value for key, value in meta.items() if value is not None and value == value}


def convert_row(row: SourceRow, split: str, recipe: Recipe, prompt: Prompt, images: ImageStore) -> ConvertedRow:
    """Convert a row to verl's schema (`SCHEMA`), with every image embedded.

    Raises:
        DroppedRow: the row has a fault without exactly one right repair.
        SourceError: an archive of images cannot be used.
        ConversionError: the converter gives the row an answer type that its recipe does not state.
    """
    if isinstance(row.values, DroppedRow):
        raise row.values
    problem = recipe.problem(row.values)
    repairs = ["id that an earlier row has"] if row.repeated else []
    question = checked_text(problem.question, "question").rstrip()
    choices = plain_choices(problem.choices)
    ground_truth, graded_as = typed_answer(plain_answer(problem.answer, repairs), choices, problem.answer_type)
    if graded_as not in recipe.answer_types:
        raise ConversionError(
            f"{recipe.row_id(split, row.key)} has the answer type {graded_as}, which is not among the recipe's "
            f"answer_types: {', '.join(recipe.answer_types)}."
        )
    if not choices and graded_as in ("choice", "multi_choice"):
        found = split_choices(question)
        # If the answer is a letter beyond the end of what looked like a list, that was not a list of choices.
        choices = found if max(ground_truth) < chr(ord("A") + len(found)) else ()
    unmatchable = not is_matchable(ground_truth, graded_as, list(choices), problem.tolerance)
    notes = [UNMATCHABLE] if unmatchable else []
    if problem.list_choices and choices:
        question = listed_choices(question, choices)
    if problem.tolerance:
        question = with_decimals(question, problem.tolerance)
    entries = image_entries(problem.images)
    if videos := image_entries(problem.videos):
        question, entries = place_frames(question, entries, videos, recipe.video_frames, images)
        repairs.append("video as images of its frames")
    question, entries = place_images(question, entries, repairs, recipe.placeholders)
    pictures = [rgb_picture(*image_bytes(entry, images, repairs), repairs) for entry in entries]
    values = {
        "data_source": recipe.hub_id,
        "prompt": prompt.messages(question),
        "images": [{"bytes": picture.data, "path": None} for picture in pictures],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {
            "split": split,
            "index": row.index,
            "id": recipe.row_id(split, row.key),
            "answer": str(problem.answer).strip(),
            "question": question,
            "answer_type": graded_as,
            "choices": list(choices),
            "tolerance": problem.tolerance,
            "unmatchable": unmatchable,
            "meta": json.dumps(_known(problem.meta), default=str),
        },
    }
    return ConvertedRow(values, pictures, list(dict.fromkeys(repairs)), notes)
