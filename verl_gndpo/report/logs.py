# SPDX-License-Identifier: Apache-2.0
"""Logs of verl's file logger, finished or not: lines of {"step": int, "data": {name: number}}."""

import json
import math
import re
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from verl_gndpo.observe.worst_tokens import FILE_NAME as WORST_TOKENS

REMEDY = 'train with trainer.logger=["console","file"], and give the file that verl\'s log names as "file logger"'

ACCURACY = re.compile(r"val-core/(?P<source>.+)/acc/mean@(?P<samples>\d+)")
WARNING = "gndpo/warning/"
# All that is kept of a log; with the plugin's own, a step has more than 180 metrics.
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
# Of more metrics than that with values that aren't finite, one note tells.
NAMED = 3

# Beyond it a step is no longer exact in JSON, and no run gets there.
MAX_STEP = 2**53
# What is beyond counts as not finite: float32, in which all of it is computed, ends at 3e38, and sums would overflow.
MAX_VALUE = 1e100


class ReportError(ValueError):
    """What the user gave can't be reported on. One line: what, where, and what to do."""


@dataclass(frozen=True)
class Run:
    """One log.

    Attributes:
        path: the file.
        metrics: by name, values over steps in ascending order; NaN where a value was logged that is not finite.
        notes: what was skipped or is odd, a sentence each.
        teacher_accuracy: of the `summary.json` beside the log, or None.
    """

    path: Path
    metrics: dict[str, pd.Series]
    notes: tuple[str, ...] = ()
    teacher_accuracy: float | None = None

    @cached_property
    def accuracy(self) -> dict[str, pd.Series]:
        """Validation accuracy by data source: mean over N samples a prompt, of the largest N that was logged."""
        names = sorted((int(match["samples"]), match["source"], name) for name, match in self._accuracy_names())
        by_source: dict[str, pd.Series] = {}
        for _, source, name in names:
            found = self.metrics[name]
            by_source[source] = found.combine_first(by_source[source]) if source in by_source else found
        return dict(sorted(by_source.items()))

    @cached_property
    def training_steps(self) -> pd.Index:
        """The steps at which anything but a validation was logged, ascending."""
        validations = {name for name, _ in self._accuracy_names()}
        steps = pd.Index([], dtype="int64")
        for name, values in self.metrics.items():
            if name not in validations:
                steps = steps.union(values.index)
        return steps

    def _accuracy_names(self) -> list[tuple[str, re.Match]]:
        return [(name, match) for name in self.metrics if (match := ACCURACY.fullmatch(name))]


@dataclass(frozen=True)
class Arm:
    """Runs that differ by seed only, under one label."""

    label: str
    runs: list[Run]


def read_arms(arguments: list[str]) -> list[Arm]:
    """Read the runs of a command line.

    Args:
        arguments: each PATH or LABEL=PATH of a log or of a folder that has one. Runs under one LABEL are one arm; a run
            without a label is an arm of its own, named after its folder or file.

    Raises:
        ReportError: a path that doesn't exist, has no metrics, or is given twice.
        OSError: a log that can't be read.
    """
    given = [_split(argument) for argument in arguments]
    for i, (_, path) in enumerate(given):
        if any(path.samefile(other) for _, other in given[:i]):
            raise ReportError(f"{path} is given twice -> give each run once; the seeds of an arm are different files")
    # Runs without a label are never taken for seeds of one arm.
    names = Counter(_name(path) for label, path in given if not label) + Counter({label for label, _ in given if label})
    arms: dict[str, Arm] = {}
    for label, path in given:
        name = label or (_name(path) if names[_name(path)] == 1 else str(path))
        arms.setdefault(name, Arm(name, [])).runs.append(read_run(path))
    return list(arms.values())


def _split(argument: str) -> tuple[str, Path]:
    """Label, "" where there is none, and log of an argument."""
    label, separator, path = argument.partition("=")
    if separator and label.strip() and not Path(argument).exists():
        return label.strip(), _find_log(Path(path))
    return "", _find_log(Path(argument))


def _name(path: Path) -> str:
    return (path.resolve().parent.name if path.name == "metrics.jsonl" else path.stem) or str(path)


