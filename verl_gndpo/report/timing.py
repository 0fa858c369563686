# SPDX-License-Identifier: Apache-2.0
"""Plots of what a step spends its time on, and of when the plugin warned."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from verl_gndpo.report import drawing
from verl_gndpo.report.logs import WARNING, Arm, warned
from verl_gndpo.report.picture import Picture, any_finite, is_finite, median, remark_missing, series
from verl_gndpo.report.table import Teacher

TIMING = "timing_s/"
# In so many pieces a long run is cut.
BINS = 200
# Runs while the rollout does, not beside it.
PARALLEL = "teacher_ahead"
# Of the plugin's making, and so shown however short it is.
DIAGNOSTICS = "gndpo_diagnostics"


def draw_timing(picture: Picture, arms: list[Arm], _: Teacher) -> Figure | None:
    """One arm: stages stacked over steps. Several: a bar an arm, of mean seconds a step."""
    found = [
        [any_finite(x for name, x in run.metrics.items() if name.startswith(TIMING)) for run in arm.runs]
        for arm in arms
    ]
    if not remark_missing(picture, f"{TIMING}*", arms, found):
        return None
    picture.metrics.append(f"{TIMING}*")
    tables = [seconds_by_stage(arm) for arm in arms]
    means = pd.concat([table.mean() for table in tables], axis=1).fillna(0).T
    stages = means.mean().drop("other", errors="ignore").sort_values(ascending=False).index
    shown = [*sorted(stages, key=lambda stage: stage != DIAGNOSTICS)[: len(drawing.COLOURS)], "other"]
    shown.sort(key=[*stages, "other"].index)
    colours = dict(zip(shown, (*drawing.COLOURS[: len(shown) - 1], drawing.GREY), strict=True))
    single = len(arms) == 1
    figure, (axes,) = drawing.figure(1, height=2.9 if single else max(2.9, 1 + 0.35 * len(arms)))
    if single:
        _stack(axes, _fold(tables[0], shown), colours)
    else:
        left = np.zeros(len(arms))
        for stage, seconds in _fold(means, shown).items():
            axes.barh(range(len(arms)), seconds, left=left, color=colours[stage], height=0.6)
            left += seconds.to_numpy()
        drawing.set_rows(axes, [arm.label for arm in arms])
        drawing.set_values_across(axes, "mean time of a step [s]")
    used = {stage for table in tables for stage in _fold(table, shown).any().loc[lambda any_time: any_time].index}
    totals = _fold(means, shown).iloc[0] if single else {}
    drawing.legend(
        figure,
        {
            f"{stage} {totals[stage]:.3g} s" if single else stage: Patch(color=colour)
            for stage, colour in colours.items()
            if stage in used
        },
    )
    return figure


def seconds_by_stage(arm: Arm) -> pd.DataFrame:
    """Median over the arm's runs, a row a step, a column a stage and "other"; 0 where a stage didn't run.

    Stages are disjoint: what one is timed within another is taken out of that.
    """
    names = sorted({name for run in arm.runs for name in run.metrics if name.startswith(TIMING)})
    found = {name.removeprefix(TIMING): x for name in names if (x := series(arm, name))}
    seconds = pd.DataFrame({stage: median(x) for stage, x in found.items() if stage != PARALLEL}).fillna(0)
    _take_out(seconds, DIAGNOSTICS, "adv")
    if "step" in seconds:
        step = seconds.pop("step")
        # verl validates after it has stopped the clock of the step.
        rest = step - seconds.drop(columns="testing", errors="ignore").sum(axis=1)
        if rest.median() < 0 and "teacher_log_prob" in seconds:
            # With a baseline that needs the student's distribution the teacher is asked within that stage of verl.
            rest += _take_out(seconds, "teacher_log_prob", "old_log_prob")
        seconds["other"] = rest.clip(lower=0)
    return seconds


def _take_out(seconds: pd.DataFrame, inner: str, outer: str) -> pd.Series | float:
    """Make `outer` exclude `inner`; returns by how much it shrank."""
    if inner not in seconds or outer not in seconds:
        return 0.0
    taken = seconds[[inner, outer]].min(axis=1)
    seconds[outer] -= taken
    return taken


def _fold(seconds: pd.DataFrame, shown: list[str]) -> pd.DataFrame:
    """The stages beyond those that have a colour, added to "other"."""
    rest = seconds[[stage for stage in seconds if stage not in shown[:-1]]].sum(axis=1)
    return seconds.reindex(columns=shown[:-1], fill_value=0).assign(other=rest)


def _stack(axes: Axes, seconds: pd.DataFrame, colours: dict[str, str]) -> None:
    """Over steps, means of bins where there are many."""
    size = -(-len(seconds) // BINS)
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


def draw_warnings(picture: Picture, arms: list[Arm], _: Teacher) -> Figure | None:
    """A row a kind that was raised, in it a line a run where that was judged, thick where it was raised."""
    kinds = sorted({name for arm in arms for run in arm.runs for name in run.metrics if name.startswith(WARNING)})
    found = [[any_finite(run.metrics[k] for k in kinds if k in run.metrics) for run in arm.runs] for arm in arms]
    if not remark_missing(picture, f"{WARNING}*", arms, found):
        return None
    picture.metrics.append(f"{WARNING}*")
    raised = [k for k in kinds if any(len(warned(x)) for arm in arms for x in series(arm, k))]
    for kind in kinds:
        if kind not in raised:
            picture.remark("no warning of", kind.removeprefix(WARNING))
    if not raised:
        return None
    runs = [(i, run) for i, arm in enumerate(arms) for run in arm.runs]
    figure, (axes,) = drawing.figure(1, height=max(2.4, 1 + len(raised) * max(0.3, 0.11 * len(runs))))
    entries = {}
    for row, kind in enumerate(raised):
        for lane, (i, run) in enumerate(runs):
            values = run.metrics.get(kind)
            if is_finite(values):
                y = row + 0.8 * ((lane + 0.5) / len(runs) - 0.5)
                judged = values.dropna().index
                colour = drawing.style(i)["color"]
                axes.plot([judged[0], judged[-1]], [y, y], color=colour, alpha=0.5, linewidth=0.8, zorder=1)
                bars = _intervals(warned(values), judged[-1] - judged[0] + 1)
                height = min(0.6 / len(runs), 0.4)
                axes.broken_barh(bars, (y - height / 2, height), color=colour, linewidth=1)
                entries[arms[i].label] = Patch(color=colour)
    drawing.set_rows(axes, [kind.removeprefix(WARNING) for kind in raised])
    drawing.legend(figure, entries if len(arms) > 1 else {})
    return figure


def _intervals(steps: pd.Index, span: int) -> list[tuple[float, float]]:
    """Where and how wide, at a resolution of 1/(2 BINS) of the span; neighbours as one."""
    size = -(-span // (2 * BINS))
    bins = np.unique(steps.to_numpy() // size)
    return [
        (float(piece[0] * size - 0.5), float((piece[-1] - piece[0] + 1) * size))
        for piece in np.split(bins, np.flatnonzero(np.diff(bins) > 1) + 1)
        if len(piece)
    ]
