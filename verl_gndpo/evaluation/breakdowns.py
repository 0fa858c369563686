# SPDX-License-Identifier: Apache-2.0
"""Compute the figures that each benchmark reports, from the accuracy of each problem.

The definitions are those of the official scripts. All differ in one respect: there a language model, or a pattern of
the set's own, extracts answers; here `verl_gndpo.rewards` does for all sets.
"""

import ast
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Problem:
    """A problem as a converter wrote it."""

    source: str
    """Its `data_source`."""
    id: str
    """`extra_info.id`."""
    split: str
    meta: dict[str, Any]
    """`extra_info.meta`."""


@dataclass(frozen=True)
class Figure:
    """One number of a benchmark's table."""

    breakdown: str
    """Such as "task"; "" for figures of the whole set."""
    name: str
    value: float
    """A share."""
    count: int
    """What it is a share of: problems, or groups of problems."""


Breakdown = Callable[[Sequence[Problem], np.ndarray], list[Figure]]
"""Computes figures from problems and (problems, answers) accuracies."""


def problem_of(row: dict[str, Any]) -> Problem:
    """Return the problem of a parquet row. What another program left out is empty."""
    info = row.get("extra_info") or {}
    named = [str(info[key]) for key in ("id", "index") if info.get(key) not in (None, "")]
    try:
        meta = json.loads(info.get("meta") or "{}")
    except (TypeError, ValueError):
        meta = {}
    return Problem(
        str(row.get("data_source") or "unknown"),
        named[0] if named else "",
        str(info.get("split") or ""),
        meta if isinstance(meta, dict) else {},
    )


def group_of(problem: Problem) -> str:
    """Return what a problem is a variant of, or its own id.

    DynaMath has ten variants of each question, MathVerse five versions, and We-Math the steps of each question.
    """
    if problem.source == DYNAMATH:
        return problem.id.removeprefix(f"dynamath-{problem.split}-")
    if problem.source == WE_MATH and problem.meta.get("key"):
        return problem.id.removesuffix(str(problem.meta["key"]))
    if problem.source == MATHVERSE and problem.meta.get("problem_index") is not None:
        return str(problem.meta["problem_index"])
    return problem.id


def figures_of(problems: Sequence[Problem], acc: np.ndarray) -> list[Figure]:
    """Return the figures of one benchmark.

    Args:
        problems: all of one data source.
        acc: (problems, answers) of 0 and 1. Figures of several answers are means over them.
    """
    found = []
    for breakdown in BREAKDOWNS.get(problems[0].source, ()):
        found += breakdown(problems, acc)
    return found


def by(name: str, *fields: str) -> Breakdown:
    """Return a breakdown by the first of these fields of `meta`. A problem with a list counts for each entry."""

    def figures(problems: Sequence[Problem], acc: np.ndarray) -> list[Figure]:
        rows: dict[str, list[int]] = {}
        for row, problem in enumerate(problems):
            value = next((problem.meta[field] for field in fields if problem.meta.get(field) is not None), None)
            for entry in _entries(value):
                rows.setdefault(entry, []).append(row)
        return [Figure(name, entry, float(acc[rows[entry]].mean()), len(rows[entry])) for entry in sorted(rows)]

    return figures


def _entries(value: Any) -> list[str]:
    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return [value]
    if isinstance(value, list):
        return sorted({str(entry) for entry in value})
    return [] if value is None or value == "" else [str(value)]


def worst_case(problems: Sequence[Problem], acc: np.ndarray) -> list[Figure]:
    """Return DynaMath's average-case and worst-case accuracy (arXiv:2411.00836).

    The worst case is the share of questions with all variants right. Questions that lack a variant which others have
    are not counted: fewer variants are easier.
    """
    variants = {problem.split for problem in problems}
    rows: dict[str, list[int]] = {}
    for row, problem in enumerate(problems):
        rows.setdefault(group_of(problem), []).append(row)
    whole = [found for found in rows.values() if len({problems[row].split for row in found}) == len(variants)]
    figures = [Figure("", "average case", float(acc.mean()), len(problems))]
    if whole:
        worst = np.mean([acc[found].min(axis=0).mean() for found in whole])
        figures.append(Figure("", f"worst case of {len(variants)} variant(s)", float(worst), len(whole)))
    return figures


