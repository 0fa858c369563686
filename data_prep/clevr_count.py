# SPDX-License-Identifier: Apache-2.0
"""CLEVR counting problems (clevr_count_70k) to verl's parquet."""

from __future__ import annotations

import sys

if __package__:
    from data_prep._core import Problem, Recipe, main
else:  # as a plain script: this folder is on the path, its parent is not
    from _core import Problem, Recipe, main


def problem(row: dict) -> Problem:
    return Problem(row["problem"], row["answer"], row["images"], answer_type="number")


RECIPE = Recipe(
    name="clevr_count",
    hub_id="BUAADreamer/clevr_count_70k",
    license="not stated (CLEVR itself: CC BY 4.0)",
    columns=("images", "problem", "answer"),
    problem=problem,
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
