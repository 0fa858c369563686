# SPDX-License-Identifier: Apache-2.0
"""Runs the plan: learning rates on validation problems, then all seeds. Killed and started again, it goes on.

Every finished training is one line of `runs.jsonl`, whole or not there.
"""

import gzip
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.stability import loop, plan, world

_state: dict = {}


def read_runs(path: Path) -> list[dict]:
    """Return the complete lines of a `runs.jsonl`, or of its `.gz`; [] if there is no such file."""
    if not path.exists():
        return []
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as source:
        lines = source.readlines()
    return [json.loads(line) for line in lines if line.endswith("\n")]


def gap_closed(run: dict) -> float:
    """Return the primary outcome: (accuracy - before) / (teacher - before), averaged over the later measurements."""
    (_, before), *later = run["accuracy"]
    return (statistics.mean(accuracy for _, accuracy in later) - before) / (run["teacher"] - before)


def choose_rates(runs: Iterable[dict], plans: plan.Round) -> dict[tuple[str, str], float]:
    """Return the rate with the best mean primary outcome over the seeds of the selection, by (regime, arm)."""
    outcomes: dict[tuple, dict[float, list[float]]] = {}
    for run in runs:
        in_round = run["seed"] in plans.selection_seeds and run["learning_rate"] in plans.learning_rates(run["regime"])
        if run["phase"] == "selection" and in_round:
            rates = outcomes.setdefault((run["regime"], run["arm"]), {})
            rates.setdefault(run["learning_rate"], []).append(gap_closed(run))
    return {key: max(rates, key=lambda rate: statistics.mean(rates[rate])) for key, rates in outcomes.items()}


def mean_gain(runs: Iterable[dict], regime: str, learning_rate: float, seeds: Iterable[int]) -> float:
    """Return the mean gain of gndpo's selection runs at that rate, the factor of `opd_gain_matched`."""
    gains = [
        run["gain"]
        for run in runs
        if (run["phase"], run["regime"], run["arm"], run["learning_rate"])
        == ("selection", regime, "gndpo", learning_rate)
        and run["seed"] in seeds
    ]
    return statistics.mean(gains)


def _start_worker(out: str, names: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    _state["world"] = world.prepare(Path(out), names)


def _train(job: dict) -> dict:
    """Run one training, and return the job with its result."""
    began = time.perf_counter()
    regime, arm = plan.REGIMES[job["regime"]], plan.ARMS[job["arm"]]
    evaluate_on = "validation" if job["phase"] == "selection" else "test"

    def on_step(batch: loop.Batch, advantages: torch.Tensor | None) -> dict:
        valid = batch.response_mask.bool()
        d = (batch.teacher_log_probs - batch.old_log_probs)[valid]
        flips = None if advantages is None else (advantages[valid] * d < 0).float().mean().item()
        return {"sigma": d.clamp(-5, 5).std().item(), "sign_flips": flips}

    records = loop.train(
        _state["world"],
        regime.start,
        plan.advantage(arm, job["seed"], job["multiplier"]),
        plan.settings(regime, job["learning_rate"], job["seed"], evaluate_on=evaluate_on, steps=job["steps"]),
        corrupt=plan.corruption(regime),
        on_step=on_step,
    )
    steps = records[1:]
    norms = [record["grad_norm"] for record in steps]
    finite = [norm for norm in norms if math.isfinite(norm)] or [math.nan]
    flips = [record["sign_flips"] for record in steps if record["sign_flips"] is not None]
    return job | {
        "accuracy": [[record["step"], record["accuracy"]] for record in records if "accuracy" in record],
        "teacher": _state["world"].start_accuracy["teacher"],
        "kl_last": steps[-1]["kl"],
        "reward_last": steps[-1]["reward"],
        "grad_norm_median": statistics.median(finite),
        "grad_norm_max": max(finite),
        "advantage_abs_max": max((record["advantage_abs_max"] or 0.0) for record in steps),
        "gain": statistics.mean((record["sigma"] ** 2 + 1e-8) ** -0.5 for record in steps),
        "gain_last": (steps[-1]["sigma"] ** 2 + 1e-8) ** -0.5,
        "sign_flips": statistics.mean(flips) if flips else None,
        "length_last": steps[-1]["length"],
        "truncated_last": steps[-1]["truncated"],
        "skipped": steps[-1]["skipped"],
        "seconds": round(time.perf_counter() - began, 2),
    }


def _key(job: dict) -> tuple:
    return tuple(job[name] for name in ("phase", "regime", "arm", "learning_rate", "seed", "steps"))


def _run_all(jobs: list[dict], path: Path, out: Path, title: str) -> None:
    """Train what is not in the file yet, in a process a core, and append each result as it comes."""
    done = {_key(run) for run in read_runs(path)}
    jobs = [job for job in jobs if _key(job) not in done]
    if not jobs:
        return
    names = tuple(dict.fromkeys(plan.REGIMES[job["regime"]].start for job in jobs))
    workers = min(os.cpu_count() or 1, len(jobs))
    context = multiprocessing.get_context("spawn")
    # A line without its end is what a kill has left; the next one must not be glued to it.
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        complete = read_runs(path)
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(run) + "\n" for run in complete))
        os.replace(partial, path)
    with (
        ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(str(out), names)) as pool,
        path.open("a") as sink,
        tqdm(total=len(jobs), desc=title, unit="run", mininterval=5.0) as progress,
    ):
        # As they finish, so that one slow training holds nothing up.
        for future in as_completed([pool.submit(_train, job) for job in jobs]):
            sink.write(json.dumps(future.result()) + "\n")
            sink.flush()
            progress.update()


