# SPDX-License-Identifier: Apache-2.0
"""Multimodal Open-R1 8k (verified) to verl's parquet: the answer stands in the last <answer> of a solution."""

from __future__ import annotations

import sys

if __package__:
    from data_prep._core import Problem, Recipe, main, tagged_answer
else:  # as a plain script: this folder is on the path, its parent is not
    from _core import Problem, Recipe, main, tagged_answer


def problem(row: dict) -> Problem:
    return Problem(row["problem"], tagged_answer(row["solution"]), row["image"])


RECIPE = Recipe(
    name="openr1_8k",
    hub_id="lmms-lab/multimodal-open-r1-8k-verified",
    license="not stated",
    columns=("image", "problem", "solution"),
    problem=problem,
    placeholders=False,
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
