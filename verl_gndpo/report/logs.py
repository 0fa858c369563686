# SPDX-License-Identifier: Apache-2.0
"""Read logs of verl's file logger, finished or not: lines of {"step": int, "data": {name: number}}."""

import json
import math
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TypeGuard

import numpy as np
import pandas as pd

from verl_gndpo.observe.worst_tokens import FILE_NAME as WORST_TOKENS

REMEDY = 'train with trainer.logger=["console","file"], and give the file that verl\'s log names as "file logger"'

ACCURACY = re.compile(r"val-core/(?P<source>.+)/acc/mean@(?P<samples>\d+)")
WARNING = "gndpo/warning/"
# The metrics that are kept. A step logs more than 180.
WANTED = re.compile(
    ACCURACY.pattern
    + r"|timing_s/[^/]+|actor/grad_norm|critic/(?:score|rewards)/mean|response_length/(?:mean|max|clip_ratio)"
    r"|training/rollout_actor_probs_pearson_corr"
    r"|gndpo/(?:log_ratio/(?:mean|p\d\d|beyond_\d+_share)|k1|k3|mu|sigma|gain|clipped_(?:low|high)_share"
    r"|sign_flip_share|top_1pct_gradient_share|effective_sample_share|advantage_(?:kurtosis|abs_max)"
    r"|position/\d/(?:k1|advantage_abs_mean)|token/[^/]+/(?:k1|advantage_abs_mean|share)"
    r"|data_source/.+/(?:k1|gradient_share|share)|teacher/.+/(?:k1|sigma)|teacher_ahead_share"
    r"|response/(?:length_p95|truncated_share|eos_share)|warning/[^/]+)"
)
# If more metrics than this have values that are not finite, they share one note.
NAMED = 3

# Larger integers aren't exact in every JSON reader, and no run gets there.
MAX_STEP = 2**53
# Larger values count as not finite: verl computes in float32, which ends at 3e38, and sums would overflow here.
MAX_VALUE = 1e100
# Beside a log: what `verl-gndpo evaluate TEACHER --out RUN/teacher` wrote.
TEACHER_FOLDER = "teacher"


class ReportError(ValueError):
    """A report can't be made from what the user gave. The message is one line: what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Run:
    """One log.

    Attributes:
        path: the file.
        metrics: by name, values over ascending steps. A value that is not finite is NaN.
        notes: sentences on what was skipped or is unusual.
        teacher_accuracy: from the `summary.json` beside the log, or None.
        evaluated_teacher: by data source, the accuracies from the evaluation in the folder `teacher` beside the log.
    """

    path: Path
    metrics: dict[str, pd.Series]
    notes: tuple[str, ...] = ()
    teacher_accuracy: float | None = None
    evaluated_teacher: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def accuracy(self) -> dict[str, pd.Series]:
        """Return the validation accuracy by data source: the mean over N samples per prompt, N the largest logged."""
        names = sorted((int(match["samples"]), match["source"], name) for name, match in self._accuracy_names())
        by_source: dict[str, pd.Series] = {}
        for _, source, name in names:
            found = self.metrics[name]
            by_source[source] = found.combine_first(by_source[source]) if source in by_source else found
        return dict(sorted(by_source.items()))

    @cached_property
    def training_steps(self) -> pd.Index:
        """Return the steps, ascending, at which anything but a validation was logged."""
        validations = {name for name, _ in self._accuracy_names()}
        steps = pd.Index([], dtype="int64")
        for name, values in self.metrics.items():
            if name not in validations:
                steps = steps.union(values.index)
        return steps

    def _accuracy_names(self) -> list[tuple[str, re.Match[str]]]:
        return [(name, match) for name in self.metrics if (match := ACCURACY.fullmatch(name))]


@dataclass(frozen=True)
class Arm:
    """Runs under one label, which differ only by seed."""

    label: str
    runs: list[Run]

    def find(self, name: str) -> list[pd.Series | None]:
        """Return a metric for each run, None if the run doesn't log it."""
        return [run.metrics.get(name) for run in self.runs]

    def series(self, name: str) -> list[pd.Series]:
        """Return a metric for each run that has a finite value of it."""
        return [values for values in self.find(name) if is_finite(values)]


def is_finite(values: pd.Series | None) -> TypeGuard[pd.Series]:
    """Return True if any value is finite, so that there is something to draw."""
    return values is not None and bool(values.notna().any())


