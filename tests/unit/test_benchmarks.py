# SPDX-License-Identifier: Apache-2.0
"""The parts of the benchmarks that decide and compute; tests/integration runs the scripts themselves."""

import math
import sys
import time
from pathlib import Path

import psutil
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import step

    return step


def test_step_summary_drops_the_warm_up(step):
    slow, fast = ({f"timing_s/{stage}": seconds for stage in step.STAGES} for seconds in (60.0, 1.0))
    del fast["timing_s/teacher_log_prob"]
    fast["timing_s/step"] = 3.0
    seconds = step.median_seconds([slow, slow, fast, fast, fast])
    assert seconds.pop("teacher_log_prob") == 0.0
    assert seconds.pop("step") == 3.0 and seconds.pop("step_without_gen") == 2.0
    assert set(seconds.values()) == {1.0}


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, None])
def test_step_refuses_an_arm_that_does_not_learn(step, value):
    alive = dict.fromkeys(step.ALIVE["verl_opd"], 0.5)
    step.check_alive("verl_opd", [alive, alive])
    with pytest.raises(step.RunFailed, match="verl_opd, step 2: actor/grad_norm"):
        step.check_alive("verl_opd", [alive, alive | {"actor/grad_norm": value}])


def test_step_watches_all_processes_of_a_run(step, tmp_path):
    """A stand-in for a run: a shell that becomes the "trainer" of 200 MB, which has a child of 200 MB and logs late."""
    metrics = tmp_path / "metrics.jsonl"
    trainer = tmp_path / "main_ppo"
    trainer.write_text(
        "import subprocess, sys, time\n"
        "held = bytearray(b'x') * 200_000_000\n"
        "child = 'import time; held = bytearray(b\"x\") * 200_000_000; time.sleep(4)'\n"
        "child = subprocess.Popen([sys.executable, '-c', child])\n"
        "time.sleep(2)\n"
        f"open({str(metrics)!r}, 'w').write('{{}}\\n')\n"
        "child.wait()\n"
    )
    script = tmp_path / "script.sh"
    script.write_text(f"sleep 1\nexec {sys.executable} {trainer}\n")
    process = psutil.Popen(["bash", str(script)])
    begin = time.monotonic()
    started, first_line, peak = step.watch(process, metrics)
    assert process.returncode == 0
    assert 0.9 < started - begin < first_line - begin - 1.9
    assert 400e6 < peak.total() < 500e6
    assert sum(size > 200e6 for size in peak.values()) == 2
