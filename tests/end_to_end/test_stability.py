# SPDX-License-Identifier: Apache-2.0
"""The stability study's short version: its models are trained, its arms learn, its tables and plots are written."""

import json
import subprocess
import sys

import pytest

from benchmarks.stability import plan
from benchmarks.stability.__main__ import SMOKE
from benchmarks.stability.analyse import table
from benchmarks.stability.run import read_runs
from tests.end_to_end.harness import REPO


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stability")
    subprocess.run(
        [sys.executable, "-m", "benchmarks.stability", "--smoke", "--out", str(folder)],
        cwd=REPO,
        check=True,
        timeout=1800,
    )
    return folder


def test_all_arms_learn_from_the_same_start(out):
    runs = table(read_runs(out / "runs.jsonl"))
    assert {(arm, seed) for arm, seed in zip(runs["arm"], runs["seed"], strict=True)} == {
        (arm, seed) for arm in SMOKE.arms for seed in SMOKE.seeds
    }
    assert runs["before"].nunique() == 1 and 0.3 < runs["before"].iloc[0] < 0.5
    # Measured 0.85 to 0.96, single runs at least 0.74; a signal that says nothing stays near 0.
    ends = runs.groupby("arm")["gap_closed_end"].mean()
    assert (ends > 0.5).all(), ends
    flips = runs.groupby("arm")["sign_flips"].mean()
    assert flips["opd"] == flips["log_odds_opd"] == 0 < flips["gndpo"]


def test_the_matched_arm_has_the_gain_of_gndpo(out):
    runs = read_runs(out / "runs.jsonl")
    (multiplier,) = {run["multiplier"] for run in runs if run["arm"] == "opd_gain_matched"}
    gains = {run["gain"] for run in runs if run["arm"] == "gndpo" and run["phase"] == "selection"}
    assert multiplier in gains and multiplier != 1


def test_gradients_of_samples_point_where_the_full_kl_does(out):
    lines = {line["arm"]: line for line in map(json.loads, (out / "quality.jsonl").read_text().splitlines())}
    assert set(lines) == {arm for arm in plan.ARMS if plan.ARMS[arm].multiplier == 1.0}
    assert lines["full_kl"]["cosine_mean"] == pytest.approx(1.0, abs=1e-4)
    for arm in ("opd", "gndpo", "power_opd", "log_odds_opd"):
        assert lines[arm]["cosine_mean"] > 0.9, lines[arm]
    # It has the responses' own direction, which is not quite another one, and twenty times the noise.
    assert lines["constant"]["cosine_mean"] < 0.8 and lines["constant"]["noise"] > 20 * lines["opd"]["noise"]


def test_tables_and_plots_are_there(out):
    text = (out / "tables.md").read_text()
    assert "Smoke round: gap closed, mean over the run" in text and "cosine" in text
    for name in ("gap_closed_smoke.png", "learning_rates.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob("*.partial"))
