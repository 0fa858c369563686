# SPDX-License-Identifier: Apache-2.0
"""What a converter states about its data set, and what one row becomes before it is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .source import Split

ANSWER_TYPES = ("number", "math", "choice", "multi_choice", "list", "text")
"""How an answer is graded: the graders of `verl_gndpo.rewards`."""


@dataclass(frozen=True)
class Problem:
    """One problem in the words of its source; nothing about it has been checked.

    Args:
        question: text, with or without placeholders (`<image>`, `<image1>`).
        answer: text, or a number.
        images: None, one or a list; each is `{"bytes": ..., "path": ...}`, bytes, or a path in the source.
        choices: texts of the choices A, B, C, ..., for the grader; empty when they are only drawn in the picture.
        list_choices: write the choices after the question, which does not name them itself.
        answer_type: one of `ANSWER_TYPES`; when not given, a letter is a choice and anything else math.
        tolerance: largest absolute error of a number that still counts; 0.0 leaves it to the grader.
        meta: further columns worth keeping, such as the subject; they become JSON in `extra_info.meta`.
    """

    question: object
    answer: object
    images: object
    choices: tuple[str, ...] = ()
    list_choices: bool = False
    answer_type: str | None = None
    tolerance: float = 0.0
    meta: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A data set.

    Args:
        name: name of the converter, and of the folder under ~/data.
        hub_id: source when none is given; also verl's `data_source`, which selects the reward.
        license: of the set, as its authors state it.
        columns: columns without which a source is refused.
        problem: how a row becomes a problem. It may raise DroppedRow.
        optional: columns that some copies of the set lack; a row holds None for them.
        placeholders: whether its questions hold placeholders; without, images come before the question.
        key: columns that make up the source's own row ids; without them rows are numbered.
        id_prefix: first part of the row ids; `name` when not given.
        splits: regular expressions of what its files' names start with; the longer of two goes first.
        aliases: what splits of other names are called here.
        numbered_shards: whether "-00000-of-00003" in a file's name counts the files of the split.
        default_splits: what is converted when `--split` names none; every split when empty.
        default_split: split of a file whose name says none.
        validation_only: why the set must not be trained on; "" when it may.
        hub_config: configuration of the hub data set, where it has several.
        hub_files: patterns of the files to fetch from the hub, for sets that `datasets.load_dataset` cannot read.
        keep: says of a row whether its licence lets it be kept; `--include_unlicensed` keeps all.
        open_folder: reads a layout of the data set's own, or returns None when a folder does not have that layout.
    """

    name: str
    hub_id: str
    license: str
    columns: tuple[str, ...]
    problem: Callable[[dict], Problem]
    optional: tuple[str, ...] = ()
    placeholders: bool = True
    key: tuple[str, ...] = ()
    id_prefix: str = ""
    splits: tuple[str, ...] = ("train", "validation", "val", "test")
    aliases: dict[str, str] = field(default_factory=lambda: {"val": "validation"})
    numbered_shards: bool = True
    default_splits: tuple[str, ...] = ()
    default_split: str = "train"
    validation_only: str = ""
    hub_config: str | None = None
    hub_files: tuple[str, ...] = ()
    keep: Callable[[dict], bool] | None = None
    open_folder: Callable[[Path], list[Split] | None] | None = None

    def row_id(self, split: str, key: object) -> str:
        return f"{self.id_prefix or self.name}-{split}-{key}"
