# SPDX-License-Identifier: Apache-2.0
"""Grade the answers of one model to the problems of parquet files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from verl_gndpo.evaluation.breakdowns import Problem, problem_of
from verl_gndpo.rewards import compute_score
from verl_gndpo.rewards.extract import answers_of

COLUMNS = ("data_source", "reward_model", "extra_info")


@dataclass(frozen=True)
class Row:
    """A problem with what is needed to grade it, and where its images are."""

    problem: Problem
    truth: str
    info: dict[str, Any]
    file: str
    place: int


@dataclass(frozen=True)
class Graded:
    """The answers of one model to the problems of one data source, as arrays of shape (problems, answers)."""

    acc: np.ndarray
    format: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    found: np.ndarray
    """Whether any answer was found in the response."""
    texts: list[list[str]]
    too_long: int
    """Problems that were not asked, because their prompts are too long. They count as wrong."""


def read_rows(files: Sequence[str], limit: int | None) -> list[Row]:
    """Return the problems of files in order, without prompts and images."""
    rows = []
    for file in files:
        place = 0
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(columns=list(COLUMNS)):
                for entry in batch.to_pylist():
                    if limit is None or place < limit:
                        truth = (entry["reward_model"] or {}).get("ground_truth") or ""
                        rows.append(Row(problem_of(entry), str(truth), entry["extra_info"] or {}, file, place))
                    place += 1
    return rows


def grade(rows: Sequence[tuple[int, Row]], answers: dict[int, dict[str, Any]], count: int) -> Graded:
    """Grade the answers to problems of one data source.

    Args:
        rows: number and problem.
        answers: by number, from `generate.read_answers`.
        count: answers per problem.
    """
    shape = (len(rows), count)
    acc, form, tokens, truncated, found = (np.zeros(shape) for _ in range(5))
    too_long = sum(not answers[number]["answers"] for number, _ in rows)
    graded = Graded(acc, form, tokens, truncated, found, [], too_long)
    for place, (number, row) in enumerate(rows):
        entry = answers[number]
        info = {**row.info, "response_prefix": entry["prefix"]} if entry["prefix"] else row.info
        graded.texts.append([answer["text"] for answer in entry["answers"]])
        for column, answer in enumerate(entry["answers"]):
            score = compute_score(row.problem.source, answer["text"], row.truth, info)
            graded.acc[place, column] = score.get("acc", 0.0)
            graded.format[place, column] = score.get("format", 0.0)
            graded.tokens[place, column] = answer["tokens"]
            graded.truncated[place, column] = answer["truncated"]
            graded.found[place, column] = bool(answers_of(entry["prefix"] + answer["text"]))
    return graded
