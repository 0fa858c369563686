# SPDX-License-Identifier: Apache-2.0
"""Compute the figures by which runs are compared."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from verl_gndpo.report.logs import Arm, ReportError, Run

# By key in summary.json: heading and meaning.
ACCURACY_COLUMNS = {
    "accuracy_before": ("before", "validation before the first training step of the log"),
    "accuracy_after": ("after", "last validation after a training step"),
    "accuracy_best": ("best", "greatest of all validations"),
    "gap_closed": ("gap closed", "(after − before) / (teacher − before)"),
    "accuracy_late_mean": ("late mean", "mean over the validations in the last 20 % of the steps"),
    "accuracy_peak_drop": ("peak drop", "largest fall from the best so far to a later validation"),
}
RUN_COLUMNS = {
    "grad_norm_max_over_median": ("gradient max / median", "greatest over median gradient norm, before clipping"),
    "steps": ("steps", "number of the last training step"),
    "seconds_per_step": ("s per step", "median of timing_s/step, without validation"),
}


@dataclass(frozen=True)
class Teacher:
    """The teacher's accuracies (shares) that the user gave: one for all runs, or one per data source."""

    overall: float | None
    by_source: dict[str, float]

    def accuracy(self, run: Run, source: str) -> float | None:
        """Return the accuracy given for a run, else the evaluated one, else that of the summary.json beside it.

        Return None if there is none. An accuracy without a data source counts only if the run has one data source.
        """
        if source in self.by_source:
            return self.by_source[source]
        if self.overall is None and source in run.evaluated_teacher:
            return run.evaluated_teacher[source]
        overall = run.teacher_accuracy if self.overall is None else self.overall
        return overall if len(run.accuracy) == 1 else None


def read_teacher(arguments: list[str], arms: list[Arm]) -> Teacher:
    """Read the values of `--teacher-accuracy`: X or SOURCE=X.

    Raises:
        ReportError: X is not a share between 0 and 1, SOURCE is not a data source of the runs, or SOURCE is missing
            although the runs have several.
    """
    overall: float | None = None
    by_source: dict[str, float] = {}
    sources = sorted({source for arm in arms for run in arm.runs for source in run.accuracy})
    for argument in arguments:
        source, separator, number = argument.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:
            raise ReportError(f"--teacher-accuracy {argument}: give a share between 0 and 1, or SOURCE=SHARE")
        known = ", ".join(sources) or "none"
        if separator and source not in sources:
            raise ReportError(f"--teacher-accuracy {argument}: no such data source in the runs -> give one of: {known}")
        if not separator and len(sources) > 1:
            raise ReportError(
                f"--teacher-accuracy {argument}: the runs have several data sources -> SOURCE={number}, one of: {known}"
            )
        if separator:
            by_source[source] = value
        else:
            overall = value
    return Teacher(overall, by_source)


def describe_accuracy(accuracy: pd.Series, run: Run, teacher: float | None) -> dict[str, float | None]:
    """Compute ACCURACY_COLUMNS (shares) for one run and data source. A value is None if the log doesn't determine it.

    Args:
        accuracy: over ascending steps; values that are not finite are ignored.
        run: the steps that it trained define "before" and "late".
        teacher: the teacher's accuracy, or None.
    """
    accuracy = accuracy.dropna()
    if accuracy.empty:
        return dict.fromkeys(ACCURACY_COLUMNS)
    trained = run.training_steps
    # verl numbers training steps from 1. A log that starts after a resume has its validation one step earlier.
    start = max(trained[0], 1) if len(trained) else 1
    untrained, later = accuracy[accuracy.index < start], accuracy[accuracy.index >= start]
    before = _number(untrained.iloc[0]) if len(untrained) else None
    after = _number(later.iloc[-1]) if len(later) else None
    logged = trained.union(accuracy.index)
    first, last = logged[0], logged[-1]
    late = accuracy[5 * (last - accuracy.index) <= last - first]
    gap_closed = None
    if before is not None and after is not None and teacher is not None and teacher > before:
        gap_closed = _number((after - before) / (teacher - before))
    return {
        "accuracy_before": before,
        "accuracy_after": after,
        "accuracy_best": _number(accuracy.max()),
        "gap_closed": gap_closed,
        "accuracy_late_mean": _number(late.mean()),
        "accuracy_peak_drop": _number((accuracy.cummax() - accuracy).max()),
    }


def describe_run(run: Run) -> dict[str, float | None]:
    """Compute RUN_COLUMNS for one run. A value is None if the log doesn't determine it."""
    empty = pd.Series(dtype="float64")
    gradient = run.metrics.get("actor/grad_norm", empty)
    median = gradient.median()
    return {
        "grad_norm_max_over_median": _number(gradient.max() / median) if median > 0 else None,
        "steps": int(run.training_steps[-1]) if len(run.training_steps) else None,
        "seconds_per_step": _number(run.metrics.get("timing_s/step", empty).median()),
    }


def summarise(arms: list[Arm], teacher: Teacher) -> list[dict]:
    """Compute the table, fit for JSON.

    Returns:
        one entry per arm: {"label", "runs": [{"path", "steps": [first, last] or None, "notes", "teacher_accuracy":
        {source: share or None}}], "accuracy": {source: {column: spread}}, column: spread}. A spread is {"mean", "min",
        "max", "values"}: "values" has one entry per run, None if unknown; the others are over the known values, or
        None.
    """
    return [_summarise_arm(arm, teacher) for arm in arms]


def _summarise_arm(arm: Arm, teacher: Teacher) -> dict:
    sources = sorted({source for run in arm.runs for source in run.accuracy})
    none = dict.fromkeys(ACCURACY_COLUMNS)
    accuracy = {
        source: _spreads(
            [
                describe_accuracy(run.accuracy[source], run, teacher.accuracy(run, source))
                if source in run.accuracy
                else none
                for run in arm.runs
            ]
        )
        for source in sources
    }
    runs = [
        {
            "path": str(run.path),
            "steps": [int(run.training_steps[i]) for i in (0, -1)] if len(run.training_steps) else None,
            "notes": list(run.notes),
            "teacher_accuracy": {source: teacher.accuracy(run, source) for source in run.accuracy},
        }
        for run in arm.runs
    ]
    return {"label": arm.label, "runs": runs, "accuracy": accuracy, **_spreads([describe_run(run) for run in arm.runs])}


def _spreads(rows: list[dict[str, float | None]]) -> dict[str, dict]:
    """Return the spread over runs for each column."""
    spreads = {}
    for column in rows[0]:
        values = [row[column] for row in rows]
        known = [value for value in values if value is not None]
        mean, low, high = (float(np.mean(known)), min(known), max(known)) if known else (None, None, None)
        spreads[column] = {"mean": mean, "min": low, "max": high, "values": values}
    return spreads


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
