# SPDX-License-Identifier: Apache-2.0
"""We-Math to verl's parquet: multiple choice, each problem also in its steps."""

from __future__ import annotations

import sys

if __package__:
    from data_prep._core import Problem, Recipe, main, split_choices
else:  # as a plain script: this folder is on the path, its parent is not
    from _core import Problem, Recipe, main, split_choices


def problem(row: dict) -> Problem:
    return Problem(
        question=row["question"],
        answer=row["answer"],
        images=row["image_path"],
        choices=split_choices(row["option"] or ""),
        list_choices=True,
        answer_type="choice",
        meta={"key": row["key"], "concept": row["knowledge concept"]},
    )


RECIPE = Recipe(
    name="wemath",
    hub_id="We-Math/We-Math",
    license="CC BY-NC 4.0",
    columns=("ID", "key", "question", "option", "answer", "image_path"),
    optional=("knowledge concept",),
    problem=problem,
    placeholders=False,
    # The steps of one problem share its ID.
    key=("ID", "key"),
    splits=("testmini",),
    default_split="testmini",
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
