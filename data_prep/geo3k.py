# SPDX-License-Identifier: Apache-2.0
"""Geometry3K to verl's parquet, from the hub or from a local copy.

    python data_prep/geo3k.py --local_save_dir ~/data/geo3k
    python data_prep/geo3k.py --local_dataset_path PATH --local_save_dir ~/data/geo3k

A local copy is a parquet file, a folder of them (train*, validation*, test*), a `save_to_disk` folder, or the folders
of InterGPS, the data set's origin: {train,val,test}/<number>/{data.json, img_diagram.png}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from verl_gndpo.conversion import (
    IMAGE_PLACEHOLDER,
    DroppedRow,
    ImageStore,
    Problem,
    Recipe,
    SourceError,
    SourceRow,
    Split,
    main,
)

INTERGPS_SPLITS = ("train", "val", "test")
INTERGPS_PARENTS = ("", "data", "geometry3k", "data/geometry3k")


def open_intergps(folder: Path) -> list[Split] | None:
    """Return the splits of InterGPS's layout in `folder` or where its repository keeps it; None for another layout.

    Raises:
        SourceError: the folder holds the archives, not yet unpacked.
    """
    for parent in INTERGPS_PARENTS:
        root = folder / parent
        problems = {name: _problem_folders(root / name) for name in INTERGPS_SPLITS}
        if any((problem / "data.json").is_file() for found in problems.values() for problem in found):
            return [_intergps_split(name, found, root) for name, found in problems.items() if (root / name).is_dir()]
        if zipped := [f"{name}.zip" for name in INTERGPS_SPLITS if (root / f"{name}.zip").is_file()]:
            raise SourceError(f"{root} holds {', '.join(zipped)} still packed: unzip them there first.")
    return None


def _problem_folders(split: Path) -> list[Path]:
    if not split.is_dir():
        return []
    # Numeric order: the ids must not depend on how a file system lists a folder.
    return sorted(
        (entry for entry in split.iterdir() if entry.is_dir() and not entry.name.startswith((".", "_"))),
        key=lambda entry: (0, int(entry.name), "") if entry.name.isdecimal() else (1, 0, entry.name),
    )


def _intergps_split(name: str, problems: list[Path], root: Path) -> Split:
    split = RECIPE.aliases.get(name, name)

    def rows() -> Iterator[SourceRow]:
        values: dict[str, Any] | DroppedRow
        for position, folder in enumerate(problems):
            index = int(folder.name) if folder.name.isdecimal() else position
            try:
                values = _intergps_row(folder)
            except DroppedRow as dropped:
                values = dropped
            yield SourceRow(index, folder.name, values)

    return Split(split, len(problems), rows, ImageStore([root / name]), (root / name).resolve())


def _intergps_row(folder: Path) -> dict[str, Any]:
    """Return the row in the form of hiyouga/geometry3k: annotated text, clean diagram, text of the right choice."""
    try:
        record = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DroppedRow("data.json is unreadable", f"{type(error).__name__}: {error}") from error
    if not isinstance(record, dict):
        raise DroppedRow("data.json is unreadable", f"it holds a {type(record).__name__}")
    question = record.get("annotat_text") or record.get("problem_text")
    if isinstance(question, str) and question.strip():
        question = IMAGE_PLACEHOLDER + question
    return {"problem": question, "answer": _chosen_text(record), "images": [f"{folder.name}/img_diagram.png"]}


def _chosen_text(record: dict[str, Any]) -> object:
    letter, choices = record.get("answer"), record.get("choices")
    if letter is None or letter == "":
        return None
    choices = choices if isinstance(choices, list) else []
    if not isinstance(letter, str) or len(letter) != 1 or not 0 <= ord(letter) - ord("A") < len(choices):
        raise DroppedRow("answer names no choice", f"answer {letter!r}, {len(choices)} choices")
    return choices[ord(letter) - ord("A")]


def problem(row: dict[str, Any]) -> Problem:
    return Problem(row["problem"], row["answer"], row["images"])


RECIPE = Recipe(
    name="geo3k",
    hub_id="hiyouga/geometry3k",
    license="MIT",
    columns=("problem", "images", "answer"),
    problem=problem,
    rows={"train": 2_101, "validation": 300, "test": 601},
    download="61 MB",
    id_prefix="geometry3k",
    open_folder=open_intergps,
)


if __name__ == "__main__":
    sys.exit(main(RECIPE, __doc__))
