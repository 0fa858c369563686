# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run and write what they promise; what they measure is not asserted here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from verl_gndpo.diagnostics import _quantiles

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(name: str, out: Path, *arguments: str) -> dict:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--json", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_estimator(tmp_path):
    arguments = ("--rows", "32", "--length", "64", "--rounds", "2", "--threads", "1")
    figures = run("estimator", tmp_path / "new" / "estimator.json", *arguments)
    assert figures["max_abs_diff"] < 1e-5
    for result in figures["results"]:
        assert set(result["seconds"]) == {"released", "ours", "ours_with_metrics", "verl_grpo"}
        assert result["speedup_vs_released"] > 0 and result["with_metrics_vs_released"] > 0


def test_teacher_scoring(tmp_path):
    arguments = ("--shapes", "small", "--rounds", "1", "--threads", "1")
    rows = run("teacher_scoring", tmp_path / "teacher.json", *arguments)["rows"]
    assert [row["method"] for row in rows] == ["full_logits", "ours"]
    for row in rows:
        assert row["shape"] and row["seconds"] > 0 and row["peak_gb"] > 0
        assert row["max_abs_diff"] < 1e-4
        assert row["speedup_vs_full_logits"] > 0 and row["memory_vs_full_logits"] > 0


def test_data_prep(tmp_path):
    arguments = ("--rows", "200", "--growth", "--num_proc", "1", "--rounds", "1")
    results = run("data_prep", tmp_path / "data_prep.json", *arguments)["results"]
    assert [(row["method"], row["rows"]) for row in results] == [("verl_recipe", 200), ("ours", 200)]
    for row in results:
        assert row["seconds"] > 0 and row["peak_gb"] >= row["peak_anonymous_gb"] > 0
    assert results[1]["speedup_vs_recipe"] > 0 and results[1]["memory_vs_recipe"] > 0


def test_step_summary_drops_the_warm_up(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from step import STAGES, median_seconds

    slow, fast = ({f"timing_s/{stage}": seconds for stage in STAGES} for seconds in (60.0, 1.0))
    del fast["timing_s/teacher_log_prob"]
    seconds = median_seconds([slow, slow, fast, fast, fast])
    assert seconds.pop("teacher_log_prob") == 0.0 and set(seconds.values()) == {1.0}


@pytest.mark.parametrize(
    "kind", ["normal", "constant", "two values", "ties at a quantile", "the sample misses the tail"]
)
def test_quantiles_are_exact_whatever_the_sample_says(kind):
    n = 200_003
    x = np.random.default_rng(0).normal(size=n).astype(np.float32)
    if kind == "constant":
        x[:] = 0.5
    elif kind == "two values":
        x = np.where(x < 0, -5.0, 5.0).astype(np.float32)
    elif kind == "ties at a quantile":
        x[x < -2.2] = -2.5
    elif kind == "the sample misses the tail":
        # Every 12th value is sampled here: none of those is in the lowest tenth.
        tail = np.flatnonzero(np.arange(n) % 12 == 5)
        x[tail] = -50 - np.arange(len(tail))
    ordered = np.sort(x)
    assert _quantiles(x, 0.01, 0.99) == [ordered[int(0.01 * n)], ordered[int(0.99 * n)]]
