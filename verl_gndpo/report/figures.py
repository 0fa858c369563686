# SPDX-License-Identifier: Apache-2.0
"""The plots of a report: what each shows, and of which metrics."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from verl_gndpo.report import draw
from verl_gndpo.report.read import Arm
from verl_gndpo.report.table import Teacher

# As docs/metrics.md.
CORRELATION_LIMIT = 0.99
# In so many pieces the stages of a long run are stacked.
STACK_BINS = 200


@dataclass(frozen=True)
class Metric:
    """A line of a plot: the first of `names` that any run has."""

    names: tuple[str, ...]
    label: str
    unit: str


@dataclass(frozen=True)
class Plot:
    """`name` is the PNG's, `reading` tells what to look for; metrics of one unit share axes where there is one arm."""

    name: str
    title: str
    reading: str
    metrics: tuple[Metric, ...] = ()
    logarithmic: bool = False


@dataclass(frozen=True)
class Curve:
    """A line an arm, from one series a run."""

    label: str
    unit: str
    arms: list[list[pd.Series]]


@dataclass
class Picture:
    """A drawn plot, or why there is none: `png` is None, and `remarks` says what is missing."""

    plot: Plot
    png: bytes | None = None
    metrics: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


ACCURACY = Plot("accuracy", "Validation accuracy", "Dashed: the teacher, where its accuracy is known.")
GRAD_NORM = Plot(
    "grad_norm",
    "Gradient norm",
    "Before clipping. A maximum far above the median: single steps that throw the student off.",
    (Metric(("actor/grad_norm",), "gradient norm", "gradient norm"),),
    logarithmic=True,
)
LOG_RATIO = Plot(
    "log_ratio",
    "Log-ratio of teacher and student",
    "log π_T − log π_old of the sampled tokens, before the bound: the mean rises towards 0 as the student approaches "
    "the teacher. Bands: between quantiles over tokens.",
)
CORRELATION = Plot(
    "correlation",
    "Correlation of rollout and actor probabilities",
    f"Below {CORRELATION_LIMIT} the rollout and the training engine disagree, and no signal helps.",
    (Metric(("training/rollout_actor_probs_pearson_corr",), "correlation", "Pearson correlation"),),
)
TIMING = Plot(
    "timing",
    "Time per stage",
    "Stages as verl times them; “other” is what timing_s/step has beyond them. Validation is “testing”.",
)
PLOTS = (
    ACCURACY,
    Plot(
        "reward",
        "Task reward",
        "Of the rollouts that are trained on.",
        (Metric(("critic/score/mean", "critic/rewards/mean"), "mean", "reward"),),
    ),
    GRAD_NORM,
    LOG_RATIO,
    Plot(
        "signal",
        "Mean and deviation of the bounded signal",
        "What whitening subtracts (mu) and divides by (sigma).",
        (Metric(("gndpo/mu",), "mu", "nats"), Metric(("gndpo/sigma",), "sigma", "nats")),
    ),
    Plot(
        "gain",
        "Gain",
        "What the centred signal is multiplied by. Growing without end: noise is re-inflated near convergence.",
        (Metric(("gndpo/gain",), "gain", "gain [1/nats]"),),
        logarithmic=True,
    ),
    Plot(
        "clipping",
        "Tokens beyond the bound",
        "More than a few per cent: teacher and student disagree badly, or don't fit.",
        (
            Metric(("gndpo/clipped_low_share",), "below −clip", "share of tokens"),
            Metric(("gndpo/clipped_high_share",), "above +clip", "share of tokens"),
        ),
    ),
    Plot(
        "sign_flips",
        "Sign flips",
        "Tokens whose advantage and bounded signal differ in sign: disliked but reinforced, or the reverse.",
        (Metric(("gndpo/sign_flip_share",), "sign flips", "share of tokens"),),
    ),
    Plot(
        "response_length",
        "Response length",
        "Many responses at the limit are cut off, and their end is not learned.",
        (
            Metric(("response_length/mean",), "mean", "tokens"),
            Metric(("response_length/max",), "max", "tokens"),
            Metric(("response_length/clip_ratio",), "at the limit", "share of responses"),
        ),
    ),
    CORRELATION,
    TIMING,
)


