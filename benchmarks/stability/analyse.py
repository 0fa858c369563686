# SPDX-License-Identifier: Apache-2.0
"""From `runs.jsonl` to tables and plots."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("agg")
import matplotlib.pyplot as plt

from benchmarks.stability import plan
from benchmarks.stability.run import gap_closed, read_runs

RESAMPLES = 10_000


def table(runs: Iterable[dict]) -> pd.DataFrame:
    """Return one row per run of the phase "test": regime, arm, seed, learning_rate and outcomes.

    ``gap_closed`` is the primary outcome, ``gap_closed_end`` that of the last measurement, ``peak_drop`` the largest
    fall from the best accuracy so far, ``gradient_peak`` the greatest over the median gradient norm.
    """
    rows = []
    for run in runs:
        if run["phase"] == "test":
            accuracy = np.array([value for _, value in run["accuracy"]])
            rows.append(
                {
                    "regime": run["regime"],
                    "arm": run["arm"],
                    "seed": run["seed"],
                    "learning_rate": run["learning_rate"],
                    "before": accuracy[0],
                    "after": accuracy[-1],
                    "gap_closed": gap_closed(run),
                    "gap_closed_end": (accuracy[-1] - accuracy[0]) / (run["teacher"] - accuracy[0]),
                    "peak_drop": (np.maximum.accumulate(accuracy) - accuracy).max(),
                    # Infinite: most steps had no gradient at all.
                    "gradient_peak": run["grad_norm_max"] / (run["grad_norm_median"] or math.ulp(0.0)),
                    "gain": run["gain"],
                    "sign_flips": run["sign_flips"],
                }
            )
    return pd.DataFrame(rows)


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval (percentiles) of the mean of values, one a seed."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def compare(runs: pd.DataFrame, arm: str, rival: str, outcome: str = "gap_closed") -> pd.DataFrame:
    """By regime, `arm` less `rival` over the seeds that both have: mean, 95 % interval, and the verdict.

    A verdict is "wins" or "loses" if the interval excludes 0, and otherwise "-".
    """
    rows = []
    for regime, part in runs.groupby("regime", sort=False):
        wide = part.pivot(index="seed", columns="arm", values=outcome)
        if not {arm, rival} <= set(wide.columns):
            continue
        paired = (wide[arm] - wide[rival]).dropna().to_numpy()
        if len(paired) < 2:
            continue
        low, high = interval(paired)
        verdict = "wins" if low > 0 else "loses" if high < 0 else "-"
        rows.append([regime, rival, len(paired), paired.mean(), low, high, verdict])
    return pd.DataFrame(rows, columns=["regime", "rival", "seeds", "difference", "low", "high", "verdict"])


def means(runs: pd.DataFrame, outcome: str) -> pd.DataFrame:
    """Mean over seeds of an outcome: a row an arm, a column a regime, in the plan's order."""
    wide = runs.pivot_table(index="arm", columns="regime", values=outcome, aggfunc="mean", sort=False)
    return wide.reindex(
        index=[arm for arm in plan.ARMS if arm in wide.index],
        columns=[regime for regime in plan.REGIMES if regime in wide.columns],
    )


