# SPDX-License-Identifier: Apache-2.0
"""MathVista to verl's parquet, for validation only: its licence forbids training on it."""

from __future__ import annotations

import sys
from typing import Any

from verl_gndpo.conversion import DroppedRow, Problem, Recipe, main


def problem(row: dict[str, Any]) -> Problem:
    # Of two equal choices one is enough: the question lists what remains, with letters of its own.
    choices, answer, kind = tuple(dict.fromkeys(row["choices"] or ())), row["answer"], None
    if row["question_type"] == "multi_choice":
        if answer not in choices:
            raise DroppedRow("answer names no choice", f"{answer!r} is none of {len(choices)} choices")
        answer, kind = chr(ord("A") + choices.index(answer)), "choice"
    elif row["answer_type"] in ("integer", "float"):
        kind = "number"
    elif row["answer_type"] == "list":
        kind = "list"
    precision = float(row["precision"] or 0)  # NaN, which pandas writes for a missing value, is not above 0 either
    unit = f" (Unit: {row['unit']})" if row["unit"] else ""
    return Problem(
        question=row["question"] + unit if isinstance(row["question"], str) else row["question"],
        answer=answer,
        images=row["decoded_image"] or row["image"],
        choices=choices,
        list_choices=True,
        answer_type=kind,
        # An answer is correct if it rounds to the stated one at the stated number of decimals.
        tolerance=0.5 * 10 ** -int(precision) if kind == "number" and precision > 0 else 0.0,
        meta=row["metadata"] or {},
    )


RECIPE = Recipe(
    name="mathvista",
    hub_id="AI4Math/MathVista",
    license="CC BY-SA 4.0, for evaluation only",
    validation_only="its authors allow it for evaluation only, so use it only in data.val_files.",
    answer_types=("math", "number", "choice", "multi_choice", "list"),
    rows={"testmini": 1_000},
    columns=("pid", "question", "answer", "question_type", "answer_type"),
    optional=("decoded_image", "image", "choices", "unit", "precision", "metadata"),
    problem=problem,
    placeholders=False,
    key=("pid",),
    splits=("train", "testmini", "test"),
    # The test split's answers are not published.
    default_splits=("testmini",),
    default_split="testmini",
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
