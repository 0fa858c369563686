# SPDX-License-Identifier: Apache-2.0
"""The study's plan, resumption and statistics, on results that are made up; the trainings themselves are elsewhere."""

import dataclasses
import gzip
import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.stability import analyse, plan, quality, run
from benchmarks.stability.loop import Batch

TINY = plan.Round(
    ours="log_odds_opd",
    arms=("gndpo", "log_odds_opd", "opd_gain_matched"),
    seeds=(0, 1, 2),
    selection_seeds=(1000, 1001),
    adamw_rates=(1e-4, 3e-4),
    sgd_rates=(1e-2,),
)


def result(job, accuracy=(0.4, 0.6, 0.9), gain=2.0):
    """A training as run._train describes it."""
    return job | {
        "accuracy": [[8 * i, value] for i, value in enumerate(accuracy)],
        "teacher": 0.9,
        "grad_norm_median": 0.5,
        "grad_norm_max": 2.0,
        "gain": gain,
        "sign_flips": 0.1,
    }


@pytest.fixture
def trained(monkeypatch):
    """Trainings that cost nothing, in this process; the list of those that were made."""
    made = []

    class Pool:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, job):
            made.append(job)
            return job

    class Done:
        def __init__(self, job):
            self.job = job

        def result(self):
            # 1e-4 is the better rate for gndpo, 3e-4 for others.
            good = (self.job["learning_rate"] == 1e-4) == (self.job["arm"] == "gndpo")
            return result(self.job, (0.4, 0.6, 0.9 if good else 0.5), gain=2.0 if good else 5.0)

    monkeypatch.setattr(run, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(run, "as_completed", lambda jobs: map(Done, jobs))
    monkeypatch.setattr(run.world, "prepare", lambda *_: None)
    return made


def test_the_arms_and_regimes_of_every_round_are_there():
    for plans in plan.ROUNDS.values():
        assert {plans.ours, *plan.RIVALS} <= set(plans.arms) <= set(plan.ARMS)
        assert plan.ARMS[plans.ours].contender and all(plan.ARMS[rival].contender for rival in plan.RIVALS)
        for regime in plan.REGIMES:
            assert plans.learning_rates(plans.family(regime))
            assert plans.family(plans.family(regime)) == plans.family(regime)
        assert len(plans.seeds) >= 5 and not set(plans.seeds) & set(plans.selection_seeds)
    first, second = (set(plans.seeds) for plans in plan.ROUNDS.values())
    assert not first & second, "the second round's claim is judged on seeds that the first one has not seen"


def test_rates_come_from_the_rounds_own_seeds_and_grid(trained, tmp_path):
    path = run.run_study(tmp_path, TINY, regimes=("clean",), steps=8)
    runs = run.read_runs(path)
    # Better than all, and none of this round's: another seed, and a rate that its grid hasn't.
    alien = [result(dict(runs[0], seed=1002, learning_rate=3e-4), (0.4, 0.9, 0.9))]
    alien += [result(dict(runs[0], learning_rate=1e-3), (0.4, 0.9, 0.9))]
    assert run.choose_rates(runs + alien, TINY) == {
        ("clean", "gndpo"): 1e-4,
        ("clean", "log_odds_opd"): 3e-4,
        ("clean", "opd_gain_matched"): 3e-4,
    }
    tests = [x for x in runs if x["phase"] == "test"]
    assert {(x["arm"], x["learning_rate"]) for x in tests} == {
        ("gndpo", 1e-4),
        ("log_odds_opd", 3e-4),
        ("opd_gain_matched", 3e-4),
    }
    assert {x["multiplier"] for x in runs if x["arm"] == "opd_gain_matched"} == {2.0}, "of gndpo at its own rate"
    assert sorted((x["arm"], x["seed"]) for x in tests) == sorted(itertools.product(TINY.arms, TINY.seeds))


def test_a_killed_study_goes_on_where_it_was(trained, tmp_path):
    path = run.run_study(tmp_path, TINY, regimes=("clean",), steps=8)
    complete = path.read_text()
    number = len(trained)
    assert number == 3 * 2 * 2 + 3 * 3
    lines = complete.splitlines(keepends=True)
    path.write_text("".join(lines[:-3]) + lines[-3][:40])
    trained.clear()
    run.run_study(tmp_path, TINY, regimes=("clean",), steps=8)
    assert len(trained) == 3
    assert sorted(path.read_text().splitlines()) == sorted(complete.splitlines())
    trained.clear()
    run.run_study(tmp_path, TINY, regimes=("clean",), steps=8)
    assert trained == []


def test_results_of_another_plan_are_not_taken(trained, tmp_path):
    path = run.run_study(tmp_path, TINY, regimes=("clean",), steps=8)
    first, *rest = map(json.loads, path.read_text().splitlines())
    path.write_text("".join(json.dumps(x) + "\n" for x in (first | {"plan": "0" * 12}, *rest)))
    with pytest.raises(ValueError, match=r"runs\.jsonl.*gndpo.*clean.*another folder"):
        run.run_study(tmp_path, TINY, regimes=("clean",), steps=8)


def test_a_matched_arm_needs_what_it_is_matched_to(tmp_path):
    with pytest.raises(ValueError, match="add gndpo"):
        run.run_study(tmp_path, TINY, arms=("opd_gain_matched",))


def test_what_a_fingerprint_sees(monkeypatch):
    before = plan.fingerprint("clean", "gndpo")
    assert before == plan.fingerprint("clean", "gndpo") != plan.fingerprint("clean", "opd")
    assert before != plan.fingerprint("start 60", "gndpo")
    monkeypatch.setattr(plan, "STEPS", plan.STEPS + 1)
    assert before != plan.fingerprint("clean", "gndpo")


def test_the_primary_outcome():
    assert run.gap_closed(result({}, (0.4, 0.6, 0.9))) == pytest.approx((0.4 + 1.0) / 2)


def a_batch():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    old = -torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    return Batch(
        teacher_log_probs=old - 0.5,
        old_log_probs=old,
        response_mask=mask,
        teacher_full=torch.zeros(2, 4, 3),
        old_full=torch.zeros(2, 4, 3),
        kl=torch.full((2, 4), 0.25),
        token_level_rewards=torch.tensor([[0.0, 0, 1, 0], [0, 0, 0, 0]]),
        index=["a", "a"],
        finished=torch.ones(2, dtype=torch.bool),
        lengths=mask.sum(-1),
    )


def test_outliers_hit_their_share_of_valid_tokens():
    big = a_batch()
    big = dataclasses.replace(
        big, **{name: getattr(big, name).repeat(3000, 1) for name in ("teacher_log_probs", "response_mask")}
    )
    seen = plan.corruption(plan.REGIMES["outliers 20 %"])(big, torch.Generator().manual_seed(0)).teacher_log_probs
    hit = seen != big.teacher_log_probs
    valid = big.response_mask.bool()
    assert not hit[~valid].any()
    assert hit[valid].float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert -20 <= seen[hit].min() < seen[hit].max() <= -5
    assert plan.corruption(plan.REGIMES["clean"]) is None


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("constant", lambda b: b.response_mask.float()),
        ("opd", lambda b: -0.5 * b.response_mask.float()),
        ("clamp_1", lambda b: -0.5 * b.response_mask.float()),
        ("v_opd", lambda b: -0.25 * b.response_mask.float()),
        ("tv_opd", lambda b: -b.response_mask.float()),
    ],
)
def test_arms_are_what_they_are_called(arm, expected):
    batch = a_batch()
    torch.testing.assert_close(plan.advantage(plan.ARMS[arm], 0)(batch), expected(batch))


