# SPDX-License-Identifier: Apache-2.0
"""DynaMath to verl's parquet: 501 problems in ten variants, one a split. Don't train on one to test on another."""

from __future__ import annotations

import sys

if __package__:
    from data_prep._core import DroppedRow, Problem, Recipe, main
else:  # as a plain script: this folder is on the path, its parent is not
    from _core import DroppedRow, Problem, Recipe, main

KINDS = {"float": "number", "multiple choice": "choice", "text": "text"}


def problem(row: dict) -> Problem:
    if row["answer_type"] not in KINDS:
        raise DroppedRow("answer type is unknown", repr(row["answer_type"]))
    return Problem(
        question=row["question"],
        answer=row["ground_truth"],
        images=row["decoded_image"] or row["image"],
        answer_type=KINDS[row["answer_type"]],
        tolerance=1e-3 if row["answer_type"] == "float" else 0.0,
        meta={"subject": row["subject"], "level": row["knowledge_level"]},
    )


RECIPE = Recipe(
    name="dynamath",
    hub_id="DynaMath/DynaMath_Sample",
    license="Apache-2.0",
    columns=("id", "question", "ground_truth", "answer_type"),
    optional=("decoded_image", "image", "subject", "knowledge_level"),
    problem=problem,
    placeholders=False,
    key=("id",),
    splits=(r"sample_variant\d+", r"sample\d+"),
    # The hub's files are called sample3-00000-of-00003 and the like, one a split.
    aliases={f"sample{number}": f"sample_variant{number}" for number in range(1, 11)},
    numbered_shards=False,
    default_split="sample_variant1",
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
