# SPDX-License-Identifier: Apache-2.0
"""Draw metrics over steps: lines, the quantiles of the log-ratio, and the intervals in which a warning was raised."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from verl_gndpo.report import drawing
from verl_gndpo.report.drawing import Picture
from verl_gndpo.report.logs import WARNING, Arm, any_finite, is_finite, median, warned
from verl_gndpo.report.table import Teacher

LOG_RATIO = "gndpo/log_ratio/"
# The steps of a long run are cut into twice as many pieces for its warnings.
BINS = 200


@dataclass(frozen=True)
class Curve:
    """A metric with one line per arm, from one series per run."""

    label: str
    unit: str
    arms: list[list[pd.Series]]


def draw_metrics(picture: Picture, arms: list[Arm], _: Teacher) -> Figure | None:
    """Draw the plot's metrics."""
    curves = []
    for metric in picture.plot.metrics:
        name = next((n for n in metric.names if any(arm.series(n) for arm in arms)), metric.names[0])
        if picture.remark_missing(name, arms, [arm.find(name) for arm in arms]):
            curves.append(Curve(metric.label, metric.unit, [arm.series(name) for arm in arms]))
    return _draw_curves(picture, curves, arms) if curves else None


def draw_accuracy(picture: Picture, arms: list[Arm], teacher: Teacher) -> Figure | None:
    """Draw one curve per data source, and the teacher's accuracy."""
    curves: list[Curve] = []
    teachers: dict[str, list[float]] = {}
    for source in sorted({source for arm in arms for run in arm.runs for source in run.accuracy}):
        found = [[run.accuracy.get(source) for run in arm.runs] for arm in arms]
        if picture.remark_missing(f"val-core/{source}/acc/mean@N", arms, found):
            curves.append(Curve(source, "accuracy", [[x for x in runs if is_finite(x)] for runs in found]))
            shares = {teacher.accuracy(run, source) for arm in arms for run in arm.runs if source in run.accuracy}
            teachers[source] = sorted(share for share in shares if share is not None)
    if not curves and not picture.missing:
        picture.remark("no run logs", "val-core/*/acc/mean@N")
    return _draw_curves(picture, curves, arms, teachers) if curves else None


def _draw_curves(
    picture: Picture, curves: list[Curve], arms: list[Arm], teachers: Mapping[str, Sequence[float]] | None = None
) -> Figure:
    """Draw one panel per unit if there is one arm, else one panel per curve with the arms overlaid.

    Args:
        teachers: accuracies of teachers, by the label of the curve.
    """
    plot, single = picture.plot, len(arms) == 1
    units = dict.fromkeys(curve.unit for curve in curves)
    panels = [[c for c in curves if c.unit == unit] for unit in units] if single else [[curve] for curve in curves]
    # The marks of several arms make long lines in the legend.
    figure, grid = drawing.figure(len(panels), wide=plot.marks and not single)
    entries: dict[str, Artist] = {}
    for axes, panel in zip(grid, panels, strict=True):
        for curve in panel:
            for i, values in enumerate(curve.arms):
                if values:
                    style = drawing.style(curves.index(curve) if single else i)
                    line, label = drawing.line(axes, values, style), curve.label if single else arms[i].label
                    if plot.marks:
                        marks = _draw_marks(axes, values, "black" if single else style["color"])
                        label = label if single else f"{drawing.one_line(label, 60)}: {', '.join(marks)}"
                        entries |= {label: line} | (marks if single else {})
                    else:
                        entries[label] = line
            for accuracy in (teachers or {}).get(curve.label, ()):
                entries["teacher’s accuracy"] = axes.axhline(accuracy, color="black", linestyle="--", linewidth=1)
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


def _draw_marks(axes: Axes, runs: list[pd.Series], colour: str) -> dict[str, Artist]:
    """Draw the median (dashed), 95th percentile (dotted) and maximum over all steps and runs.

    Returns:
        the marks by their text in the legend.
    """
    values = pd.concat(runs).dropna()
    middle, p95, largest = values.median(), values.quantile(0.95), values.max()
    step = values.index[values.argmax()]
    return {
        f"median {middle:.3g}": axes.axhline(middle, linestyle="--", color=colour, linewidth=1),
        f"p95 {p95:.3g}": axes.axhline(p95, linestyle=":", color=colour, linewidth=1),
        f"max {largest:.3g} at step {step}": axes.plot(
            step, largest, "v", clip_on=False, zorder=5, color=colour, linewidth=1
        )[0],
    }


