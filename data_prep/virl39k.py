# SPDX-License-Identifier: Apache-2.0
"""ViRL39K to verl's parquet: a collection from many sources, with its images in a zip archive."""

from __future__ import annotations

import sys
from typing import Any

from verl_gndpo.conversion import Problem, Recipe, main


def problem(row: dict[str, Any]) -> Problem:
    return Problem(
        question=row["question"],
        answer=row["answer"],
        images=row["image"],
        meta={name: row[name] for name in ("category", "source", "PassRate_32BTrained", "PassRate_7BBase")},
    )


RECIPE = Recipe(
    name="virl39k",
    hub_id="TIGER-Lab/ViRL39K",
    license="MIT",
    columns=("qid", "question", "answer", "image"),
    optional=("category", "source", "PassRate_32BTrained", "PassRate_7BBase"),
    problem=problem,
    rows={"train": 38_870},
    download="about 1.8 GB",
    key=("qid",),
    # datasets.load_dataset mistakes images.zip for the data.
    hub_files=("39Krelease.parquet", "images.zip"),
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