def markdown(frame: pd.DataFrame, digits: int = 2) -> str:
    """Return a table in Markdown with rounded numbers. The best of a column is not marked, because intervals decide."""

    def cell(value) -> str:
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    frame = frame.reset_index() if frame.index.name else frame
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns)]
    lines += [[cell(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _plot_means(runs: pd.DataFrame, ours: str, path: Path) -> None:
    """Plot the primary outcome of every arm with its interval, one panel per regime."""
    regimes = [regime for regime in plan.REGIMES if regime in set(runs["regime"])]
    arms = [arm for arm in plan.ARMS if arm in set(runs["arm"])]
    columns = min(4, len(regimes))
    rows = -(-len(regimes) // columns)
    size = (3.2 * columns, rows * (0.6 + 0.2 * len(arms)))
    figure, grid = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes in grid.flat[len(regimes) :]:
        axes.remove()
    for axes, regime in zip(grid.flat, regimes, strict=False):
        for place, arm in enumerate(arms):
            values = runs[(runs["regime"] == regime) & (runs["arm"] == arm)]["gap_closed"].to_numpy()
            if len(values):
                low, high = interval(values)
                colour = "#D55E00" if arm == ours else "#0072B2"
                axes.plot([low, high], [place, place], color=colour)
                axes.plot(values.mean(), place, "o", color=colour, markersize=4)
        axes.set_title(regime, fontsize=10)
        axes.set_xlim(-0.75, 1.05)
        axes.grid(alpha=0.3)
        axes.set_yticks(range(len(arms)), arms, fontsize=8)
    # The panels share the axis: turned once.
    grid.flat[0].invert_yaxis()
    figure.supxlabel("gap closed, mean over the run; 95 % interval over seeds", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_differences(runs: pd.DataFrame, arm: str, path: Path) -> None:
    """Plot paired differences of `arm` to each rival by regime. A point is filled if its interval excludes 0."""
    figure, grid = plt.subplots(1, len(plan.RIVALS), figsize=(10.8, 3.6), sharey=True, layout="constrained")
    for axes, rival in zip(grid, plan.RIVALS, strict=True):
        found = compare(runs, arm, rival)
        for place, row in enumerate(found.itertuples()):
            filled = "#D55E00" if row.verdict != "-" else "white"
            axes.plot([row.low, row.high], [place, place], color="#D55E00")
            axes.plot(row.difference, place, "o", color="#D55E00", markerfacecolor=filled, markersize=5)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.set_title(f"{arm} less {rival}", fontsize=10)
        axes.set_yticks(range(len(found)), found["regime"], fontsize=8)
    grid[0].invert_yaxis()
    figure.supxlabel("difference in gap closed, mean over the run; 95 % interval over paired seeds", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_rates(runs: list[dict], path: Path) -> None:
    """Plot how the outcome of each arm depends on its learning rate, from the runs of the selection."""
    regimes = [r for r in plan.REGIMES if any(x["regime"] == r and x["phase"] == "selection" for x in runs)]
    columns = min(4, len(regimes))
    rows = -(-len(regimes) // columns)
    size = (3.2 * columns, 0.8 + 2.8 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes in grid.flat[len(regimes) :]:
        axes.remove()
    shown = [arm for arm in plan.ARMS if plan.ARMS[arm].contender]
    for axes, regime in zip(grid.flat, regimes, strict=False):
        tried: set[float] = set()
        for place, arm in enumerate(shown):
            points: dict[float, list[float]] = {}
            for run in runs:
                if (run["phase"], run["regime"], run["arm"]) == ("selection", regime, arm):
                    points.setdefault(run["learning_rate"], []).append(gap_closed(run))
            if points:
                rates = sorted(points)
                tried.update(rates)
                axes.plot(rates, [np.mean(points[rate]) for rate in rates], marker="o", color=f"C{place}", label=arm)
        axes.set(xscale="log", ylim=(-0.7, 1.05))
        axes.set_xticks(sorted(tried), [f"{rate:g}" for rate in sorted(tried)], fontsize=8)
        axes.minorticks_off()
        axes.set_title(regime, fontsize=10)
        axes.grid(alpha=0.3)
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel("gap closed, mean over the run (validation)", fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=-(-len(labels) // 2), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def verdict(runs: pd.DataFrame, plans: plan.Round) -> str:
    """Return the verdict on a round's claim."""
    counts = [compare(runs, plans.ours, rival)["verdict"].value_counts() for rival in plan.RIVALS]
    parts = [
        f"wins against {rival} in {count.get('wins', 0)} regimes and loses in {count.get('loses', 0)}"
        for rival, count in zip(plan.RIVALS, counts, strict=True)
    ]
    holds = all(count.get("wins", 0) >= 2 and not count.get("loses", 0) for count in counts)
    return f"{plans.ours} {', '.join(parts)}: the claim {'holds' if holds else 'does not hold'}."


def analyse(runs_path: Path, out: Path, rounds: dict[str, plan.Round]) -> dict[str, pd.DataFrame]:
    """Write tables.md and the plots into `out`; return the tables by title.

    Raises:
        ValueError: there is no run of the phase "test".
    """
    everything = read_runs(runs_path)
    every_round = table(everything)
    if every_round.empty:
        raise ValueError(f"{runs_path} has no finished run of the phase 'test'")
    out.mkdir(parents=True, exist_ok=True)
    tables, verdicts = {}, []
    for name, plans in rounds.items():
        runs = every_round[every_round["seed"].isin(plans.seeds)]
        if runs.empty:
            continue
        tables[f"{name} round: learning rate"] = means(runs, "learning_rate").map("{:g}".format)
        for title, outcome in {
            "gap closed, mean over the run": "gap_closed",
            "gap closed at the end": "gap_closed_end",
            "peak drop": "peak_drop",
            "largest over median gradient norm": "gradient_peak",
            "sign flips, share of tokens": "sign_flips",
        }.items():
            tables[f"{name} round: {title}"] = means(runs, outcome)
        claimants = [arm for arm in (plans.ours, "odds_opd", "gndpo") if arm in plans.arms]
        for arm in claimants:
            parts = [compare(runs, arm, rival) for rival in plans.arms if rival != arm]
            tables[f"{name} round: {arm} less its rivals, gap closed, paired"] = pd.concat(parts, ignore_index=True)
        if set(plan.RIVALS) < set(plans.arms):
            verdicts.append(f"{name} round: {verdict(runs, plans)}")
            _plot_differences(runs, plans.ours, out / f"differences_{name}.png")
        _plot_means(runs, plans.ours, out / f"gap_closed_{name}.png")
    quality = runs_path.with_name("quality.jsonl")
    if quality.exists():
        lines = pd.DataFrame([json.loads(line) for line in quality.read_text().splitlines()])
        for name in ("noise", "cosine", "cosine_mean"):
            tables[f"gradient at fixed weights: {name}"] = lines.pivot(
                index="arm", columns="regime", values=name
            ).reindex([arm for arm in plan.ARMS if arm in set(lines["arm"])])
    text = "".join(f"### {title[0].upper()}{title[1:]}\n\n{markdown(frame)}\n" for title, frame in tables.items())
    (out / "tables.md").write_text("".join(f"{line}\n\n" for line in verdicts) + text)
    _plot_rates(everything, out / "learning_rates.png")
    return tables