def any_finite(values: Iterable[pd.Series]) -> pd.Series | None:
    """Return one of a run's metrics to stand for all of them: a finite one if there is one, None if there are none."""
    return max(values, key=is_finite, default=None)


def median(values: list[pd.Series]) -> pd.Series:
    """Return the median over runs for each step."""
    return values[0] if len(values) == 1 else pd.concat(values, axis=1).sort_index().median(axis=1)


def warned(values: pd.Series) -> pd.Index:
    """Return the steps at which a warning was raised.

    The value of a step is the share of its updates that raised the warning.
    """
    return values.index[values > 0]


def read_arms(arguments: list[str]) -> list[Arm]:
    """Read the runs of a command line.

    Args:
        arguments: PATH or LABEL=PATH for each run; PATH is a log or a folder with a log. Runs with the same LABEL are
            one arm. A run without a label is its own arm, named after its folder or file.

    Raises:
        ReportError: a path doesn't exist, has no metrics, or is given twice.
        OSError: a log can't be read.
    """
    given = [_split(argument) for argument in arguments]
    for i, (_, path) in enumerate(given):
        if any(path.samefile(other) for _, other in given[:i]):
            raise ReportError(f"{path} is given twice -> give each run once; the seeds of an arm are different files")
    # Runs without a label stay separate arms even if their names are equal.
    names = Counter(_name(path) for label, path in given if not label) + Counter({label for label, _ in given if label})
    arms: dict[str, Arm] = {}
    for label, path in given:
        name = label or (_name(path) if names[_name(path)] == 1 else str(path))
        arms.setdefault(name, Arm(name, [])).runs.append(read_run(path))
    return list(arms.values())


def _split(argument: str) -> tuple[str, Path]:
    """Return the label and the log of an argument. The label is "" if there is none."""
    label, separator, path = argument.partition("=")
    if separator and label.strip() and not Path(argument).exists():
        return label.strip(), _find_log(Path(path))
    return "", _find_log(Path(argument))


def _name(path: Path) -> str:
    return (path.resolve().parent.name if path.name == "metrics.jsonl" else path.stem) or str(path)


def read_run(path: Path) -> Run:
    """Read a log. Skip broken lines and note them.

    If a step was logged again, as after a resume, its later values count. Entries of one step are merged by metric.

    Raises:
        ReportError: no line of the file is a step of verl's file logger, or no line has a metric that a report uses.
        OSError: the file can't be read.
    """
    wanted = cache(lambda name: WANTED.fullmatch(name) is not None)
    # By metric: steps and values.
    columns: dict[str, tuple[array[int], array[float]]] = defaultdict(lambda: (array("q"), array("d")))
    not_finite: Counter[str] = Counter()
    broken: list[int] = []
    cut, entries, last_step = False, 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            entry = _parse(line)
            if entry is None:
                cut = not line.endswith(b"\n")
                broken += [] if cut else [number]
                continue
            entries += 1
            last_step, data = entry
            for name, value in data.items():
                # verl's logger writes NaN and infinity as null.
                if not wanted(name) or (value is not None and type(value) not in (int, float)):
                    continue
                value = _finite(value)
                not_finite[name] += math.isnan(value)
                steps, values = columns[name]
                steps.append(last_step)
                values.append(value)
    if not entries:
        raise ReportError(f"{path} has no metrics of verl's file logger -> {REMEDY}")
    if not columns:
        raise ReportError(f"{path} has {entries} entries, but no metric that a report uses -> {REMEDY}")

    metrics, repeated = {}, pd.Index([], dtype="int64")
    for name in sorted(columns):
        steps, values = columns[name]
        series = pd.Series(np.asarray(values), pd.Index(np.asarray(steps), name="step"))
        again = series.index.duplicated(keep="last")
        repeated = repeated.union(series.index[again].unique())
        metrics[name] = series[~again].sort_index()
    last = max(series.index[-1] for series in metrics.values())

    notes = []
    if cut:
        notes.append("the last line is incomplete (the run is going on, or was killed) and is skipped")
    if broken:
        shown = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        notes.append(f"{len(broken)} broken line(s) skipped: line {shown}")
    if len(repeated):
        notes.append(f"{len(repeated)} step(s) logged more than once, as after a resume: the later values are shown")
        if last_step < last:
            notes.append(f"steps after {last_step}, up to {last}, are from before the last resume")
    notes += _describe_not_finite(+not_finite)
    notes += _describe_warnings(metrics)
    teacher_accuracy, teacher_note = _read_teacher_accuracy(path.with_name("summary.json"))
    evaluated, evaluation_note = _read_evaluated_teacher(path.with_name(TEACHER_FOLDER) / "summary.json")
    return Run(path, metrics, (*notes, *teacher_note, *evaluation_note), teacher_accuracy, evaluated)


