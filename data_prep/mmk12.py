# SPDX-License-Identifier: Apache-2.0
"""MMK12 to verl's parquet: school problems; the train split asks for an answer, the test split for a choice."""

from __future__ import annotations

import re
import sys

if __package__:
    from data_prep._core import Problem, Recipe, main
else:  # as a plain script: this folder is on the path, its parent is not
    from _core import Problem, Recipe, main


def problem(row: dict) -> Problem:
    # Problems with several blanks have their answers on lines or between semicolons; some answers are whole proofs.
    parts = re.split(r"[\n;]+", row["answer"].strip()) if isinstance(row["answer"], str) else []
    several = len(parts) > 1 and all(len(part) <= 40 for part in parts)
    return Problem(
        question=row["question"],
        answer=row["answer"],
        images=row["image"],
        answer_type="list" if several else None,
        meta={"subject": row["subject"]},
    )


RECIPE = Recipe(
    name="mmk12",
    hub_id="FanqingM/MMK12",
    license="Apache-2.0",
    columns=("id", "question", "answer", "subject", "image"),
    problem=problem,
    placeholders=False,
    key=("id",),
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
