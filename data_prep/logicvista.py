# SPDX-License-Identifier: Apache-2.0
"""LogicVista to verl's parquet: reasoning tests; rows that are not flagged as licensed stay out by default."""

from __future__ import annotations

import re
import sys

if __package__:
    from data_prep._core import Problem, Recipe, main
else:  # as a plain script: this folder is on the path, its parent is not
    from _core import Problem, Recipe, main

LETTERS = re.compile(r"[A-J](\s*[,;]\s*[A-J])+")


def problem(row: dict) -> Problem:
    several = isinstance(row["answer"], str) and LETTERS.fullmatch(row["answer"].strip())
    return Problem(
        question=row["question"],
        answer=row["answer"],
        images=row["image"],
        answer_type="multi_choice" if several else None,
        meta={"skill": row["skill"]},
    )


def licensed(row: dict) -> bool:
    return str(row["liscenced"] or row["licensed"]).lower() == "true"  # the hub's column is spelt so


RECIPE = Recipe(
    name="logicvista",
    hub_id="lscpku/LogicVista",
    license="Apache-2.0; rows carry a flag of their own",
    columns=("id", "question", "answer", "image"),
    optional=("skill", "liscenced", "licensed"),
    problem=problem,
    placeholders=False,
    key=("id",),
    splits=("test",),
    default_split="test",
    keep=licensed,
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
