# SPDX-License-Identifier: Apache-2.0
"""How lines, bands and legends look. Text from logs is drawn as it is, never as mathematics."""

import io
import math
import warnings

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

# Okabe and Ito's colours for all kinds of colour vision, without yellow, which is too light for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
GREY, DARK = "#BBBBBB", "#555555"

# Inches, of which a plot takes all or half.
PAGE_WIDTH = 10.8
DPI = 120
TICKS = (1, 2, 5, 10)

# Up to so many values, each has a dot; above LONG, a running median over 1/SMOOTHING of them is drawn over the values.
DOTS = 40
LONG = 100
SMOOTHING = 20
# A long line is drawn from the extremes of so many bins.
BINS = 800


def figure(panels: int, height: float = 2.9, wide: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with that many axes over steps, of up to three in a row; `height` of a row in inches.

    One panel takes half the width of the page, unless `wide`.
    """
    columns = 2 if panels == 4 else min(panels, 3)
    rows = math.ceil(panels / columns)
    width = PAGE_WIDTH / (1 if wide or columns > 1 else 2)
    made = Figure(figsize=(width, 0.7 + height * rows), dpi=DPI, layout="constrained")
    made.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
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
    """Whether it takes the whole width of the page, not half of it."""
    return figure.get_figwidth() == PAGE_WIDTH


def png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A label may be in a script that matplotlib's font lacks; the page has it as text.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def legend(figure: Figure, entries: dict[str, Artist]) -> None:
    """Below the axes, where it covers no data. Nothing without entries."""
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
    """On the left, as the legend, where a narrow screen shows it of a wide figure, too."""
    figure.suptitle(text, x=0.015, ha="left", fontweight="bold")


def title(axes: Axes, text: str) -> None:
    """Of one panel."""
    panel = axes.figure.get_figwidth() / axes.get_subplotspec().get_gridspec().ncols
    axes.set_title(one_line(text, int(11 * panel)), fontsize=10, parse_math=False)


def set_rows(axes: Axes, labels: list[str]) -> None:
    """A row a label from the top down, at 0, 1, ..., without lines across."""
    axes.set_yticks(range(len(labels)), [one_line(label, 26) for label in labels], parse_math=False)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(False, axis="y")


def set_values_across(axes: Axes, label: str) -> None:
    """Not steps; from 0 where none is below."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=TICKS))
    if axes.dataLim.xmin >= 0:
        axes.set_xlim(0, _beyond(axes.dataLim.xmax))


def set_shares(axes: Axes) -> None:
    """From 0, so that little looks like little."""
    axes.set_ylim(0, _beyond(axes.dataLim.ymax))


def _beyond(greatest: float) -> float:
    """The end of a range from 0 in which nothing is at the edge."""
    return 1.05 * greatest if greatest > 0 else 1.0


def one_line(text: str, limit: int) -> str:
    """On one line, without the middle of what is too long. Matplotlib hides labels that start with an underscore."""
    text = " ".join(text.split()).encode("utf-8", "replace").decode()
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-limit // 2 :]}"
    return " " * text.startswith("_") + text


def style(index: int) -> dict[str, str]:
    """Colour, then dashes."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}


def line(axes: Axes, runs: list[pd.Series], style: dict[str, str]) -> Line2D:
    """The median over runs; for several, with a band from the least to the greatest. Gaps where values are NaN."""
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
    """The area between two lines over the same steps."""
    starts = np.arange(0, len(low), math.ceil(len(low) / BINS))
    edges = np.fmin.reduceat(low.to_numpy(), starts), np.fmax.reduceat(high.to_numpy(), starts)
    return axes.fill_between(
        low.index[starts], *edges, facecolor=(colour, alpha), edgecolor=(colour, 0.4), linewidth=0.6
    )


def smooth(values: pd.Series) -> pd.Series:
    """The running median of a long line; gaps stay gaps. A short one as it is."""
    if len(values) <= LONG:
        return values
    return values.rolling(len(values) // SMOOTHING, center=True, min_periods=1).median().where(values.notna())


def thin(values: pd.Series) -> pd.Series:
    """What looks like a long line, in few points: the least, the greatest and the first gap of each bin."""
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
    """The same vertical range for all."""
    ends = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))


def set_log_scale(axes: Axes, runs: list[pd.Series]) -> None:
    """Where all values are positive and some are far from the others."""
    values = pd.concat(runs).dropna()
    if len(values) and values.min() > 0 and values.max() > 10 * values.median():
        axes.set_yscale("log")
        few_decades = values.max() < 1e4 * values.min()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
