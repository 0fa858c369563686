# SPDX-License-Identifier: Apache-2.0
"""DynaMath to verl's parquet: 501 problems in ten variants, one per split. Do not train on one and test on another."""

from __future__ import annotations

import sys
from typing import Any

from verl_gndpo.conversion import DroppedRow, Problem, Recipe, main
from verl_gndpo.conversion.text import is_formula

KINDS = {"float": "number", "int": "number", "integer": "number", "multiple choice": "choice", "text": "text"}


def problem(row: dict[str, Any]) -> Problem:
    if row["answer_type"] not in KINDS:
        raise DroppedRow("answer type is unknown", repr(row["answer_type"]))
    kind = KINDS[row["answer_type"]]
    if kind == "text" and is_formula(row["ground_truth"]):
        kind = "math"
    return Problem(
        question=row["question"],
        answer=row["ground_truth"],
        images=row["decoded_image"] or row["image"],
        answer_type=kind,
        tolerance=1e-3 if kind == "number" else 0.0,
        meta={"subject": row["subject"], "level": row["knowledge_level"]},
    )


RECIPE = Recipe(
    name="dynamath",
    hub_id="DynaMath/DynaMath_Sample",
    license="Apache-2.0",
    columns=("id", "question", "ground_truth", "answer_type"),
    optional=("decoded_image", "image", "subject", "knowledge_level"),
    problem=problem,
    answer_types=(*dict.fromkeys(KINDS.values()), "math"),
    rows={f"sample_variant{number}": 501 for number in range(1, 11)},
    download="183 MB",
    placeholders=False,
    key=("id",),
    splits=(r"sample_variant\d+", r"sample\d+"),
    # A file of the hub such as sample3-00000-of-00003 is a whole split.
    aliases={f"sample{number}": f"sample_variant{number}" for number in range(1, 11)},
    numbered_shards=False,
    default_split="sample_variant1",
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
