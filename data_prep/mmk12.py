# SPDX-License-Identifier: Apache-2.0
"""MMK12 to verl's parquet: school problems; the train split asks for an answer, the test split for a choice."""

from __future__ import annotations

import re
import sys
from typing import Any

from verl_gndpo.conversion import Problem, Recipe, main


def problem(row: dict[str, Any]) -> Problem:
    # Lines or semicolons separate the answers of a problem with several blanks. Some answers are whole proofs.
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
    answer_types=("math", "choice", "multi_choice", "list"),
    rows={"train": 15_616, "test": 2_000},
    download="1.4 GB",
    placeholders=False,
    key=("id",),
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
