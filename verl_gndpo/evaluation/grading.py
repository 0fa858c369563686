# SPDX-License-Identifier: Apache-2.0
"""Grade the answers of one model to the problems of parquet files."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from verl_gndpo.evaluation.breakdowns import Problem, problem_of
from verl_gndpo.evaluation.job import Answers
from verl_gndpo.rewards import compute_score, is_missing
from verl_gndpo.rewards.extract import answers_of, well_formed

COLUMNS = ("data_source", "reward_model")
"""What grading needs of each row; `extra_info` may be missing."""
SINGLE_TURN = {"num_turns": 2, "rollout_reward_scores": {}}
"""What verl adds to `extra_info` of a question with one answer."""

Reward = Callable[..., Any]
"""A reward function as verl calls it."""


@dataclass(frozen=True)
class Row:
    """A problem with what is needed to grade it, and where its images are."""

    problem: Problem
    truth: Any
    """As the file has it; "" if it has none."""
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
    too_long: int
    """Problems that were not asked, because their prompts are too long. They count as wrong."""


def read_rows(files: Sequence[str], limit: int | None) -> list[Row]:
    """Return the problems of files in order, without prompts and images."""
    rows = []
    for file in files:
        place = 0
        with pq.ParquetFile(file) as parquet:
            columns = [name for name in (*COLUMNS, "extra_info") if name in parquet.schema_arrow.names]
            for batch in parquet.iter_batches(columns=columns):
                for entry in batch.to_pylist():
                    if limit is None or place < limit:
                        truth = (entry["reward_model"] or {}).get("ground_truth")
                        problem = problem_of(entry)
                        problem = problem if problem.id else replace(problem, id=f"{Path(file).name} row {place}")
                        truth = "" if is_missing(truth) else truth
                        rows.append(Row(problem, truth, entry.get("extra_info") or {}, file, place))
                    place += 1
    return rows


def load_reward(named: str) -> Reward:
    """Return the function PATH:NAME, loaded as verl loads `reward.custom_reward_function`.

    Raises:
        ValueError: there is no such function; the message is one line.
    """
    # verl's package takes seconds to import.
    from verl.utils.import_utils import load_extern_object

    path, _, name = named.rpartition(":")
    if not path or not name.isidentifier():
        raise ValueError(
            f"--reward-function {named} names no function -> give PATH:NAME, such as reward.py:compute_score"
        )
    try:
        found = load_extern_object(path, name)
    # Importing a file raises whatever its code raises.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"--reward-function {named} can't be loaded: {reason} -> correct the path or the file"
        ) from error
    if not callable(found):
        raise ValueError(f"--reward-function {named} is no function -> name the one that verl was given")
    return found


def grade(rows: Sequence[tuple[int, Row]], answers: Answers, count: int, reward: Reward = compute_score) -> Graded:
    """Grade the answers to problems of one data source.

    Args:
        rows: number and problem.
        answers: of all problems.
        count: answers per problem.
        reward: returns a number, or a dict with "acc" or, without that, "score", as for verl's validation.

    Raises:
        ValueError: `reward` failed on an answer, or returned something other than 0 and 1; the message is one line.
    """
    shape = (len(rows), count)
    acc, form, tokens, truncated, found = (np.zeros(shape) for _ in range(5))
    too_long = 0
    for place, (number, row) in enumerate(rows):
        entry = answers[number]
        too_long += not entry["answers"]
        info = {**row.info, **SINGLE_TURN, **({"response_prefix": entry["prefix"]} if entry["prefix"] else {})}
        for column, answer in enumerate(entry["answers"]):
            text = entry["prefix"] + answer["text"]
            acc[place, column] = _accuracy(reward, row, answer["text"], info)
            form[place, column] = well_formed(text)
            tokens[place, column] = answer["tokens"]
            truncated[place, column] = answer["truncated"]
            found[place, column] = bool(answers_of(text))
    return Graded(acc, form, tokens, truncated, found, too_long)


def _accuracy(reward: Reward, row: Row, text: str, info: dict[str, Any]) -> float:
    """Return the accuracy of an answer, as verl's naive reward manager and its validation take it from a function."""
    arguments = {"data_source": row.problem.source, "solution_str": text, "ground_truth": row.truth}
    where = f"the reward function, given an answer to row {row.place} of {row.file},"
    try:
        # A copy, because some functions change it.
        found = reward(**arguments, extra_info=dict(info))
        found = asyncio.run(found) if inspect.iscoroutine(found) else found
    # It may be anybody's code.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{where} failed: {reason} -> mend the row or the function") from error
    value = found.get("acc", found.get("score")) if isinstance(found, dict) else found
    if isinstance(value, bool | int | float | np.bool_ | np.number) and value in (0, 1):
        return float(value)
    raise ValueError(
        f"{where} returned {str(found)[:80]}, and an accuracy is 0 or 1 -> let it return "
        '{"score": REWARD, "acc": 0 or 1}, or name a function that does'
    )
