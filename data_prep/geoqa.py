# SPDX-License-Identifier: Apache-2.0
"""GEOQA_R1V_Train_8K to verl's parquet: geometry problems with the answer in <answer> </answer>."""

from __future__ import annotations

import sys
from typing import Any

from verl_gndpo.conversion import Problem, Recipe, main, tagged_answer


def problem(row: dict[str, Any]) -> Problem:
    return Problem(row["problem"], tagged_answer(row["solution"]), row["image"])


RECIPE = Recipe(
    name="geoqa",
    hub_id="leonardPKU/GEOQA_R1V_Train_8K",
    license="not stated",
    columns=("image", "problem", "solution"),
    problem=problem,
    rows={"train": 8_031},
    placeholders=False,
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
