# SPDX-License-Identifier: Apache-2.0
"""MathVerse (testmini) to verl's parquet: each problem in several versions, from text-dominant to vision-only."""

from __future__ import annotations

import sys
from typing import Any

from verl_gndpo.conversion import IN_THE_PICTURE, Problem, Recipe, main, split_choices


def problem(row: dict[str, Any]) -> Problem:
    question, choices = row["question"], tuple(row["choices"] or ())
    if row["problem_version"] == "Vision Only" and not (question or "").strip():
        question = IN_THE_PICTURE
    return Problem(
        question=question,
        answer=row["answer"],
        images=row["image"],
        choices=choices,
        list_choices=question != IN_THE_PICTURE and not split_choices(question or ""),
        meta={"problem_index": row["problem_index"], "problem_version": row["problem_version"]}
        | (row["metadata"] or {}),
    )


RECIPE = Recipe(
    name="mathverse",
    hub_id="AI4Math/MathVerse",
    license="MIT",
    columns=("sample_index", "problem_index", "problem_version", "question", "image", "answer"),
    optional=("choices", "metadata"),
    problem=problem,
    rows={"testmini": 3_940},
    download="167 MB",
    placeholders=False,
    key=("sample_index",),
    splits=("testmini_text_only", "testmini"),
    default_splits=("testmini",),
    default_split="testmini",
    hub_config="testmini",
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