def test_controls_and_multipliers():
    batch = a_batch()
    batch.teacher_log_probs = -3 * torch.rand(2, 4, generator=torch.Generator().manual_seed(1))
    valid = batch.response_mask.bool()
    gndpo = plan.advantage(plan.ARMS["gndpo"], 0)(batch)
    shuffled = plan.advantage(plan.ARMS["shuffled"], 0)(batch)
    assert not torch.equal(shuffled, gndpo) and (shuffled[~valid] == 0).all()
    torch.testing.assert_close(shuffled[valid].sort().values, gndpo[valid].sort().values)
    matched = plan.advantage(plan.ARMS["opd_gain_matched"], 0, 3.0)(batch)
    torch.testing.assert_close(matched, 3 * plan.advantage(plan.ARMS["opd"], 0)(batch))
    grpo = plan.advantage(plan.ARMS["grpo"], 0)(batch)
    assert (grpo[0][:3] > 0).all() and (grpo[1][:2] < 0).all()


def made_up_runs(differences, regime="clean", rival="gndpo"):
    """log_odds_opd is better than a rival by `differences`, one a seed, whatever else a seed does to both."""
    rows = []
    for seed, difference in enumerate(differences):
        for arm, value in ((rival, 0.1 * seed), ("log_odds_opd", 0.1 * seed + difference)):
            rows.append({"regime": regime, "arm": arm, "seed": seed, "gap_closed": value})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [([0.02, 0.03, 0.02, 0.04], "wins"), ([-0.02, -0.03, -0.04], "loses"), ([0.3, -0.3, 0.1, -0.2], "-")],
)
def test_comparisons_are_paired(differences, verdict):
    """Seeds differ by far more than arms do."""
    (row,) = analyse.compare(made_up_runs(differences), "log_odds_opd", "gndpo").itertuples()
    assert row.verdict == verdict and row.seeds == len(differences)
    assert row.difference == pytest.approx(np.mean(differences))
    assert row.low <= row.difference <= row.high