def _find_log(path: Path) -> Path:
    """Return the log that a path means: the file itself, or the folder's `metrics.jsonl`, or its only .jsonl file.

    The plugin's own .jsonl file, which may be beside the log, doesn't count.

    Raises:
        ReportError: the path doesn't exist, or the folder has no or several logs.
    """
    if not path.is_dir():
        if not path.exists():
            raise ReportError(f"{path} does not exist -> give a log of verl's file logger, or a folder with one")
        return path
    if (path / "metrics.jsonl").is_file():
        return path / "metrics.jsonl"
    logs = sorted(log for log in path.glob("*.jsonl") if log.name != WORST_TOKENS)
    if len(logs) > 1:
        raise ReportError(f"{path} has {len(logs)} .jsonl files ({logs[0].name}, {logs[1].name}, ...) -> name one")
    if not logs:
        raise ReportError(f"{path} has no metrics.jsonl -> {REMEDY}")
    return logs[0]


def _parse(line: bytes) -> tuple[int, dict] | None:
    """Return the step and the data of a line, None if verl's file logger didn't write it."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step, data = (entry.get("step"), entry.get("data")) if isinstance(entry, dict) else (None, None)
    return (step, data) if type(step) is int and abs(step) < MAX_STEP and isinstance(data, dict) else None


def _finite(value: float | None) -> float:
    """Return the value as a float, NaN if it isn't finite."""
    return float(value) if value is not None and abs(value) <= MAX_VALUE else math.nan


def _describe_not_finite(counts: Mapping[str, int]) -> list[str]:
    """Return notes on the numbers of values that are not finite, by metric."""
    end = "value(s) not finite, shown as gaps and not in the table"
    if len(counts) <= NAMED:
        return [f"{name}: {count} {end}" for name, count in counts.items()]
    first = ", ".join(list(counts)[:NAMED])
    return [f"{first} and {len(counts) - NAMED} more metrics: {sum(counts.values())} {end}"]


def _describe_warnings(metrics: dict[str, pd.Series]) -> list[str]:
    """Return notes on the plugin's warnings that were raised."""
    notes = []
    for name, values in metrics.items():
        if name.startswith(WARNING):
            raised = warned(values)
            if len(raised):
                kind, steps = name.removeprefix(WARNING), values.count()
                notes.append(f"{kind} warning in {len(raised)} of {steps} steps, first at step {raised[0]}")
    return notes


def _read_teacher_accuracy(path: Path) -> tuple[float | None, list[str]]:
    """Read `teacher_accuracy` from a summary.json as the quickstart writes it; add a note if it can't be used."""
    try:
        summary = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None, []
    except (OSError, ValueError, RecursionError) as error:
        return None, [f"{path} can't be read ({type(error).__name__}): no teacher accuracy from it"]
    value = summary.get("teacher_accuracy") if isinstance(summary, dict) else None
    if value is None:
        return None, []
    if type(value) not in (int, float) or not 0 <= value <= 1:
        return None, [f"{path}: teacher_accuracy is {str(value)[:40]}, not a share between 0 and 1, and is ignored"]
    return float(value), []


def _read_evaluated_teacher(path: Path) -> tuple[dict[str, float], list[str]]:
    """Read the accuracies from what `verl-gndpo evaluate TEACHER` wrote, with a note on what they are or are not."""
    try:
        summary = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError, RecursionError) as error:
        return {}, [f"{path} can't be read ({type(error).__name__}): no teacher accuracy from it"]
    try:
        ((name, sources),) = summary["models"].items()
        found = {source: float(figures["accuracy"][0]) for source, figures in sources.items()}
        problems = ", ".join(f"{figures['problems']} of {source}" for source, figures in sources.items())
        settings = summary["settings"]
        note = f"teacher accuracy from {path}: {name}, n={settings['n']}, temperature {settings['temperature']}"
        limit = settings["limit"]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return {}, [f"{path} is no evaluation of one model: no teacher accuracy from it"]
    if limit is not None:
        return {}, [
            f"{path} has only the first {limit} problems of each file (--limit), and validation has all: no teacher "
            "accuracy from it"
        ]
    return found, [f"{note}, problems: {problems}"]
