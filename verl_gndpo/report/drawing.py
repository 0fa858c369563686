# SPDX-License-Identifier: Apache-2.0
"""Define what a plot is, and how lines, bands and legends look.

Text from logs is drawn as it is, never as mathematics.
"""

import io
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from verl_gndpo.report.logs import Arm, is_finite
from verl_gndpo.report.table import Teacher

# Okabe and Ito's colours for all kinds of colour vision, without yellow, which is too light for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
Dashes = Literal["-", "--", "-.", ":"]
DASHES: tuple[Dashes, ...] = ("-", "--", "-.", ":")
GREY, DARK = "#BBBBBB", "#555555"

# In inches. A plot is as wide as the page, or half as wide.
PAGE_WIDTH = 10.8
DPI = 120
TICKS = (1, 2, 5, 10)

# Each value of a line with at most this many has a dot.
DOTS = 40
# A line with more values is drawn as a running median over 1/SMOOTHING of them, above the values.
LONG = 100
SMOOTHING = 20
# A longer line is drawn from the extremes of this many bins.
BINS = 800


@dataclass(frozen=True)
class Metric:
    """A metric in a plot.

    If there is one arm, metrics with the same unit share axes.

    Attributes:
        names: its possible names; the first that any run has is drawn. A * stands for each of several groups.
        label, unit: its name in the plot, and the label of its axis.
    """

    names: tuple[str, ...]
    label: str
    unit: str


@dataclass(frozen=True)
class Plot:
    """A plot of the report.

    Attributes:
        section: the heading of the page that it is under.
        name: the name of its PNG, without ".png".
        title: the text above it.
        reading: a caption that says what to look for.
        draw: makes the figure, and fills in the picture's metrics and remarks. Returns None if no run has its data.
        metrics: the metrics that it shows.
        logarithmic: use a logarithmic axis if some values are far from the others.
        marks: mark the median, 95th percentile and maximum of each arm, and give their values in the legend.
        limit: the value at which to draw a line across.
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
    """A drawn plot, or the reasons why it isn't drawn.

    Attributes:
        plot: what is drawn.
        png: None if the plot isn't drawn.
        wide: True if it is as wide as the page.
        metrics: names of the metrics that are drawn.
        missing: names that aren't drawn, by reason.
    """

    plot: Plot
    png: bytes | None = None
    wide: bool = False
    metrics: list[str] = field(default_factory=list)
    missing: dict[str, list[str]] = field(default_factory=dict)

    def remark(self, reason: str, name: str) -> None:
        """Say why something isn't drawn. Names with the same reason share a remark."""
        self.missing.setdefault(reason, []).append(name)

    def remark_missing(self, name: str, arms: list[Arm], found: list[list[pd.Series | None]]) -> bool:
        """Say which arms, or how many runs of an arm, lack a metric; if any run has a finite value, count it as drawn.

        Args:
            name: the metric, or a pattern for several.
            found: its values for each run of each arm; None if the run doesn't log it.

        Returns:
            True if any run has a finite value.
        """
        absent = [sum(x is None for x in runs) for runs in found]
        useless = [sum(not is_finite(x) for x in runs) - count for runs, count in zip(found, absent, strict=True)]
        if sum(absent) + sum(useless) == sum(map(len, found)):
            self.remark("never finite:" if any(useless) else "no run logs", name)
            return False
        for reason, counts in (("not in the log of", absent), ("never finite in the log of", useless)):
            lacking = [
                arm.label + (f" ({count} of {len(arm.runs)} runs)" if count < len(arm.runs) else "")
                for arm, count in zip(arms, counts, strict=True)
                if count
            ]
            if lacking:
                self.remark(f"{reason} {', '.join(lacking)}:", name)
        self.metrics.append(name)
        return True

    @property
    def remarks(self) -> list[str]:
        """Return the reasons with their names, in words."""
        return [f"{reason} {', '.join(names)}" for reason, names in self.missing.items()]


class Style(TypedDict):
    """How a line looks, as arguments of matplotlib."""

    color: str
    linestyle: Dashes


def figure(panels: int, height: float = 2.9, wide: bool = False) -> tuple[Figure, list[Axes]]:
    """Make a figure with axes over steps, up to three in a row.

    Args:
        panels: number of axes.
        height: of a row of axes, in inches.
        wide: make one panel as wide as the page. Otherwise it is half as wide.
    """
    columns = 2 if panels == 4 else min(panels, 3)
    rows = math.ceil(panels / columns)
    width = PAGE_WIDTH / (1 if wide or columns > 1 else 2)
    made = Figure(figsize=(width, 0.7 + height * rows), dpi=DPI)
    made.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    grid = list(made.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[panels:]:
        axes.remove()
    for axes in grid[:panels]:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=TICKS))
        axes.ticklabel_format(axis="y", useOffset=False)
    return made, grid[:panels]


def is_wide(figure: Figure) -> bool:
    """Return True if a figure is as wide as the page, not half as wide."""
    return figure.get_figwidth() == PAGE_WIDTH


