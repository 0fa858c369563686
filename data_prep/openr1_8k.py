# SPDX-License-Identifier: Apache-2.0
"""Multimodal Open-R1 8k (verified) to verl's parquet: the last <answer> of a solution holds the answer."""

from __future__ import annotations

import sys
from typing import Any

from verl_gndpo.conversion import Problem, Recipe, main, tagged_answer


def problem(row: dict[str, Any]) -> Problem:
    return Problem(row["problem"], tagged_answer(row["solution"]), row["image"])


RECIPE = Recipe(
    name="openr1_8k",
    hub_id="lmms-lab/multimodal-open-r1-8k-verified",
    license="not stated",
    columns=("image", "problem", "solution"),
    problem=problem,
    rows={"train": 7_690},
    download="377 MB",
    placeholders=False,
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
