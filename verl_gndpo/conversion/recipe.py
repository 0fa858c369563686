# SPDX-License-Identifier: Apache-2.0
"""The declaration of a data set, and the form of one of its problems before the checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_gndpo.data_facts import SetFacts
from verl_gndpo.rewards.answer_types import ANSWER_TYPES

from .split import Split

INFERRED_TYPES = ("math", "choice", "multi_choice")
"""The answer types that `text.typed_answer` can infer from an answer."""


@dataclass(frozen=True)
class Problem:
    """One problem in the words of its source; nothing about it has been checked.

    Args:
        question: text, with or without placeholders (`<image>`, `<image1>`).
        answer: text, or a number.
        images: None, one or a list; each is `{"bytes": ..., "path": ...}`, bytes, or a path in the source.
        choices: texts of the choices A, B, C, ..., for the grader; empty when only the picture shows them.
        list_choices: write the choices below the question, because the question does not name them.
        answer_type: one of the recipe's `answer_types`. None infers it: a letter is a choice, anything else is math.
        tolerance: largest absolute error of a correct number; 0.0 leaves it to the grader.
        meta: further columns worth keeping, such as the subject; they become JSON in `extra_info.meta`.
        videos: None, one or a list, each as an image is given. Each `<video>` becomes an `<image>` for each of the
            recipe's `video_frames`.
    """

    question: object
    answer: object
    images: object
    choices: tuple[str, ...] = ()
    list_choices: bool = False
    answer_type: str | None = None
    tolerance: float = 0.0
    meta: dict[str, Any] = field(default_factory=dict)
    videos: object = None


@dataclass(frozen=True)
class Recipe:
    """The only declaration of a data set: its facts, and how to read it.

    Args:
        name: name of the converter, and of the folder under ~/data.
        hub_id: source when none is given; also verl's `data_source`, which selects the reward.
        license: licence of the set, as its authors state it.
        columns: required columns; a source without one of them is refused.
        problem: turns a row into a problem. It may raise DroppedRow.
        optional: columns that some copies of the set lack; a row holds None for them.
        answer_types: answer types that its rows can have.
        validation_only: why no model may be trained on the set; "" when training is allowed.
        rows: number of rows of each split on the hub, for the table of data sets.
        download: size of the download, such as "61 MB", for the same table; "" when unknown.
        placeholders: True when the questions hold placeholders; otherwise images go before the question.
        key: columns that make up the source's own row ids; without them rows are numbered.
        id_prefix: first part of the row ids; defaults to `name`.
        splits: regular expressions that the names of the splits' files start with, a longer one before its prefix.
        aliases: maps names of splits in the source to names of splits in the output.
        numbered_shards: True when "-00000-of-00003" in a file's name counts the files of the split.
        default_splits: splits to convert without `--split`; empty for all.
        default_split: split of a file whose name states none.
        hub_config: configuration of the hub data set, where it has several.
        hub_files: patterns of the files to fetch from the hub, for sets that `datasets.load_dataset` cannot read.
        keep: returns whether a row's licence allows its use; `--include_unlicensed` keeps all rows.
        video_frames: number of images that a video becomes: its first and last frame, and others at equal distances.
        open_folder: reads the data set's own layout; returns None for a folder in another layout.

    Raises:
        ValueError: an answer type that no grader has, or `video_frames` below 1.
    """

    name: str
    hub_id: str
    license: str
    columns: tuple[str, ...]
    problem: Callable[[dict[str, Any]], Problem]
    optional: tuple[str, ...] = ()
    answer_types: tuple[str, ...] = INFERRED_TYPES
    validation_only: str = ""
    rows: dict[str, int] = field(default_factory=dict)
    download: str = ""
    placeholders: bool = True
    key: tuple[str, ...] = ()
    id_prefix: str = ""
    splits: tuple[str, ...] = ("train", "validation", "val", "test")
    aliases: dict[str, str] = field(default_factory=lambda: {"val": "validation"})
    numbered_shards: bool = True
    default_splits: tuple[str, ...] = ()
    default_split: str = "train"
    hub_config: str | None = None
    hub_files: tuple[str, ...] = ()
    keep: Callable[[dict[str, Any]], bool] | None = None
    video_frames: int = 8
    open_folder: Callable[[Path], list[Split] | None] | None = None

    def __post_init__(self) -> None:
        if self.video_frames < 1:
            raise ValueError(f"{self.name}: video_frames is {self.video_frames}, not at least 1")
        if unknown := [kind for kind in self.answer_types if kind not in ANSWER_TYPES]:
            raise ValueError(f"{self.name}: answer_types {', '.join(unknown)} not among {', '.join(ANSWER_TYPES)}")

    def row_id(self, split: str, key: object) -> str:
        """Return the id of a row: the same in every run and on every machine."""
        return f"{self.id_prefix or self.name}-{split}-{key}"

    def facts(self, split: str = "", prompt_style: str = "") -> SetFacts:
        """Return the facts that a file with rows of this set states."""
        return SetFacts(
            self.name, self.hub_id, self.license, self.validation_only, self.answer_types, split, prompt_style
        )