def read_run(path: Path) -> Run:
    """Read a log, skipping and noting what is broken in it.

    A step that was logged again (after a resume) has its later values; entries of one step are merged by metric.

    Raises:
        ReportError: no line of the file is a step of verl's file logger, or none has a metric that is reported on.
        OSError: the file can't be read.
    """
    wanted = cache(lambda name: WANTED.fullmatch(name) is not None)
    columns = defaultdict(lambda: (array("q"), array("d")))
    not_finite: dict[str, int] = defaultdict(int)
    broken, cut, entries, last_step = [], False, 0, None
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
                if not wanted(name) or not (value is None or type(value) in (int, float)):
                    continue
                value = _finite(value)
                not_finite[name] += math.isnan(value)
                steps, values = columns[name]
                steps.append(last_step)
                values.append(value)
    if not entries:
        raise ReportError(f"{path} has no metrics of verl's file logger -> {REMEDY}")
    if not columns:
        raise ReportError(f"{path} has {entries} entries, but none of the metrics that are reported on -> {REMEDY}")

    metrics, repeated = {}, pd.Index([], dtype="int64")
    for name in sorted(columns):
        steps, values = map(np.asarray, columns[name])
        series = pd.Series(values, pd.Index(steps, name="step"))
        again = series.index.duplicated(keep="last")
        repeated = repeated.union(series.index[again].unique())
        metrics[name] = series[~again].sort_index()
    last = max(series.index[-1] for series in metrics.values())

    notes = []
    if cut:
        notes.append("the last line is incomplete (the run is going on, or was killed) and is left out")
    if broken:
        shown = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        notes.append(f"{len(broken)} broken line(s) left out: line {shown}")
    if len(repeated):
        notes.append(f"{len(repeated)} step(s) logged more than once, as after a resume: the later values are shown")
        if last_step < last:
            notes.append(f"what follows step {last_step}, up to step {last}, is from before the last resume")
    notes += _describe_not_finite({name: count for name, count in not_finite.items() if count})
    notes += _describe_warnings(metrics)
    teacher_accuracy, teacher_note = _read_teacher_accuracy(path.with_name("summary.json"))
    return Run(path, metrics, (*notes, *teacher_note), teacher_accuracy)


def _find_log(path: Path) -> Path:
    """The log that a path means: itself, or `metrics.jsonl` or else the only .jsonl file in it.

    The plugin's own .jsonl file, which is put beside the log, isn't one.
    """
    if not path.is_dir():
        if not path.exists():
            raise ReportError(f"{path} does not exist -> give a log of verl's file logger, or a folder that has one")
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
    """Step and data of a line; None where it isn't one of verl's file logger."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step, data = (entry.get("step"), entry.get("data")) if isinstance(entry, dict) else (None, None)
    return (step, data) if type(step) is int and abs(step) < MAX_STEP and isinstance(data, dict) else None


def _finite(value: float | None) -> float:
    """The value as a float, NaN where that isn't finite."""
    return float(value) if value is not None and abs(value) <= MAX_VALUE else math.nan


def _describe_not_finite(counts: dict[str, int]) -> list[str]:
    """Notes on how many values of which metrics."""
    end = "value(s) not finite, shown as gaps and left out of the table"
    if len(counts) <= NAMED:
        return [f"{name}: {count} {end}" for name, count in counts.items()]
    first = ", ".join(list(counts)[:NAMED])
    return [f"{first} and {len(counts) - NAMED} more metrics: {sum(counts.values())} {end}"]


def _describe_warnings(metrics: dict[str, pd.Series]) -> list[str]:
    """Notes on the plugin's warnings that were raised."""
    notes = []
    for name, values in metrics.items():
        if name.startswith(WARNING):
            raised = warned(values)
            if len(raised):
                kind, steps = name.removeprefix(WARNING), values.count()
                notes.append(f"{kind} warning in {len(raised)} of {steps} steps, first at step {raised[0]}")
    return notes


def warned(values: pd.Series) -> pd.Index:
    """The steps of a warning. Averaged over the updates of one weight sync, it is a share of them."""
    return values.index[values > 0]


def _read_teacher_accuracy(path: Path) -> tuple[float | None, list[str]]:
    """`teacher_accuracy` of a summary.json, as the quickstart writes it; and a note where it can't be used."""
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
        return None, [f"{path}: teacher_accuracy is {str(value)[:40]}, not a share between 0 and 1, and is left out"]
    return float(value), []
