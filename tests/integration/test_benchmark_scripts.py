# SPDX-License-Identifier: Apache-2.0
"""The benchmark scripts run as a user runs them and write the figures they promise, at sizes that take seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from verl_gndpo.presets import PRESETS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(name: str, out: Path, *arguments: str) -> dict:
    """Run one benchmark script and return its figures."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--json", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


def assert_ratios(rival: dict, row: dict, name: str) -> None:
    """Check the ratios to a rival against the figures that they are ratios of: speed-up and memory."""
    assert row[f"speedup_vs_{name}"] == pytest.approx(rival["seconds"] / row["seconds"])
    assert row[f"memory_vs_{name}"] == pytest.approx(row["peak_gb"] / rival["peak_gb"])


def test_estimator(tmp_path):
    arguments = ("--rows", "32", "--length", "64", "--rounds", "2", "--threads", "1")
    figures = run("estimator", tmp_path / "new" / "estimator.json", *arguments)
    assert figures["max_abs_diff"] < 1e-5
    assert {row["preset"] for row in figures["rows"]} == set(PRESETS)
    for row in figures["rows"]:
        assert row["threads"] == 1 and row["heap"] in ("fresh", "warm")
        assert row["released_over_ours"] == pytest.approx(row["released_s"] / row["ours_s"])
        assert row["with_metrics_over_released"] == pytest.approx(row["with_metrics_s"] / row["released_s"])


def test_image_fetch(tmp_path):
    arguments = ("--prompts", "2", "--responses", "4", "--patches", "400", "--rounds", "1")
    figures = run("image_fetch", tmp_path / "images.json", *arguments)
    verl, once = figures["rows"]
    # 400 patches of 1,176 float32 numbers for each row.
    assert verl["gigabytes"] == pytest.approx(8 * 400 * 1176 * 4 / 1e9, rel=0.1)
    assert (
        figures["bytes_vs_verl"] == pytest.approx(once["gigabytes"] / verl["gigabytes"])
        and 0.2 < figures["bytes_vs_verl"] < 0.35
    )


def test_gpu_check(tmp_path):
    """The check for a GPU, at small sizes on the CPU: every part measures, and the numbers that must agree do."""
    out = tmp_path / "gpu_check.jsonl"
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    by_part = {}
    for line in lines:
        by_part.setdefault(line["part"], []).append(line)
    assert [line["wrong"] for line in by_part["race"]] == [0] * 6
    assert len(by_part["score"]) == 5 and all(line["finite"] and line["max_diff"] < 1e-4 for line in by_part["score"])
    reference, ours = by_part["full_logits"]
    assert ours["max_diff"] < 1e-4
    assert ours["speedup"] == pytest.approx(reference["seconds"] / ours["seconds"], rel=0.05)
    reference, ours = by_part["student"]
    assert ours["max_diff"] < 1e-4 and 0 < ours["gradient_diff"] < 1e-4
    assert ours["speedup"] == pytest.approx(reference["seconds"] / ours["seconds"], rel=0.05)
    assert all(line["mean_diff"] < 1e-5 for line in by_part["flex"])
    assert all(line["max_diff"] < 1e-5 for line in by_part["offload"]) and len(by_part["offload"]) == 6
    bfloat16, float32 = by_part["precision"][:2]
    assert float32["mean_diff"] < 1e-5 < bfloat16["mean_diff"]
    for name in ("grouped_query", "varlen"):
        one, *others = by_part[name][: 3 if name == "varlen" else 2]
        assert one["max_diff"] == 0 and all(other["max_diff"] < 1e-5 for other in others)
    assert [line["way"] for line in by_part["varlen"]] == ["one by one", "padded", "grouped", "packed"]
    assert len(by_part["chunks"]) == 5 and len(by_part["kernels"]) == 12


def test_teacher_scoring(tmp_path):
    arguments = ("--shapes", "small", "--rounds", "1", "--threads", "1", "--methods", "ours")
    rows = run("teacher_scoring", tmp_path / "teacher.json", *arguments)["rows"]
    assert [row["method"] for row in rows] == ["full_logits", "ours"]
    for row in rows:
        assert row["shape"] and row["seconds"] > 0 and row["processor_s"] > 0 and row["peak_gb"] > 0
        assert row["max_abs_diff"] < 1e-4
        assert "speedup_vs_verl_server" not in row
    assert_ratios(*rows, "full_logits")


def test_data_prep(tmp_path):
    arguments = ("--rows", "200", "--growth", "--num_proc", "1", "--rounds", "1")
    results = run("data_prep", tmp_path / "data_prep.json", *arguments)["results"]
    assert [(row["method"], row["rows"]) for row in results] == [("verl_recipe", 200), ("ours", 200)]
    for row in results:
        assert row["seconds"] > 0 and row["peak_gb"] >= row["peak_anonymous_gb"] > 0
    assert_ratios(*results, "recipe")


def test_verls_server_scores_what_the_full_forward_scores(tmp_path):
    """The benchmark's rival is verl's own vLLM teacher server: it has to start, and to score the same tokens."""
    arguments = ("--shapes", "small", "--methods", "verl_server", "--rounds", "1")
    rows = run("teacher_scoring", tmp_path / "server.json", *arguments)["rows"]
    assert [row["method"] for row in rows] == ["full_logits", "verl_server"]
    for row in rows:
        assert row["seconds"] > 0 and row["peak_gb"] > 0
    assert_ratios(rows[1], rows[0], "verl_server")
    # Two tokens of 4096 are masked by verl; the log-probs of neighbouring positions are a hundred times as far apart.
    assert rows[1]["max_abs_diff"] < 2e-3


def test_prompt_sharing(tmp_path):
    rows = run("prompt_sharing", tmp_path / "sharing.json", "--shape", "small", "--rounds", "1")["rows"]
    assert [row["method"] for row in rows] == ["none", "side_by_side", "cache"]
    for row in rows:
        assert row["largest_difference"] < 1e-4
        assert_ratios(rows[0], row, "none")