def draw_plots(arms: list[Arm], teacher: Teacher) -> list[Picture]:
    """All plots in order, each with what it shows or why it is left out."""
    return [_draw_plot(plot, arms, teacher) for plot in PLOTS]


def _draw_plot(plot: Plot, arms: list[Arm], teacher: Teacher) -> Picture:
    picture = Picture(plot)
    if plot is LOG_RATIO:
        figure = _draw_log_ratio(picture, arms)
    elif plot is TIMING:
        figure = _draw_timing(picture, arms)
    else:
        curves = _accuracy_curves(picture, arms) if plot is ACCURACY else _metric_curves(picture, arms)
        figure = _draw_curves(plot, curves, arms, teacher) if curves else None
    if figure is not None:
        figure.suptitle(plot.title, fontweight="bold")
        picture.png = draw.png(figure)
    return picture


def _series(arm: Arm, name: str) -> list[pd.Series]:
    return [run.metrics[name] for run in arm.runs if name in run.metrics]


def _remark_missing(picture: Picture, name: str, arms: list[Arm], found: list[int]) -> None:
    """Say which arms, or how many runs of them, lack a metric; `found`: how many runs of each arm have it."""
    missing = [
        arm.label + (f" ({len(arm.runs) - count} of {len(arm.runs)} runs)" if count else "")
        for arm, count in zip(arms, found, strict=True)
        if count < len(arm.runs)
    ]
    if not any(found):
        picture.remarks.append(f"no run logs {name}")
    elif missing:
        picture.remarks.append(f"{name} is not in the log of: {', '.join(missing)}")


def _metric_curves(picture: Picture, arms: list[Arm]) -> list[Curve]:
    curves = []
    for metric in picture.plot.metrics:
        name = next((n for n in metric.names if any(_series(arm, n) for arm in arms)), metric.names[0])
        curve = Curve(metric.label, metric.unit, [_series(arm, name) for arm in arms])
        _remark_missing(picture, name, arms, list(map(len, curve.arms)))
        if any(curve.arms):
            picture.metrics.append(name)
            curves.append(curve)
    return curves


def _accuracy_curves(picture: Picture, arms: list[Arm]) -> list[Curve]:
    curves = []
    for source in sorted({source for arm in arms for run in arm.runs for source in run.accuracy}):
        found = [[run.accuracy[source] for run in arm.runs if source in run.accuracy] for arm in arms]
        name = f"val-core/{source}/acc/mean@N"
        _remark_missing(picture, name, arms, list(map(len, found)))
        picture.metrics.append(name)
        curves.append(Curve(source, "accuracy", found))
    if not curves:
        picture.remarks.append("no run logs val-core/*/acc/mean@N")
    return curves


def _draw_curves(plot: Plot, curves: list[Curve], arms: list[Arm], teacher: Teacher) -> Figure:
    """One arm: curves of one unit in one panel. Several: a panel a curve, arms overlaid."""
    single = len(arms) == 1
    units = dict.fromkeys(curve.unit for curve in curves)
    panels = [[c for c in curves if c.unit == unit] for unit in units] if single else [[curve] for curve in curves]
    figure, grid = draw.figure(len(panels))
    entries: dict[str, Artist] = {}
    for axes, panel in zip(grid, panels, strict=True):
        for curve in panel:
            for i, series in enumerate(curve.arms):
                if series:
                    style = draw.style(curves.index(curve) if single else i)
                    line, label = draw.line(axes, series, style), curve.label if single else arms[i].label
                    marks = plot is GRAD_NORM
                    entries |= _mark_statistics(axes, line, label, series, single) if marks else {label: line}
            if plot is ACCURACY:
                entries |= _mark_teacher(axes, curve.label, arms, teacher)
        if plot is CORRELATION:
            entries[f"limit {CORRELATION_LIMIT}"] = axes.axhline(CORRELATION_LIMIT, color="black", linestyle=":")
        axes.set_ylabel(panel[0].unit)
        if len(panels) > 1:
            draw.title(axes, ", ".join(curve.label for curve in panel))
        if plot.logarithmic:
            draw.set_log_scale(axes, [series for curve in panel for runs in curve.arms for series in runs])
        elif panel[0].unit.startswith("share"):
            axes.set_ylim(bottom=0)
    draw.legend(figure, entries if len(entries) > 1 else {})
    return figure


