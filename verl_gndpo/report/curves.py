# SPDX-License-Identifier: Apache-2.0
"""Plots of lines over steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from verl_gndpo.report import drawing
from verl_gndpo.report.logs import Arm
from verl_gndpo.report.picture import Picture, is_finite, median, remark_missing, series
from verl_gndpo.report.table import Teacher

LOG_RATIO = "gndpo/log_ratio/"


@dataclass(frozen=True)
class Curve:
    """A line an arm, from one series a run."""

    label: str
    unit: str
    arms: list[list[pd.Series]]


def draw_metrics(picture: Picture, arms: list[Arm], _: Teacher) -> Figure | None:
    """The plot's metrics."""
    curves = []
    for metric in picture.plot.metrics:
        name = next((n for n in metric.names if any(series(arm, n) for arm in arms)), metric.names[0])
        if remark_missing(picture, name, arms, [[run.metrics.get(name) for run in arm.runs] for arm in arms]):
            picture.metrics.append(name)
            curves.append(Curve(metric.label, metric.unit, [series(arm, name) for arm in arms]))
    return draw_curves(picture, curves, arms) if curves else None


def draw_accuracy(picture: Picture, arms: list[Arm], teacher: Teacher) -> Figure | None:
    """A curve a data source, with the teacher's accuracy."""
    curves, teachers = [], {}
    for source in sorted({source for arm in arms for run in arm.runs for source in run.accuracy}):
        found = [[run.accuracy.get(source) for run in arm.runs] for arm in arms]
        name = f"val-core/{source}/acc/mean@N"
        if remark_missing(picture, name, arms, found):
            picture.metrics.append(name)
            curves.append(Curve(source, "accuracy", [[x for x in runs if is_finite(x)] for runs in found]))
            shares = {teacher.accuracy(run, source) for arm in arms for run in arm.runs if source in run.accuracy}
            teachers[source] = sorted(shares - {None})
    if not curves and not picture.missing:
        picture.remark("no run logs", "val-core/*/acc/mean@N")
    return draw_curves(picture, curves, arms, teachers) if curves else None


def draw_curves(
    picture: Picture, curves: list[Curve], arms: list[Arm], teachers: Mapping[str, Sequence[float]] | None = None
) -> Figure:
    """One arm: curves of one unit in one panel. Several: a panel a curve, arms overlaid.

    Args:
        teachers: by curve, accuracies of teachers.
    """
    plot, single = picture.plot, len(arms) == 1
    units = dict.fromkeys(curve.unit for curve in curves)
    panels = [[c for c in curves if c.unit == unit] for unit in units] if single else [[curve] for curve in curves]
    # The marks of several arms make for long lines in the legend.
    figure, grid = drawing.figure(len(panels), wide=plot.marks and not single)
    entries: dict[str, Artist] = {}
    for axes, panel in zip(grid, panels, strict=True):
        for curve in panel:
            for i, values in enumerate(curve.arms):
                if values:
                    style = drawing.style(curves.index(curve) if single else i)
                    line, label = drawing.line(axes, values, style), curve.label if single else arms[i].label
                    entries |= _mark(axes, line, label, values, single) if plot.marks else {label: line}
            for accuracy in (teachers or {}).get(curve.label, ()):
                line = axes.axhline(accuracy, color="black", linestyle="--", linewidth=1)
                entries["teacher’s accuracy"] = line
        if plot.limit is not None:
            entries[f"limit {plot.limit}"] = axes.axhline(plot.limit, color="black", linestyle=":")
        axes.set_ylabel(panel[0].unit)
        if len(panels) > 1:
            drawing.title(axes, ", ".join(curve.label for curve in panel))
        if plot.logarithmic:
            drawing.set_log_scale(axes, [values for curve in panel for runs in curve.arms for values in runs])
        if panel[0].unit.startswith("share") and axes.get_yscale() == "linear":
            drawing.set_shares(axes)
    drawing.legend(figure, entries if len(entries) > 1 else {})
    return figure


def _mark(axes: Axes, line: Line2D, label: str, runs: list[pd.Series], single: bool) -> dict[str, Artist]:
    """Median (dashed), 95th percentile (dotted) and maximum over all steps and runs; what the legend says."""
    values = pd.concat(runs).dropna()
    middle, p95, largest = values.median(), values.quantile(0.95), values.max()
    step = values.index[values.argmax()]
    look = {"color": "black" if single else line.get_color(), "linewidth": 1}
    marks = {
        f"median {middle:.3g}": axes.axhline(middle, linestyle="--", **look),
        f"p95 {p95:.3g}": axes.axhline(p95, linestyle=":", **look),
        f"max {largest:.3g} at step {step}": axes.plot(step, largest, "v", clip_on=False, zorder=5, **look)[0],
    }
    return {label: line} | marks if single else {f"{drawing.one_line(label, 60)}: {', '.join(marks)}": line}


def draw_log_ratio(picture: Picture, arms: list[Arm], _: Teacher) -> Figure | None:
    """A panel an arm: mean and median, and bands between quantiles over tokens; of several runs, medians over runs."""
    names = {name for arm in arms for run in arm.runs for name in run.metrics if name.startswith(LOG_RATIO)}
    levels = sorted(int(name[-2:]) for name in names if name[-3:-2] == "p")
    bands = {
        f"p{low:02d} to p{100 - low:02d}": tuple(f"{LOG_RATIO}p{level:02d}" for level in (low, 100 - low))
        for low in levels
        if low < 50 and 100 - low in levels
    }
    lines = {"mean": f"{LOG_RATIO}mean"} | ({"median": f"{LOG_RATIO}p50"} if 50 in levels else {})
    wanted = [*lines.values(), *(name for ends in bands.values() for name in ends)]
    for name in wanted:
        if remark_missing(picture, name, arms, [[run.metrics.get(name) for run in arm.runs] for arm in arms]):
            picture.metrics.append(name)
    medians = [{name: median(found) for name in wanted if (found := series(arm, name))} for arm in arms]
    # One end of a band is nothing to draw.
    shapes = [*({name} for name in lines.values()), *map(set, bands.values())]
    drawn = [i for i, found in enumerate(medians) if any(shape <= found.keys() for shape in shapes)]
    if not drawn:
        return None
    figure, grid = drawing.figure(len(drawn))
    # The narrower, the darker.
    alphas = [0.15 * (n + 1) for n in range(len(bands))]
    for axes, i in zip(grid, drawn, strict=True):
        found, colour = medians[i], drawing.style(i)["color"]
        for (low, high), alpha in zip(bands.values(), alphas, strict=True):
            if low in found and high in found:
                drawing.band(axes, *map(drawing.smooth, found[low].align(found[high])), colour, alpha)
        for name, dashes in zip(lines.values(), drawing.DASHES, strict=False):
            if name in found:
                drawing.line(axes, [found[name]], {"color": colour, "linestyle": dashes})
        axes.axhline(0, color="black", linewidth=0.8)
        if len(drawn) > 1:
            drawing.title(axes, arms[i].label)
        axes.set_ylabel("log π_T − log π_old [nats]")
    drawing.share_limits(grid)
    colour = drawing.style(drawn[0])["color"] if len(drawn) == 1 else drawing.DARK
    entries = {
        label: Line2D([], [], color=colour, linestyle=dashes)
        for (label, name), dashes in zip(lines.items(), drawing.DASHES, strict=False)
        if name in picture.metrics
    }
    entries |= {
        label: Patch(facecolor=(colour, alpha), edgecolor=(colour, 0.4))
        for label, alpha in zip(bands, alphas, strict=True)
    }
    drawing.legend(figure, entries)
    return figure
