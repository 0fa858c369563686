# SPDX-License-Identifier: Apache-2.0
"""What a plot is made of, and what it says of runs that lack its metrics."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pandas as pd
from matplotlib.figure import Figure

from verl_gndpo.report.logs import Arm
from verl_gndpo.report.table import Teacher


@dataclass(frozen=True)
class Metric:
    """Of a plot: the first of `names` that any run has; a name with a * stands for a metric of each of several groups.

    Metrics of one unit share axes where there is one arm.
    """

    names: tuple[str, ...]
    label: str
    unit: str


@dataclass(frozen=True)
class Plot:
    """
    Attributes:
        section, name, title: the heading of the page that it is under, the PNG's name, what is above it.
        reading: what to look for.
        draw: makes the figure and fills in the picture's metrics and remarks; None where no run has any of its data.
        logarithmic: where values are far apart.
        marks: median, 95th percentile and maximum of each arm are marked and named.
        limit: a line across.
    """

    section: str
    name: str
    title: str
    reading: str
    draw: Callable[["Picture", list[Arm], Teacher], Figure | None]
    metrics: tuple[Metric, ...] = ()
    logarithmic: bool = False
    marks: bool = False
    limit: float | None = None


@dataclass
class Picture:
    """A drawn plot, or why there is none: `png` is None, and `remarks` says what is missing.

    Attributes:
        wide: whether it takes the whole width of the page.
        metrics: what is drawn.
        missing: what is not, by what is said of it.
    """

    plot: Plot
    png: bytes | None = None
    wide: bool = False
    metrics: list[str] = field(default_factory=list)
    missing: dict[str, list[str]] = field(default_factory=dict)

    def remark(self, said: str, name: str) -> None:
        """What is said of several names is said once."""
        self.missing.setdefault(said, []).append(name)

    @property
    def remarks(self) -> list[str]:
        """In words."""
        return [f"{said} {', '.join(names)}" for said, names in self.missing.items()]


def series(arm: Arm, name: str) -> list[pd.Series]:
    """Of the arm's runs that have a finite value of it."""
    return [x for run in arm.runs if is_finite(x := run.metrics.get(name))]


def is_finite(values: pd.Series | None) -> bool:
    """Whether there is something to draw."""
    return values is not None and bool(values.notna().any())


def any_finite(values: Iterable[pd.Series]) -> pd.Series | None:
    """The one of a run's metrics that stands for all where something is said of them: a finite one, if there is one."""
    return max(values, key=is_finite, default=None)


def median(values: list[pd.Series]) -> pd.Series:
    """Over runs, step by step."""
    return values[0] if len(values) == 1 else pd.concat(values, axis=1).sort_index().median(axis=1)


def remark_missing(picture: Picture, name: str, arms: list[Arm], found: list[list[pd.Series | None]]) -> bool:
    """Say which arms, or how many runs of them, lack a metric; whether any run has a finite value of it.

    Args:
        name: the metric, or what stands for several.
        found: by arm and run, the metric; None where the log doesn't have it.
    """
    absent = [sum(x is None for x in runs) for runs in found]
    useless = [sum(not is_finite(x) for x in runs) - count for runs, count in zip(found, absent, strict=True)]
    if sum(absent) + sum(useless) == sum(map(len, found)):
        picture.remark("never finite:" if any(useless) else "no run logs", name)
        return False
    for said, counts in (("not in the log of", absent), ("never finite in the log of", useless)):
        lacking = [
            arm.label + (f" ({count} of {len(arm.runs)} runs)" if count < len(arm.runs) else "")
            for arm, count in zip(arms, counts, strict=True)
            if count
        ]
        if lacking:
            picture.remark(f"{said} {', '.join(lacking)}:", name)
    return True