def test_intervals_are_those_of_the_bootstrap():
    values = np.random.default_rng(1).normal(0.3, 1.0, 400)
    low, high = analyse.interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


@pytest.mark.parametrize("losses", [0, 1])
def test_a_claim_needs_two_wins_and_no_loss_against_each_rival(losses):
    rounds = [
        made_up_runs([0.2, 0.3, 0.25] if i < 2 else [-0.2, -0.3, -0.2], regime, rival)
        for rival in plan.RIVALS
        for i, regime in enumerate(("clean", "SGD", "start 60")[: 2 + losses])
    ]
    runs = pd.concat(rounds).drop_duplicates(["regime", "arm", "seed"])
    said = analyse.verdict(runs, TINY)
    assert ("the claim holds" in said) == (losses == 0), said
    assert f"wins against power_opd in 2 regimes and loses in {losses}" in said


def test_tables_and_plots_of_a_round(trained, tmp_path):
    path = run.run_study(tmp_path, TINY, regimes=("clean",), steps=8)
    lines = path.read_text()
    # Most steps of it had no gradient.
    spoilt = json.loads(lines.splitlines()[-1]) | {"grad_norm_median": 0.0}
    path.write_text(lines + json.dumps(spoilt | {"arm": "gndpo", "seed": 1, "phase": "selection"}) + "\n")
    packed = tmp_path / "runs.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    tables = analyse.analyse(packed, tmp_path / "out", {"tiny": TINY})
    assert tables["tiny round: gap closed, mean over the run"].loc["gndpo", "clean"] == pytest.approx(0.7)
    assert tables["tiny round: peak drop"].loc["gndpo", "clean"] == 0
    assert tables["tiny round: largest over median gradient norm"].loc["log_odds_opd", "clean"] == 4
    assert tables["tiny round: learning rate"].loc["log_odds_opd", "clean"] == "0.0003"
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "| gndpo | 0.70 |" in text and "| log_odds_opd | 0.0003 |" in text
    for name in ("gap_closed_tiny.png", "learning_rates.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_without_gradients_has_no_finite_peak():
    job = {"phase": "test", "regime": "SGD", "arm": "grpo", "seed": 0, "learning_rate": 1e-2}
    (row,) = analyse.table([result(job) | {"grad_norm_median": 0.0}]).itertuples()
    assert row.gradient_peak == math.inf


def test_no_results_is_said(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        analyse.analyse(tmp_path / "runs.jsonl", tmp_path, {"tiny": TINY})


def test_noise_and_direction_of_gradients():
    """Noise of known size around a known mean."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([3.0, 4.0] + [0.0] * 98)
    gradients = mean + 0.5 * torch.randn(4000, 100, generator=generator)
    described = quality._describe(gradients, mean)
    assert described["noise"] == pytest.approx(100 * 0.25 / 25, rel=0.02)
    assert described["cosine_mean"] == pytest.approx(1.0, abs=1e-3)
    assert described["cosine"] == pytest.approx(5 / math.sqrt(50), abs=0.02)
    assert quality._describe(gradients - mean, mean)["noise"] > 100