def png(figure: Figure) -> bytes:
    """Render a figure as a PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Labels may use a script that matplotlib's font lacks. The page has them as text.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def legend(figure: Figure, entries: Mapping[str, Artist]) -> None:
    """Add a legend below the axes, where it covers no data. Add none without entries."""
    if not entries:
        return
    room = int(12.6 * figure.get_figwidth())
    labels = [one_line(label, room - 6 if label.isascii() else room // 2) for label in entries]
    columns = max(1, min(len(labels), room // (max(map(len, labels)) + 7)))
    figure.set_figheight(figure.get_figheight() + 0.18 * (math.ceil(len(labels) / columns) - 1))
    handles = list(entries.values())
    made = figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=9)
    for text in made.get_texts():
        text.set_parse_math(False)


def headline(figure: Figure, text: str) -> None:
    """Add a headline on the left, where a narrow screen shows it for a wide figure, too."""
    figure.suptitle(text, x=0.015, ha="left", fontweight="bold")


def title(axes: Axes, text: str) -> None:
    """Set the title of one panel."""
    assert isinstance(axes.figure, Figure)
    width = axes.figure.get_figwidth() / place(axes).get_gridspec().ncols
    axes.set_title(one_line(text, int(11 * width)), fontsize=10, parse_math=False)


def place(axes: Axes) -> SubplotSpec:
    """Return the place of a panel in the figure's grid."""
    found = axes.get_subplotspec()
    assert found is not None
    return found


def set_rows(axes: Axes, labels: list[str]) -> None:
    """Make one row per label, from the top down at 0, 1, ..., without grid lines across."""
    axes.set_yticks(range(len(labels)), [one_line(label, 26) for label in labels], parse_math=False)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(False, axis="y")


def set_values_across(axes: Axes, label: str) -> None:
    """Make the horizontal axis one of values, not of steps. It starts at 0 if no value is negative."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=TICKS))
    if axes.dataLim.xmin >= 0:
        axes.set_xlim(0, _beyond(axes.dataLim.xmax))


def set_shares(axes: Axes) -> None:
    """Start the vertical axis at 0, so that a small share looks small."""
    axes.set_ylim(0, _beyond(axes.dataLim.ymax))


def _beyond(greatest: float) -> float:
    """Return the end of an axis from 0 that keeps the greatest value off the edge."""
    return 1.05 * greatest if greatest > 0 else 1.0


def one_line(text: str, limit: int) -> str:
    """Return a text on one line, with the middle cut out if it is longer than `limit` characters."""
    text = " ".join(text.split()).encode("utf-8", "replace").decode()
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-limit // 2 :]}"
    # Matplotlib hides labels that start with an underscore.
    return " " * text.startswith("_") + text


def style(index: int) -> Style:
    """Return the style of the line with this index. All colours are used before dashes repeat them."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}


def line(axes: Axes, runs: list[pd.Series], style: Style) -> Line2D:
    """Draw the median over runs, and a band from the least to the greatest if there are several. NaN makes a gap."""
    table = pd.concat(runs, axis=1).sort_index()
    middle = table.median(axis=1)
    if len(runs) > 1:
        band(axes, table.min(axis=1), table.max(axis=1), style["color"])
    elif len(middle) > LONG:
        faint = thin(middle)
        axes.plot(faint.index, faint, color=style["color"], linewidth=0.6, alpha=0.35)
    drawn = thin(smooth(middle))
    known = np.pad(drawn.notna().to_numpy(), 1)
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    dots = np.flatnonzero(known[1:-1] if len(drawn) <= DOTS else alone).tolist()
    return axes.plot(drawn.index, drawn, linewidth=1.6, marker="o", markersize=3, markevery=dots, **style)[0]


def band(axes: Axes, low: pd.Series, high: pd.Series, colour: str, alpha: float = 0.2) -> Artist:
    """Draw the area between two lines over the same steps."""
    starts = np.arange(0, len(low), math.ceil(len(low) / BINS))
    edges = np.fmin.reduceat(low.to_numpy(), starts), np.fmax.reduceat(high.to_numpy(), starts)
    return axes.fill_between(
        low.index[starts], *edges, facecolor=(colour, alpha), edgecolor=(colour, 0.4), linewidth=0.6
    )


def smooth(values: pd.Series) -> pd.Series:
    """Return the running median of a long line, with its gaps. Return a short line as it is."""
    if len(values) <= LONG:
        return values
    return values.rolling(len(values) // SMOOTHING, center=True, min_periods=1).median().where(values.notna())


def thin(values: pd.Series) -> pd.Series:
    """Reduce a long line to points that look the same: the least, the greatest and the first gap of each bin."""
    size = math.ceil(len(values) / BINS)
    if size < 4:
        return values
    bins = np.full((math.ceil(len(values) / size), size), np.nan)
    bins.flat[: len(values)] = values
    gaps = np.isnan(bins)
    least, greatest = np.where(gaps, np.inf, bins).argmin(axis=1), np.where(gaps, -np.inf, bins).argmax(axis=1)
    columns = np.stack([least, greatest, gaps.argmax(axis=1)])
    kept = np.unique(columns + size * np.arange(len(bins)))
    return values.iloc[kept[kept < len(values)]]


def share_limits(panels: list[Axes]) -> None:
    """Give all panels the same vertical range."""
    ends = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))


def set_log_scale(axes: Axes, runs: list[pd.Series]) -> None:
    """Make the vertical axis logarithmic if all values are positive and some are far from the others."""
    values = pd.concat(runs).dropna()
    if len(values) and values.min() > 0 and values.max() > 10 * values.median():
        axes.set_yscale("log")
        few_decades = values.max() < 1e4 * values.min()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
