# SPDX-License-Identifier: Apache-2.0
"""Problems are handed to processes and answered once each, whatever happens to the processes.

A script stands in for vLLM's process and keeps to the protocol of worker.py; the processes, pipes and signals are real.
"""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from verl_gndpo.evaluation import pool
from verl_gndpo.evaluation.job import Answers, Means

SCRIPT = """
import json, os, queue, sys, threading, time
from pathlib import Path
from verl_gndpo.evaluation.worker import _listen

folder, out = Path(sys.argv[1]).parent, os.fdopen(int(sys.argv[3]), "w")
told = queue.Queue()
threading.Thread(target=_listen, args=(told,), daemon=True).start()
(folder / f"pid_{os.getpid()}").touch()

def send(message):
    out.write(json.dumps(message) + chr(10))
    out.flush()

if (folder / "slow").exists() and len(list(folder.glob("pid_*"))) > 1:
    time.sleep(600)
if (folder / "broken").exists():
    send({"error": "no model -> give one"})
    sys.exit(1)
while (folder / "wait").exists() and len(list(folder.glob("pid_*"))) < 2:
    time.sleep(0.05)
send({"ready": 4})
while (row := told.get()) != "end":
    while (folder / "hold").exists() and int(row) > 5:
        time.sleep(0.05)
    time.sleep(0.05 * (folder / "wait").exists())
    send({"row": int(row), "answers": [{"text": f"é {row}"}], "process": os.getpid()})
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(SCRIPT)
    monkeypatch.setattr(pool, "WORKER", [sys.executable, str(tmp_path / "worker.py")])
    folder = tmp_path / "models" / "m"
    folder.mkdir(parents=True)
    return folder / "job.json"


def lines(job) -> list[dict]:
    return [json.loads(line) for line in job.with_name("answers.jsonl").read_text().splitlines()]


def gone(job) -> bool:
    pids = [int(path.name.removeprefix("pid_")) for path in job.parent.glob("pid_*")]
    return bool(pids) and not any(psutil.pid_exists(pid) for pid in pids)


def test_two_processes_share_the_problems(job):
    job.with_name("wait").touch()
    pool.answer(job, list(range(3, 40)), 40, Means(data_parallel=2), False)
    assert sorted(entry["row"] for entry in lines(job)) == list(range(3, 40))
    assert len({entry["process"] for entry in lines(job)}) == 2
    assert Answers(job.with_name("answers.jsonl"))[7]["answers"] == [{"text": "é 7"}]
    assert gone(job)


def test_a_process_that_loads_long_is_not_waited_for(job):
    job.with_name("slow").touch()
    pool.answer(job, list(range(20)), 20, Means(data_parallel=2), False)
    assert sorted(entry["row"] for entry in lines(job)) == list(range(20)) and gone(job)


def test_there_are_no_more_processes_than_problems(job):
    pool.answer(job, [4], 5, Means(data_parallel=8), False)
    assert [entry["row"] for entry in lines(job)] == [4] and len(list(job.parent.glob("pid_*"))) == 1


def started(job, *, data_parallel: int) -> subprocess.Popen:
    """Answer 40 problems in a process of its own, of which those after the sixth wait for the file `hold` to go."""
    job.with_name("hold").touch()
    # A shell that starts the tests in the background has them ignore SIGINT, and a child inherits that.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from verl_gndpo.evaluation import pool\n"
        "from verl_gndpo.evaluation.job import Means\n"
        "pool.WORKER = sys.argv[2:]\n"
        f"pool.answer(Path(sys.argv[1]), list(range(40)), 40, Means(data_parallel={data_parallel}), False)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(job), *pool.WORKER], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: job.with_name("answers.jsonl").exists() and len(lines(job)) >= 4)
    return process


def wait_until(true, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_process_ends_the_run_and_loses_no_answer(job):
    """The other process first answers what it was asked, and a second run asks only the rest."""
    job.with_name("wait").touch()
    process = started(job, data_parallel=2)
    pids = [int(path.name.removeprefix("pid_")) for path in job.parent.glob("pid_*")]
    os.kill(pids[0], signal.SIGKILL)
    time.sleep(0.5)
    job.with_name("hold").unlink()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.splitlines()[-1].startswith(
        "verl_gndpo.evaluation.pool.AnsweringError: a process that answers was killed by signal 9 (SIGKILL), as the "
    )
    assert "; start again to go on" in stderr and gone(job)
    answered = [entry["row"] for entry in lines(job)]
    assert 4 <= len(answered) == len(set(answered)) < 40
    rest = Answers(job.with_name("answers.jsonl")).lacking(range(40))
    pool.answer(job, rest, 40, Means(data_parallel=1), False)
    assert sorted(entry["row"] for entry in lines(job)) == list(range(40))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_the_run(job, number):
    process = started(job, data_parallel=2)
    process.send_signal(number)
    process.communicate(timeout=60)
    wait_until(lambda: gone(job))


def test_another_run_is_kept_out(job):
    process = started(job, data_parallel=1)
    with pytest.raises(pool.AnsweringError, match=f"another evaluation is answering into {job.parent} -> wait"):
        pool.answer(job, [39], 40, Means(), False)
    process.kill()
    process.communicate()


def test_a_process_says_what_is_wrong(job):
    job.with_name("broken").touch()
    with pytest.raises(pool.AnsweringError, match=r"^no model -> give one; more is in .*log\.txt; start again"):
        pool.answer(job, [0, 1], 2, Means(data_parallel=2), False)


def test_engines_get_devices_of_their_own(monkeypatch):
    """With an accelerator, which is only asked how many devices it has."""
    from verl.utils import device

    monkeypatch.setattr(pool, "without_accelerator", lambda: False)
    monkeypatch.setattr(device, "get_visible_devices_keyword", lambda: "DEVICES")
    monkeypatch.setattr(device, "get_torch_device", lambda: type("Eight", (), {"device_count": lambda: 8}))
    monkeypatch.delenv("DEVICES", raising=False)

    def devices(**means):
        return [found["DEVICES"] for found in pool.engine_environments(Means(**means))]

    assert devices() == [str(number) for number in range(8)]
    assert devices(tensor_parallel=4) == ["0,1,2,3", "4,5,6,7"]
    assert devices(data_parallel=2, tensor_parallel=3) == ["0,1,2", "3,4,5"]
    monkeypatch.setenv("DEVICES", "6,GPU-7,5")
    assert devices(tensor_parallel=2) == ["6,GPU-7"]
    with pytest.raises(
        pool.AnsweringError, match="--data-parallel 2 and --tensor-parallel 2 take 4 devices, and 3 are"
    ):
        devices(data_parallel=2, tensor_parallel=2)


def test_two_engines_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    one, two = (pool.engine_environments(Means(data_parallel=count)) for count in (None, 2))
    assert len(one) == 1 and "OMP_NUM_THREADS" not in one[0]
    assert [found["OMP_NUM_THREADS"] for found in two] == ["4", "4"]
