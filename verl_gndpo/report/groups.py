# SPDX-License-Identifier: Apache-2.0
"""Draw metrics that are logged by group: tenths of a response, token classes, data sources, teachers."""

from typing import TypedDict

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from verl_gndpo.report import drawing
from verl_gndpo.report.drawing import Metric, Picture
from verl_gndpo.report.logs import Arm, Run, any_finite, is_finite, median
from verl_gndpo.report.table import Teacher

# The steps of a run are cut into this many parts of equal length.
PARTS = 5
# One colour per part, from early to late.
SHADES = ("#A6CEE3", "#74A9CF", "#3690C0", "#0570B0", "#023858")
EARLY, LATE = "first fifth of a run’s steps", "last fifth"

Groups = dict[str, str]
"""Names of a metric, by group."""


class _Dot(TypedDict):
    color: str
    markersize: float
    clip_on: bool


def draw_groups(picture: Picture, arms: list[Arm], _: Teacher) -> Figure | None:
    """Draw one line per group over steps. For several arms, or more groups than colours: one row per group."""
    found = _find_groups(picture, arms)
    labels = sorted({group for _, groups in found for group in groups})
    if not labels:
        return None
    if len(arms) > 1 or len(labels) > len(drawing.COLOURS):
        return _draw_rows(found, labels, arms)
    figure, grid = drawing.figure(len(found))
    entries: dict[str, Artist] = {}
    for axes, (metric, groups) in zip(grid, found, strict=True):
        for group, name in groups.items():
            entries[group] = drawing.line(axes, arms[0].series(name), drawing.style(labels.index(group)))
        axes.set_ylabel(metric.unit)
        drawing.title(axes, metric.label)
        if metric.unit.startswith("share"):
            drawing.set_shares(axes)
    drawing.legend(figure, {label: entries[label] for label in labels})
    return figure


def draw_positions(picture: Picture, arms: list[Arm], _: Teacher) -> Figure | None:
    """Draw values along the response: one line per fifth of a run's steps.

    If there are several runs: two lines per arm, for the first (dashed) and the last fifth.
    """
    found = _find_groups(picture, arms)
    if not found:
        return None
    figure, grid = drawing.figure(len(found))
    entries: dict[str, Artist] = {}
    runs = [run for arm in arms for run in arm.runs]
    for axes, (metric, groups) in zip(grid, found, strict=True):
        entries |= _draw_parts(axes, runs[0], groups) if len(runs) == 1 else _draw_early_late(axes, arms, groups)
        axes.set_xlabel("position in the response [%]")
        axes.set_xlim(0, 100)
        axes.set_ylabel(metric.unit)
        drawing.title(axes, metric.label)
    if len(runs) > 1:
        entries[EARLY] = Line2D([], [], color=drawing.DARK, linestyle="--")
        entries[LATE] = Line2D([], [], color=drawing.DARK, linestyle="-")
    drawing.legend(figure, entries)
    return figure


def _draw_parts(axes: Axes, run: Run, groups: Groups) -> dict[str, Artist]:
    """Draw one line per part of a run's steps."""
    entries: dict[str, Artist] = {}
    parts = _parts(run, run.training_steps)
    for part, values in _along(run, groups).items():
        steps = run.training_steps[parts == part]
        label = f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
        entries[label] = drawing.line(axes, [values], {"color": SHADES[part], "linestyle": "-"})
    return entries


def _draw_early_late(axes: Axes, arms: list[Arm], groups: Groups) -> dict[str, Artist]:
    """Draw two lines per arm. The late one has the range over runs."""
    entries: dict[str, Artist] = {}
    for i, arm in enumerate(arms):
        tables = [_along(run, groups) for run in arm.runs]
        early, late = ([table[part] for table in tables if part in table] for part in (0, PARTS - 1))
        colour = drawing.style(i)["color"]
        if early:
            drawing.line(axes, [median(early)], {"color": colour, "linestyle": "--"})
        if late:
            drawing.line(axes, late, {"color": colour, "linestyle": "-"})
        if early or late:
            entries[arm.label] = Line2D([], [], color=colour)
    return entries


