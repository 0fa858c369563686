# SPDX-License-Identifier: Apache-2.0
"""GEOQA_R1V_Train_8K to verl's parquet: geometry problems with the answer in <answer> </answer>."""

from __future__ import annotations

import sys

if __package__:
    from data_prep._core import Problem, Recipe, main, tagged_answer
else:  # as a plain script: this folder is on the path, its parent is not
    from _core import Problem, Recipe, main, tagged_answer


def problem(row: dict) -> Problem:
    return Problem(row["problem"], tagged_answer(row["solution"]), row["image"])


RECIPE = Recipe(
    name="geoqa",
    hub_id="leonardPKU/GEOQA_R1V_Train_8K",
    license="not stated",
    columns=("image", "problem", "solution"),
    problem=problem,
    placeholders=False,
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
