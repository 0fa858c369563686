# SPDX-License-Identifier: Apache-2.0
"""Plots of metrics that are logged for each of several groups: tenths of a response, kinds of tokens, data sources."""

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from verl_gndpo.report import drawing
from verl_gndpo.report.logs import Arm, Run
from verl_gndpo.report.picture import Metric, Picture, any_finite, is_finite, median, remark_missing, series
from verl_gndpo.report.table import Teacher

# In so many parts of as many steps a run is cut.
PARTS = 5
# One colour a part, from early to late.
SHADES = ("#A6CEE3", "#74A9CF", "#3690C0", "#0570B0", "#023858")
EARLY, LATE = "first fifth of a run’s steps", "last fifth"

# By group, the metric's name.
Groups = dict[str, str]


def draw_groups(picture: Picture, arms: list[Arm], _: Teacher) -> Figure | None:
    """One arm: a line a group over steps. Several arms, or more groups than colours: a row a group, early and late."""
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
            entries[group] = drawing.line(axes, series(arms[0], name), drawing.style(labels.index(group)))
        axes.set_ylabel(metric.unit)
        drawing.title(axes, metric.label)
        if metric.unit.startswith("share"):
            drawing.set_shares(axes)
    drawing.legend(figure, {label: entries[label] for label in labels})
    return figure


def draw_positions(picture: Picture, arms: list[Arm], _: Teacher) -> Figure | None:
    """Along the response. One run: a line a fifth of its steps. Several: a line an arm, early (dashed) and late."""
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
        for label, dashes in ((EARLY, "--"), (LATE, "-")):
            entries[label] = Line2D([], [], color=drawing.DARK, linestyle=dashes)
    drawing.legend(figure, entries)
    return figure


def _draw_parts(axes: Axes, run: Run, groups: Groups) -> dict[str, Artist]:
    """One run: a line a part of its steps."""
    entries = {}
    parts = _parts(run, run.training_steps)
    for part, values in _along(run, groups).items():
        steps = run.training_steps[parts == part]
        label = f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
        entries[label] = drawing.line(axes, [values], {"color": SHADES[part], "linestyle": "-"})
    return entries


def _draw_early_late(axes: Axes, arms: list[Arm], groups: Groups) -> dict[str, Artist]:
    """Several runs: two lines an arm, the late one with the range over runs."""
    entries = {}
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
    """A row a group; in it for each arm the median over runs (filled: late, hollow: early) and their range."""
    figure, grid = drawing.figure(len(found), height=max(2.9, 0.9 + 0.19 * len(labels) * (len(arms) + 1)))
    entries: dict[str, Artist] = {}
    for axes, (metric, groups) in zip(grid, found, strict=True):
        for i, arm in enumerate(arms):
            look = {"color": drawing.style(i)["color"], "markersize": 6, "clip_on": False}
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
    if not axes.get_subplotspec().is_first_col():
        axes.tick_params(labelleft=False)


def _find_groups(picture: Picture, arms: list[Arm]) -> list[tuple[Metric, Groups]]:
    """The groups of each metric that any run has a finite value of."""
    found = []
    for metric in picture.plot.metrics:
        (pattern,) = metric.names
        before, after = pattern.split("*")
        by_run = [[_matching(run, before, after) for run in arm.runs] for arm in arms]
        if remark_missing(picture, pattern, arms, [[any_finite(x.values()) for x in runs] for runs in by_run]):
            picture.metrics.append(pattern)
            groups = sorted({g for runs in by_run for x in runs for g, values in x.items() if is_finite(values)})
            found.append((metric, {group: f"{before}{group}{after}" for group in groups}))
    return found


def _matching(run: Run, before: str, after: str) -> dict[str, pd.Series]:
    names = [name for name in run.metrics if name.startswith(before) and name.endswith(after)]
    return {name[len(before) : len(name) - len(after)]: run.metrics[name] for name in names}


def _parts(run: Run, steps: pd.Index) -> np.ndarray:
    """In which of the PARTS of the run each step is; the only step of a run is in the last."""
    first, last = run.training_steps[0], run.training_steps[-1]
    if first == last:
        return np.full(len(steps), PARTS - 1)
    return np.minimum(PARTS * (steps.to_numpy() - first) // (last - first), PARTS - 1)


def _means(run: Run, values: pd.Series) -> pd.Series:
    """Over the steps of each of the run's parts that has a finite value."""
    return values.groupby(_parts(run, values.index)).mean().dropna()


def _along(run: Run, groups: Groups) -> pd.DataFrame:
    """Over the middles of the tenths [% of the response], a column a part of the run."""
    means = {int(g): _means(run, run.metrics[name]) for g, name in groups.items() if name in run.metrics}
    table = pd.DataFrame(means).T.sort_index()
    table.index = 100 * (table.index + 0.5) / 10
    return table