def draw_log_ratio(picture: Picture, arms: list[Arm], _: Teacher) -> Figure | None:
    """Draw the mean, the median and bands between quantiles over tokens, one panel per arm.

    If an arm has several runs, each line is the median over them.
    """
    names = {name for arm in arms for run in arm.runs for name in run.metrics if name.startswith(LOG_RATIO)}
    levels = sorted(int(name[-2:]) for name in names if name[-3:-2] == "p")
    bands = {
        f"p{low:02d} to p{100 - low:02d}": (f"{LOG_RATIO}p{low:02d}", f"{LOG_RATIO}p{100 - low:02d}")
        for low in levels
        if low < 50 and 100 - low in levels
    }
    lines = {"mean": f"{LOG_RATIO}mean"} | ({"median": f"{LOG_RATIO}p50"} if 50 in levels else {})
    wanted = [*lines.values(), *(name for ends in bands.values() for name in ends)]
    for name in wanted:
        picture.remark_missing(name, arms, [arm.find(name) for arm in arms])
    medians = [{name: median(found) for name in wanted if (found := arm.series(name))} for arm in arms]
    # A band with one end can't be drawn.
    shapes = [*({name} for name in lines.values()), *map(set, bands.values())]
    drawn = [i for i, values in enumerate(medians) if any(shape <= values.keys() for shape in shapes)]
    if not drawn:
        return None
    figure, grid = drawing.figure(len(drawn))
    # Narrower bands are darker.
    alphas = [0.15 * (n + 1) for n in range(len(bands))]
    for axes, i in zip(grid, drawn, strict=True):
        values, colour = medians[i], drawing.style(i)["color"]
        for (low, high), alpha in zip(bands.values(), alphas, strict=True):
            if low in values and high in values:
                below, above = values[low].align(values[high])
                drawing.band(axes, drawing.smooth(below), drawing.smooth(above), colour, alpha)
        for name, dashes in zip(lines.values(), drawing.DASHES, strict=False):
            if name in values:
                drawing.line(axes, [values[name]], {"color": colour, "linestyle": dashes})
        axes.axhline(0, color="black", linewidth=0.8)
        if len(drawn) > 1:
            drawing.title(axes, arms[i].label)
        axes.set_ylabel("log π_T − log π_old [nats]")
    drawing.share_limits(grid)
    colour = drawing.style(drawn[0])["color"] if len(drawn) == 1 else drawing.DARK
    entries: dict[str, Artist] = {
        label: Line2D([], [], color=colour, linestyle=dashes)
        for (label, name), dashes in zip(lines.items(), drawing.DASHES, strict=False)
        if name in picture.metrics
    }
    for label, alpha in zip(bands, alphas, strict=True):
        entries[label] = Patch(facecolor=(colour, alpha), edgecolor=(colour, 0.4))
    drawing.legend(figure, entries)
    return figure


def draw_warnings(picture: Picture, arms: list[Arm], _: Teacher) -> Figure | None:
    """Draw one row per kind of warning that was raised, with one line per run.

    A line is thin over the steps that were checked, and thick at the steps that raised the warning.
    """
    kinds = sorted({name for arm in arms for run in arm.runs for name in run.metrics if name.startswith(WARNING)})
    found = [[any_finite(run.metrics[k] for k in kinds if k in run.metrics) for run in arm.runs] for arm in arms]
    if not picture.remark_missing(f"{WARNING}*", arms, found):
        return None
    raised = [k for k in kinds if any(len(warned(x)) for arm in arms for x in arm.series(k))]
    for kind in kinds:
        if kind not in raised:
            picture.remark("no warning of", kind.removeprefix(WARNING))
    if not raised:
        return None
    runs = [(i, run) for i, arm in enumerate(arms) for run in arm.runs]
    figure, (axes,) = drawing.figure(1, height=max(2.4, 1 + len(raised) * max(0.3, 0.11 * len(runs))))
    entries: dict[str, Artist] = {}
    for row, kind in enumerate(raised):
        for lane, (i, run) in enumerate(runs):
            values = run.metrics.get(kind)
            if is_finite(values):
                y = row + 0.8 * ((lane + 0.5) / len(runs) - 0.5)
                checked = values.dropna().index
                colour = drawing.style(i)["color"]
                axes.plot([checked[0], checked[-1]], [y, y], color=colour, alpha=0.5, linewidth=0.8, zorder=1)
                bars = _intervals(warned(values), checked[-1] - checked[0] + 1)
                height = min(0.6 / len(runs), 0.4)
                axes.broken_barh(bars, (y - height / 2, height), color=colour, linewidth=1)
                entries[arms[i].label] = Patch(color=colour)
    drawing.set_rows(axes, [kind.removeprefix(WARNING) for kind in raised])
    drawing.legend(figure, entries if len(arms) > 1 else {})
    return figure


def _intervals(steps: pd.Index, span: int) -> list[tuple[float, float]]:
    """Return the start and the width of each run of neighbouring steps, at a resolution of 1/(2 BINS) of the span."""
    size = -(-span // (2 * BINS))
    bins = np.unique(steps.to_numpy() // size)
    return [
        (float(piece[0] * size - 0.5), float((piece[-1] - piece[0] + 1) * size))
        for piece in np.split(bins, np.flatnonzero(np.diff(bins) > 1) + 1)
        if len(piece)
    ]
