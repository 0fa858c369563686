# SPDX-License-Identifier: Apache-2.0
"""The benchmark's rival, verl's vLLM teacher server, really starts and scores the same tokens as the full forward."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "teacher_scoring.py"


def test_the_server_scores_what_the_full_forward_scores(tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARK), "--json", str(out), "--shapes", "small", "--methods", "verl_server"]
    done = subprocess.run([*command, "--rounds", "1"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in rows] == ["full_logits", "verl_server"]
    for row in rows:
        assert row["seconds"] > 0 and row["peak_gb"] > 0
        assert row["speedup_vs_verl_server"] > 0 and row["memory_vs_verl_server"] > 0
    # Two tokens of 4096 are masked by verl; the log-probs of neighbouring positions are a hundred times as far apart.
    assert rows[1]["max_abs_diff"] < 2e-3
