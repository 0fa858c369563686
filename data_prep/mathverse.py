# SPDX-License-Identifier: Apache-2.0
"""MathVerse (testmini) to verl's parquet: each problem in several versions, from text-only hints to vision-only."""

from __future__ import annotations

import sys

if __package__:
    from data_prep._core import Problem, Recipe, main, split_choices
else:  # as a plain script: this folder is on the path, its parent is not
    from _core import Problem, Recipe, main, split_choices

IN_THE_PICTURE = "The problem is written in the picture. Solve it."


def problem(row: dict) -> Problem:
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
    placeholders=False,
    key=("sample_index",),
    splits=("testmini_text_only", "testmini"),
    default_splits=("testmini",),
    default_split="testmini",
    hub_config="testmini",
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
