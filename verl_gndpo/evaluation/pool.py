# SPDX-License-Identifier: Apache-2.0
"""Start processes that answer, hand them problems one by one, and append what they answer to one file."""

import contextlib
import fcntl
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from verl_gndpo.evaluation.job import Means
from verl_gndpo.evaluation.worker import END
from verl_gndpo.platforms import without_accelerator

WORKER = [sys.executable, "-m", "verl_gndpo.evaluation.worker"]
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false"}
# In one process, vLLM starts in half of the time that it takes in three.
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
END_S, GRACE_S = 60.0, 10.0
"""How long a process may take to end: after its work, and after a signal."""


class AnsweringError(ValueError):
    """Answering failed. The message is one line; what was answered is in the file."""


@dataclass
class _Worker:
    """A process, in a group of its own with all that it starts."""

    process: subprocess.Popen
    pipe: int
    """Where its messages come from."""
    buffer: bytes = b""
    asked: set[int] = field(default_factory=set)
    ready: bool = False
    error: str = ""
    """Why it ended early."""

    def tell(self, message: object) -> None:
        assert self.process.stdin is not None
        # If it has died, its pipe says so.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{message}\n".encode())
            self.process.stdin.flush()

    def messages(self) -> list[dict[str, Any]] | None:
        """Return the messages that have come; None when the process has ended."""
        part = os.read(self.pipe, 1 << 20)
        if not part:
            return None
        *lines, self.buffer = (self.buffer + part).split(b"\n")
        return [json.loads(line) for line in lines]

    def note_end(self) -> None:
        """Say why the process has ended, if it has not said so itself."""
        code = self.process.wait()
        if self.error:
            return
        self.error = f"a process that answers ended with exit code {code}"
        if code < 0:
            self.error = f"a process that answers was killed by signal {-code} ({signal.Signals(-code).name})"
            if -code == signal.SIGKILL:
                self.error += ", as the system does when memory runs out"

    def end(self, patience_s: float) -> None:
        """Wait for the process, then end it with all that it has started."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_s)
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + GRACE_S
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
                while time.monotonic() < deadline:
                    self.process.poll()
                    os.killpg(self.process.pid, 0)
                    time.sleep(0.05)
        self.process.poll()
        os.close(self.pipe)


def answer(job: Path, rows: list[int], total: int, means: Means, on_server: bool) -> None:
    """Let processes answer rows of a job, and append each answer to `answers.jsonl` beside the job's file.

    Args:
        rows: those that have no answer yet.
        total: number of rows of the job.
        on_server: a server answers, which one process asks.

    Raises:
        AnsweringError: a process has ended early. What the others had been asked is answered before that.
        OSError: the file can't be written.
    """
    log = job.with_name("log.txt")
    environments = [{}] if on_server else engine_environments(means)
    with job.with_name("answers.jsonl").open("ab") as out, log.open("ab") as sink:
        _lock(out.fileno(), job.parent)
        workers: list[_Worker] = []
        complete = False
        try:
            for more in environments[: len(rows)]:
                workers.append(_start(job, means, more, sink))
            # In a file, a line every half minute is enough.
            often = 0.5 if sys.stderr.isatty() else 30
            with tqdm(
                total=total, initial=total - len(rows), unit="problem", desc=job.parent.name, mininterval=often
            ) as progress:
                complete = _hand_out(workers, deque(rows), out, progress)
        finally:
            for worker in workers:
                worker.end(END_S if complete and worker.ready else 0)
    if not complete:
        reason = next(worker.error for worker in workers if worker.error)
        raise AnsweringError(f"{reason}; more is in {log}; start again to go on with what was answered")


def _lock(file: int, folder: Path) -> None:
    """Keep other evaluations out of a folder until this process has closed the file.

    Raises:
        AnsweringError: another one is at work there.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise AnsweringError(f"another evaluation is answering into {folder} -> wait for it, or end it") from error
    except OSError:
        # Some network file systems have no locks.
        return


def engine_environments(means: Means) -> list[dict[str, str]]:
    """Return the environment variables of each engine, which give it devices of its own.

    Raises:
        AnsweringError: there are fewer devices than wanted.
    """
    engines, each = means.data_parallel, means.tensor_parallel
    if without_accelerator():
        cores = len(os.sched_getaffinity(0))
        shared = {"OMP_NUM_THREADS": str(max(1, cores // engines))} if engines and engines > 1 else {}
        return [CPU_ENVIRONMENT | shared | os.environ] * (engines or 1)
    from verl.utils.device import get_torch_device, get_visible_devices_keyword

    variable = get_visible_devices_keyword()
    chosen = os.environ.get(variable)
    devices = chosen.split(",") if chosen else [str(number) for number in range(get_torch_device().device_count())]
    if len(devices) < each * (engines or 1):
        raise AnsweringError(
            f"--data-parallel {engines or 1} and --tensor-parallel {each} take {each * (engines or 1)} devices, and "
            f"{len(devices)} are visible -> lower them, or see {variable}"
        )
    groups = [devices[start : start + each] for start in range(0, len(devices) - each + 1, each)]
    return [{variable: ",".join(group)} for group in groups[:engines]]


def _start(job: Path, means: Means, more: dict[str, str], log: Any) -> _Worker:
    ours, theirs = os.pipe()
    environment = ENVIRONMENT | os.environ | more
    command = [*WORKER, str(job), json.dumps(asdict(means)), str(theirs)]
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(theirs,),
            start_new_session=True,
        )
    finally:
        os.close(theirs)
    return _Worker(process, ours)


def _hand_out(workers: list[_Worker], todo: deque[int], out: Any, progress: tqdm) -> bool:
    """Give each process rows as fast as it answers them. After a failure, only wait for what was asked.

    Returns:
        whether all rows are answered.
    """
    first_share = math.ceil(len(todo) / len(workers))
    alive, failed = list(workers), False
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.pipe, selectors.EVENT_READ, worker)
        while (todo and not failed) or any(worker.asked for worker in alive):
            for key, _ in selector.select():
                worker = key.data
                messages = worker.messages()
                if messages is None:
                    selector.unregister(worker.pipe)
                    alive.remove(worker)
                    worker.note_end()
                    failed = True
                    waiting = sum(len(other.asked) for other in alive)
                    if waiting:
                        progress.write(f"{worker.error}; finishing {waiting} problem(s) first", sys.stderr)
                for message in messages or ():
                    wanted = 1
                    if "error" in message:
                        worker.error = message["error"]
                        continue
                    if "ready" in message:
                        worker.ready, wanted = True, min(message["ready"], first_share)
                    else:
                        out.write(json.dumps(message).encode() + b"\n")
                        out.flush()
                        worker.asked.discard(message["row"])
                        progress.update()
                    for _ in range(0 if failed else min(wanted, len(todo))):
                        row = todo.popleft()
                        worker.asked.add(row)
                        worker.tell(row)
    for worker in alive:
        worker.tell(END)
    return not todo and not any(worker.asked for worker in workers)