def _mark_statistics(axes: Axes, line: Line2D, label: str, series: list[pd.Series], single: bool) -> dict[str, Artist]:
    """Median (dashed), 95th percentile (dotted) and maximum over all steps and runs; what the legend says."""
    values = pd.concat(series).dropna()
    if values.empty:
        return {label: line}
    median, p95, largest = values.median(), values.quantile(0.95), values.max()
    step = values.index[values.argmax()]
    look = {"color": "black" if single else line.get_color(), "linewidth": 1}
    marks = {
        f"median {median:.3g}": axes.axhline(median, linestyle="--", **look),
        f"p95 {p95:.3g}": axes.axhline(p95, linestyle=":", **look),
        f"max {largest:.3g} at step {step}": axes.plot(step, largest, "v", clip_on=False, zorder=5, **look)[0],
    }
    return {label: line} | marks if single else {f"{label}: {', '.join(marks)}": line}


def _mark_teacher(axes: Axes, source: str, arms: list[Arm], teacher: Teacher) -> dict[str, Artist]:
    known = {teacher.accuracy(run, source) for arm in arms for run in arm.runs if source in run.accuracy} - {None}
    lines = [axes.axhline(value, color="black", linestyle="--", linewidth=1) for value in sorted(known)]
    return {"teacher’s accuracy": lines[0]} if lines else {}


def _draw_log_ratio(picture: Picture, arms: list[Arm]) -> Figure | None:
    """The mean, and bands between quantiles; of several runs or arms, medians over runs and the widest band."""
    prefix = "gndpo/log_ratio/"
    names = sorted({name for arm in arms for run in arm.runs for name in run.metrics if name.startswith(prefix)})
    lower = [int(name[-2:]) for name in names if name[-2:].isdigit() and int(name[-2:]) < 50]
    pairs = [(low, 100 - low) for low in lower if f"{prefix}p{100 - low:02d}" in names]
    pairs = pairs if len(arms) == 1 else pairs[:1]
    wanted = [f"{prefix}mean", *(f"{prefix}p{level:02d}" for pair in pairs for level in pair)]
    picture.metrics += [name for name in wanted if name in names]
    for name in wanted:
        _remark_missing(picture, name, arms, [len(_series(arm, name)) for arm in arms])
    if not picture.metrics:
        return None
    figure, (axes,) = draw.figure(1)
    entries: dict[str, Artist] = {}
    for i, arm in enumerate(arms):
        style = draw.style(i)
        medians = {name: _median(_series(arm, name)) for name in wanted if _series(arm, name)}
        for low, high in pairs:
            ends = [medians.get(f"{prefix}p{level:02d}") for level in (low, high)]
            if all(end is not None for end in ends):
                low_end, high_end = map(draw.smooth, ends[0].align(ends[1]))
                area = draw.band(axes, low_end, high_end, style["color"], 0.2 / len(arms))
                entries[f"p{low:02d} to p{high:02d}" if len(arms) == 1 else arm.label] = area
        if wanted[0] in medians:
            entries["mean" if len(arms) == 1 else arm.label] = draw.line(axes, [medians[wanted[0]]], style)
    axes.axhline(0, color="black", linewidth=1)
    axes.set_ylabel("log π_T − log π_old [nats]")
    draw.legend(figure, entries)
    return figure