def four_categories(problems: Sequence[Problem], acc: np.ndarray) -> list[Figure]:
    """Return We-Math's categories and scores (arXiv:2407.01284, four_dimensional_metrics.py).

    A question is asked whole and in two or three steps. With the whole wrong, it shows inadequate generalisation if all
    steps are right, and insufficient knowledge otherwise. With the whole right, it is mastered if all steps (strict) or
    any step (loose) are right, and memorised by rote otherwise. The score subtracts from 1 the shares of insufficient
    knowledge and of rote memorisation, and half of the share of inadequate generalisation. The rate of rote
    memorisation is its share of the questions whose whole is right.

    The official script divides by 525, the questions of the full set. Here only questions with all their steps count,
    so that a part of the set has figures, too.
    """
    rows: dict[str, dict[str, int]] = {}
    for row, problem in enumerate(problems):
        rows.setdefault(group_of(problem), {})[str(problem.meta.get("key", ""))] = row
    questions = []
    for found in rows.values():
        whole = next((key for key in found if key.endswith("_multi")), None)
        steps = int(whole[0]) if whole and whole[0].isdecimal() else 0
        wanted = [f"{steps}steps_{step}" for step in range(1, steps + 1)]
        if whole and steps and all(key in found for key in wanted):
            questions.append((found[whole], [found[key] for key in wanted]))
    if not questions:
        return []
    right = np.stack([acc[whole] for whole, _ in questions]) > 0.5
    every = np.stack([acc[steps].min(axis=0) for _, steps in questions]) > 0.5
    some = np.stack([acc[steps].max(axis=0) for _, steps in questions]) > 0.5
    count = len(questions)
    lacking, narrow = (~right & ~every).mean(), (~right & every).mean()
    figures = [
        Figure("categories", "insufficient knowledge", float(lacking), count),
        Figure("categories", "inadequate generalisation", float(narrow), count),
    ]
    for name, knows in (("strict", every), ("loose", some)):
        mastered, rote = (right & knows).mean(), (right & ~knows).mean()
        figures.append(Figure("categories", f"complete mastery ({name})", float(mastered), count))
        if right.any():
            figures.append(
                Figure("categories", f"rote memorisation ({name})", float(rote / right.mean()), int(right.sum()))
            )
        figures.append(Figure("", f"score ({name})", float(1 - 0.5 * narrow - rote - lacking), count))
    return figures


def by_steps(problems: Sequence[Problem], acc: np.ndarray) -> list[Figure]:
    """Return We-Math's accuracies S1, S2 and S3 (accuracy.py): of all single steps, and of whole questions by steps."""
    rows: dict[str, list[int]] = {}
    for row, problem in enumerate(problems):
        key = str(problem.meta.get("key", ""))
        if key.endswith("_multi"):
            rows.setdefault(f"{key[0]}-step questions (S{key[0]})", []).append(row)
        elif key:
            rows.setdefault("1-step questions (S1)", []).append(row)
    return [Figure("steps", name, float(acc[rows[name]].mean()), len(rows[name])) for name in sorted(rows)]


MATHVISTA, MATHVERSE, MATH_VISION = "AI4Math/MathVista", "AI4Math/MathVerse", "MathLLMs/MathVision"
WE_MATH, LOGIC_VISTA, DYNAMATH = "We-Math/We-Math", "lscpku/LogicVista", "DynaMath/DynaMath_Sample"
MMK12 = "FanqingM/MMK12"

BREAKDOWNS: dict[str, tuple[Breakdown, ...]] = {
    # calculate_score.py. A problem with several skills counts for each.
    MATHVISTA: (by("task", "task"), by("context", "context"), by("skill", "skills")),
    # score_answer_s2.py, which also divides subjects into subfields.
    MATHVERSE: (by("version", "problem_version"), by("subject", "subject")),
    # evaluate.py, which also crosses the two.
    MATH_VISION: (by("subject", "subject"), by("level", "level")),
    WE_MATH: (four_categories, by_steps),
    # analyze_accuracy.py, which counts a problem with several skills for each, too.
    LOGIC_VISTA: (by("skill", "skill"),),
    DYNAMATH: (worst_case, by("subject", "subject"), by("level", "level")),
    # The MM-EUREKA paper (arXiv:2503.07365) reports MMK12 by its four subjects.
    MMK12: (by("subject", "subject"),),
}
"""By data source. Geometry3K has one figure, the accuracy, as sets without an entry."""
