# SPDX-License-Identifier: Apache-2.0
"""CLEVR counting problems (clevr_count_70k) to verl's parquet."""

from __future__ import annotations

import sys
from typing import Any

from verl_gndpo.conversion import Problem, Recipe, main


def problem(row: dict[str, Any]) -> Problem:
    return Problem(row["problem"], row["answer"], row["images"], answer_type="number")


RECIPE = Recipe(
    name="clevr_count",
    hub_id="BUAADreamer/clevr_count_70k",
    license="not stated (CLEVR itself: CC BY 4.0)",
    columns=("images", "problem", "answer"),
    problem=problem,
    answer_types=("number",),
    rows={"train": 70_000, "test": 200},
    download="10.5 GB",
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
