# SPDX-License-Identifier: Apache-2.0
"""Draw how the time of a step divides into stages."""

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from verl_gndpo.report import drawing
from verl_gndpo.report.drawing import Picture
from verl_gndpo.report.logs import Arm, any_finite, median
from verl_gndpo.report.table import Teacher

TIMING = "timing_s/"
# The steps of a long run are averaged in this many bins.
BINS = 200
# It runs while the rollout runs and takes no time of its own.
PARALLEL = "teacher_ahead"
# The plugin adds this stage, so it is shown however short it is.
DIAGNOSTICS = "gndpo_diagnostics"


def draw_timing(picture: Picture, arms: list[Arm], _: Teacher) -> Figure | None:
    """Draw the stages stacked over steps. If there are several arms: one bar per arm, of the mean seconds per step."""
    found = [
        [any_finite(x for name, x in run.metrics.items() if name.startswith(TIMING)) for run in arm.runs]
        for arm in arms
    ]
    if not picture.remark_missing(f"{TIMING}*", arms, found):
        return None
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
    totals = _fold(means, shown).iloc[0]
    entries: dict[str, Artist] = {}
    for stage, colour in colours.items():
        if stage in used:
            entries[f"{stage} {totals[stage]:.3g} s" if single else stage] = Patch(color=colour)
    drawing.legend(figure, entries)
    return figure


def seconds_by_stage(arm: Arm) -> pd.DataFrame:
    """Return the seconds of each stage and of "other": the median over runs, one row per step; 0 if a stage didn't run.

    The stages are disjoint: if one is timed within another, its time is subtracted from the other's.
    """
    names = sorted({name for run in arm.runs for name in run.metrics if name.startswith(TIMING)})
    found = {name.removeprefix(TIMING): x for name in names if (x := arm.series(name))}
    seconds = pd.DataFrame({stage: median(x) for stage, x in found.items() if stage != PARALLEL}).fillna(0)
    _subtract(seconds, DIAGNOSTICS, "adv")
    if "step" in seconds:
        step = seconds.pop("step")
        # verl validates after it has stopped the step's timer.
        rest = step - seconds.drop(columns="testing", errors="ignore").sum(axis=1)
        if rest.median() < 0 and "teacher_log_prob" in seconds:
            # A baseline that needs the student's distribution asks the teacher within verl's stage old_log_prob.
            rest += _subtract(seconds, "teacher_log_prob", "old_log_prob")
        seconds["other"] = rest.clip(lower=0)
    return seconds


def _subtract(seconds: pd.DataFrame, inner: str, outer: str) -> pd.Series | float:
    """Subtract the time of the stage `inner` from the stage `outer`, in place. Return what was subtracted."""
    if inner not in seconds or outer not in seconds:
        return 0.0
    taken = seconds[[inner, outer]].min(axis=1)
    seconds[outer] -= taken
    return taken


def _fold(seconds: pd.DataFrame, shown: list[str]) -> pd.DataFrame:
    """Add the stages that have no colour to "other"."""
    rest = seconds[[stage for stage in seconds if stage not in shown[:-1]]].sum(axis=1)
    return seconds.reindex(columns=shown[:-1], fill_value=0).assign(other=rest)


def _stack(axes: Axes, seconds: pd.DataFrame, colours: dict[str, str]) -> None:
    """Stack the stages over steps, averaged in bins if there are many."""
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