def run_study(
    out: Path,
    plans: plan.Round,
    *,
    arms: Iterable[str] | None = None,
    regimes: Iterable[str] = tuple(plan.REGIMES),
    steps: int = plan.STEPS,
) -> Path:
    """Train everything of a round that is missing in `out/runs.jsonl` and return that path.

    Args:
        out: folder of models and results.
        plans: the round.
        arms: of the round's; None: all.
        regimes: names of the plan's; families of the regimes are added.
        steps: updates of a training.

    Raises:
        ValueError: `runs.jsonl` has runs of another plan, or an arm is matched to gndpo and that is not among the arms.
    """
    arms = plans.arms if arms is None else tuple(arms)
    matched = [name for name in arms if plan.ARMS[name].multiplier is None]
    if matched and "gndpo" not in arms:
        raise ValueError(f"{matched[0]} takes its gain from gndpo's runs: add gndpo to the arms")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "runs.jsonl"
    for run in read_runs(path):
        if run["plan"] != plan.fingerprint(run["regime"], run["arm"]):
            raise ValueError(
                f"{path}: the plan of {run['arm']} in {run['regime']!r} was another one when it was run: use another "
                "folder, or take its lines out"
            )
    families = {name: plans.family(name) for name in regimes}
    # The models are made once, before any worker looks for them.
    world.prepare(out, tuple(dict.fromkeys(plan.REGIMES[name].start for name in (*families, *families.values()))))

    def job(phase: str, regime: str, arm: str, learning_rate: float, seed: int, multiplier: float = 1.0) -> dict:
        return {
            "plan": plan.fingerprint(regime, arm),
            "phase": phase,
            "regime": regime,
            "arm": arm,
            "learning_rate": learning_rate,
            "seed": seed,
            "multiplier": multiplier,
            "steps": steps,
        }

    def select(chosen: Iterable[str], multiplier) -> None:
        jobs = [
            job("selection", regime, arm, rate, seed, multiplier(regime))
            for regime in dict.fromkeys(families.values())
            for arm in chosen
            for rate in plans.learning_rates(regime)
            for seed in plans.selection_seeds
        ]
        _run_all(jobs, path, out, "learning rates")

    select([name for name in arms if name not in matched], lambda regime: 1.0)

    def gain(regime: str) -> float:
        runs = read_runs(path)
        return mean_gain(runs, regime, choose_rates(runs, plans)[regime, "gndpo"], plans.selection_seeds)

    if matched:
        gains = {regime: gain(regime) for regime in dict.fromkeys(families.values())}
        select(matched, gains.__getitem__)
    rates = choose_rates(read_runs(path), plans)
    jobs = [
        job("test", regime, arm, rates[family, arm], seed, gains[family] if arm in matched else 1.0)
        for seed in plans.seeds
        for regime, family in families.items()
        for arm in arms
        if seed in plans.seeds_of(regime, arm)
    ]
    _run_all(jobs, path, out, "seeds")
    return path