def _draw_rows(found: list[tuple[Metric, Groups]], labels: list[str], arms: list[Arm]) -> Figure:
    """Draw one row per group, and in it each arm's median over runs (hollow: early, filled: late) and late range."""
    figure, grid = drawing.figure(len(found), height=max(2.9, 0.9 + 0.19 * len(labels) * (len(arms) + 1)))
    entries: dict[str, Artist] = {}
    for axes, (metric, groups) in zip(grid, found, strict=True):
        for i, arm in enumerate(arms):
            look: _Dot = {"color": drawing.style(i)["color"], "markersize": 6, "clip_on": False}
            for group, name in groups.items():
                y = labels.index(group) + (i + 1) / (len(arms) + 1) - 0.5
                means = [_means(run, run.metrics[name]) for run in arm.runs if is_finite(run.metrics.get(name))]
                early, late = ([m[part] for m in means if part in m] for part in (0, PARTS - 1))
                if early:
                    axes.plot(np.median(early), y, "o", mfc="none", **look)
                if late:
                    axes.plot([min(late), max(late)], [y, y], linewidth=2, color=look["color"], alpha=0.5)
                    axes.plot(np.median(late), y, "o", **look)
                if early or late:
                    entries[arm.label] = Line2D([], [], marker="o", linestyle="", **look)
        _label_rows(axes, labels)
        drawing.set_values_across(axes, metric.unit)
        drawing.title(axes, metric.label)
    entries = entries if len(arms) > 1 else {}
    for label, face in ((EARLY, "none"), (LATE, drawing.DARK)):
        entries[label] = Line2D([], [], color=drawing.DARK, marker="o", markersize=6, linestyle="", mfc=face)
    drawing.legend(figure, entries)
    return figure


def _label_rows(axes: Axes, labels: list[str]) -> None:
    drawing.set_rows(axes, labels)
    for y in range(1, len(labels)):
        axes.axhline(y - 0.5, color=drawing.GREY, linewidth=0.8)
    if not drawing.place(axes).is_first_col():
        axes.tick_params(labelleft=False)


def _find_groups(picture: Picture, arms: list[Arm]) -> list[tuple[Metric, Groups]]:
    """Return the groups of each metric for which any run has a finite value."""
    found = []
    for metric in picture.plot.metrics:
        (pattern,) = metric.names
        before, after = pattern.split("*")
        by_run = [[_matching(run, before, after) for run in arm.runs] for arm in arms]
        if picture.remark_missing(pattern, arms, [[any_finite(x.values()) for x in runs] for runs in by_run]):
            groups = sorted({g for runs in by_run for x in runs for g, values in x.items() if is_finite(values)})
            found.append((metric, {group: f"{before}{group}{after}" for group in groups}))
    return found


def _matching(run: Run, before: str, after: str) -> dict[str, pd.Series]:
    names = [name for name in run.metrics if name.startswith(before) and name.endswith(after)]
    return {name[len(before) : len(name) - len(after)]: run.metrics[name] for name in names}


def _parts(run: Run, steps: pd.Index) -> np.ndarray:
    """Return the index of the part in which each step is. The only step of a run is in the last part."""
    first, last = run.training_steps[0], run.training_steps[-1]
    if first == last:
        return np.full(len(steps), PARTS - 1)
    return np.minimum(PARTS * (steps.to_numpy() - first) // (last - first), PARTS - 1)


def _means(run: Run, values: pd.Series) -> pd.Series:
    """Return the mean for each part of the run that has a finite value."""
    return values.groupby(_parts(run, values.index)).mean().dropna()


def _along(run: Run, groups: Groups) -> pd.DataFrame:
    """Return the means by position, one column per part of the run.

    Positions are the middles of the tenths, in % of the response.
    """
    means = {int(g): _means(run, run.metrics[name]) for g, name in groups.items() if name in run.metrics}
    table = pd.DataFrame(means).T.sort_index()
    table.index = 100 * (table.index + 0.5) / 10
    return table
