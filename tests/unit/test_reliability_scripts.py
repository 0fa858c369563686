# SPDX-License-Identifier: Apache-2.0
"""The parts of benchmarks/soak.py and benchmarks/faults.py that decide and write; the scripts themselves take long."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks import faults, soak

STEPS = range(1, 101)


def samples(memory, files=lambda step: 50, name="ray::Worker (7)"):
    return {step: {name: (memory(step), files(step))} for step in STEPS}


def queue(keys=lambda step: 0):
    return {step: {name: keys(step) for name in soak.QUEUE} for step in STEPS}


@pytest.mark.parametrize(
    ("memory", "grows"),
    [
        (lambda step: 500 + 0.05 * step, False),
        (lambda step: 500 + 0.2 * step, True),
        # It grows while it warms up, and peaks now and then.
        (lambda step: 500 + 10 * min(step, 19), False),
        (lambda step: 500 + (300 if step % 10 == 0 else 0), False),
        # A leak in steps: 3 MB each 10 steps.
        (lambda step: 500 + 3 * (step // 10), True),
    ],
)
def test_memory_that_grows_after_the_warm_up_is_found(memory, grows):
    noise = np.random.default_rng(0)
    summary = soak.summarise(samples(lambda step: memory(step) + noise.normal(0, 0.5)), queue(), warm_up=20)
    found = soak.failures(summary)
    assert bool(found) == grows
    assert not grows or ("ray::Worker (7)" in found[0] and "MB in 10 steps" in found[0])


def test_files_and_queues_that_grow_are_found():
    leaking = samples(lambda step: 500, files=lambda step: 50 + step // 20)
    assert "51 to 54 open files" in soak.failures(soak.summarise(leaking, queue(), 20))[0]
    found = soak.failures(soak.summarise(samples(lambda step: 500), queue(lambda step: step // 10), 20))
    assert [line.split(":")[0] for line in found] == list(soak.QUEUE)


def test_a_process_that_is_not_always_there_has_no_slope():
    seen = samples(lambda step: 500)
    seen[50]["short"] = (1.0, 1)
    summary = soak.summarise(seen, queue(), 20)
    assert list(summary["processes"]) == ["ray::Worker (7)"] and summary["seen_only_in_part"] == ["short"]


def test_the_memory_of_a_process_is_what_it_holds():
    script = "held = bytearray(b'x') * 100_000_000; print(1, flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    ((name, (size, files)),) = soak.sample(psutil.Process(process.pid)).items()
    process.communicate(b"\n")
    assert 100 < size < 120 and 3 <= files < 20 and f"({process.pid})" in name
    assert soak.sample(psutil.Process()) and not os.path.exists(f"/proc/{process.pid}")


PAGE = f"""# Page

{faults.BEGIN}

| fault | the run | what the log says | lost |
|---|---|---|---|
| teacher: kill -9 | old | x | nothing |

{faults.END}

After.
"""


def outcome(**changed):
    values = {"name": "x", "exit_code": None, "seconds": 12.4, "usual_step_s": 2.0, "says": "Error: x", "steps_lost": 2}
    return faults.Outcome(**values | changed)


def test_rows_of_the_table_are_replaced_and_stay_in_order():
    first, second = faults.FAULTS[:2]
    page = faults.update_table(PAGE, {second.happens: outcome().row(second)})
    page = faults.update_table(page, {first.happens: outcome(exit_code=1, resumed_from=2).row(first)})
    assert page.splitlines()[4:8] == [
        "| fault | the run | what the log says | lost |",
        "|---|---|---|---|",
        "| teacher: kill -9 | ends after 12 s, exit code 1 | `Error: x` | 2 steps |",
        "| teacher: kill -STOP | goes on after 12 s | `Error: x` | nothing |",
    ]
    assert page.startswith("# Page") and page.endswith("After.\n")


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({"says": None}, "not named"),
        ({"hangs": True, "seconds": 180.0}, "hangs"),
        ({"exit_code": 1}, "can't be resumed"),
    ],
)
def test_what_is_not_as_it_should_be_is_bold(changed, shown):
    assert f"**{shown}**" in outcome(**changed).row(faults.FAULTS[0])


def test_messages_are_shown_without_the_folder_and_the_process():
    log = "\x1b[36m(TaskRunnerV1 pid=7)\x1b[0m the file /tmp/x/run_3/words.jsonl\ncan't be written"
    assert faults.find("the file.*", log, Path("/tmp/x")) == "the file words.jsonl"
    assert faults.find("a file", log, Path("/tmp/x")) is None
    assert len(faults.shorten("x " * 300, Path("/tmp/x"))) < 170


def test_the_page_of_the_project_has_the_table():
    page = faults.PAGE.read_text()
    assert faults.update_table(page, {}) == page