def _median(series: list[pd.Series]) -> pd.Series:
    return series[0] if len(series) == 1 else pd.concat(series, axis=1).sort_index().median(axis=1)


def _draw_timing(picture: Picture, arms: list[Arm]) -> Figure | None:
    """One arm: stages stacked over steps. Several: a bar an arm, of mean seconds a step."""
    tables = [_seconds_by_stage(arm) for arm in arms]
    timed = [sum(any(name.startswith("timing_s/") for name in run.metrics) for run in arm.runs) for arm in arms]
    _remark_missing(picture, "timing_s/*", arms, timed)
    if not any(timed):
        return None
    picture.metrics.append("timing_s/*")
    means = pd.concat([table.mean() for table in tables], axis=1).fillna(0).T
    stages = means.mean().drop("other", errors="ignore").sort_values(ascending=False).index
    shown = [*stages[: len(draw.COLOURS)], "other"]
    colours = dict(zip(shown, (*draw.COLOURS[: len(shown) - 1], draw.GREY), strict=True))
    figure, (axes,) = draw.figure(1)
    if len(arms) == 1:
        _stack(axes, _fold(tables[0], shown), colours)
    else:
        left = np.zeros(len(arms))
        for stage, seconds in _fold(means, shown).items():
            axes.barh(range(len(arms)), seconds, left=left, color=colours[stage], height=0.6)
            left += seconds.to_numpy()
        axes.set_yticks(range(len(arms)), [draw.one_line(arm.label, 30) for arm in arms], parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel("mean time of a step [s]")
    used = {stage for table in tables for stage in _fold(table, shown).any().loc[lambda any_time: any_time].index}
    draw.legend(figure, {stage: Patch(color=colour) for stage, colour in colours.items() if stage in used})
    return figure


def _seconds_by_stage(arm: Arm) -> pd.DataFrame:
    """Median over the arm's runs, a row a step, a column a stage and "other"; 0 where a stage didn't run."""
    names = sorted({name for run in arm.runs for name in run.metrics if name.startswith("timing_s/")})
    seconds = pd.DataFrame({name.removeprefix("timing_s/"): _median(_series(arm, name)) for name in names}).fillna(0)
    if "step" in seconds:
        step = seconds.pop("step")
        # verl validates after it has stopped the clock of the step.
        seconds["other"] = (step - seconds.drop(columns="testing", errors="ignore").sum(axis=1)).clip(lower=0)
    return seconds


def _fold(seconds: pd.DataFrame, shown: list[str]) -> pd.DataFrame:
    """The stages beyond those that have a colour, added to "other"."""
    rest = seconds[[stage for stage in seconds if stage not in shown[:-1]]].sum(axis=1)
    return seconds.reindex(columns=shown[:-1], fill_value=0).assign(other=rest)


def _stack(axes: Axes, seconds: pd.DataFrame, colours: dict[str, str]) -> None:
    """Over steps, means of bins where there are many."""
    size = -(-len(seconds) // STACK_BINS)
    bins = seconds.groupby(np.arange(len(seconds)) // size).mean()
    edges = np.append(seconds.index[::size], seconds.index[-1] + 1) - 0.5
    bottom = np.zeros(len(bins))
    for stage, heights in bins.items():
        axes.stairs(bottom + heights, edges, baseline=bottom, fill=True, color=colours[stage])
        bottom = bottom + heights.to_numpy()
    usual = np.quantile(bottom, 0.95)
    if bottom.max() > 2 * usual > 0:
        axes.set_ylim(0, 1.2 * usual)
        step = seconds.index[seconds.sum(axis=1).argmax()]
        text = f"up to {seconds.sum(axis=1).max():.3g} s (step {step}), beyond the axis"
        axes.text(0.99, 0.98, text, transform=axes.transAxes, ha="right", va="top", fontsize=9)
    axes.set_ylabel("time [s]")
