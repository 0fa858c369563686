# SPDX-License-Identifier: Apache-2.0
"""LogicVista to verl's parquet: reasoning tests; rows that are not flagged as licensed are dropped by default."""

from __future__ import annotations

import re
import sys
from typing import Any

from verl_gndpo.conversion import Problem, Recipe, main

LETTERS = re.compile(r"[A-Z](\s*[,;]\s*[A-Z])+")


def problem(row: dict[str, Any]) -> Problem:
    several = isinstance(row["answer"], str) and LETTERS.fullmatch(row["answer"].strip())
    return Problem(
        question=row["question"],
        answer=row["answer"],
        images=row["image"],
        answer_type="multi_choice" if several else None,
        meta={"skill": row["skill"]},
    )


def licensed(row: dict[str, Any]) -> bool:
    return str(row["liscenced"] or row["licensed"]).lower() == "true"  # the hub spells its column this way


RECIPE = Recipe(
    name="logicvista",
    hub_id="lscpku/LogicVista",
    license="Apache-2.0; 161 rows are flagged as licensed",
    columns=("id", "question", "answer", "image"),
    optional=("skill", "liscenced", "licensed"),
    problem=problem,
    rows={"test": 448},
    placeholders=False,
    key=("id",),
    splits=("test",),
    default_split="test",
    keep=licensed,
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
