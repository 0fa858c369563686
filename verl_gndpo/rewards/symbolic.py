# SPDX-License-Identifier: Apache-2.0
"""Comparison by computer algebra, in a helper process: model output can keep sympy busy for ever or fill the memory.

math-verify limits its time with SIGALRM, which only a main thread can use, and verl grades in executor threads. So each
process that grades starts, at its first need, one helper (sympy and math-verify, neither torch nor verl). The helper
stays idle and forks a child that does the work; a child that runs out of time or memory is killed by the kernel, and
its successor is there in milliseconds, with everything imported. Both end when the grading process does.
"""

import atexit
import functools
import io
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

# Of processor time, so that a busy machine doesn't change a grade; by the clock it is WALL_FACTOR times as much.
TIME_LIMIT_S = 2.0
WALL_FACTOR = 4
MEMORY_LIMIT_BYTES = 1 << 30
START_LIMIT_S = 120.0
# Bounds what sympy's caches grow to.
COMPARISONS_PER_CHILD = 2_000

_READY, _YES, _NO, _KILLED = b"R", b"Y", b"N", b"K"

timeouts = 0
"""How many comparisons of this process ran out of time or memory (each graded 0)."""


@functools.lru_cache(maxsize=8192)
def equal(answer: str, truth: str, tolerance: float) -> bool:
    """Whether `graders.same` holds, with computer algebra where it needs it, within the limits of this module.

    Raises:
        RuntimeError: the helper process doesn't start, or something kills it again and again.
    """
    global timeouts
    reply = _helper.ask(json.dumps([answer, truth, tolerance]).encode() + b"\n")
    if reply == _KILLED:
        timeouts += 1
        if timeouts == 1:
            logger.warning(
                "a symbolic comparison ran out of its %s s or %d MiB and is graded 0: answer %.80r, truth %.80r. "
                "Said once a process; verl_gndpo.rewards.symbolic.timeouts counts them",
                TIME_LIMIT_S,
                MEMORY_LIMIT_BYTES >> 20,
                answer,
                truth,
            )
    return reply == _YES


class _Helper:
    """The grading process's side: one request at a time, whichever thread asks."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process = None

    def ask(self, request: bytes) -> bytes:
        with self.lock:
            # Twice: something outside, such as the machine's out-of-memory killer, may have ended an idle helper.
            for _ in range(2):
                if self.process is None:
                    self.process = self._start()
                try:
                    self.process.stdin.write(request)
                    reply = self.process.stdout.read(1)
                except BrokenPipeError:
                    reply = b""
                except BaseException:
                    # The reply still to come would be taken for the next request's.
                    self.close()
                    raise
                if reply:
                    return reply
                self.close()
        raise RuntimeError(
            "the helper process for symbolic comparison ended by itself, twice: look for what kills it, "
            "such as the machine's out-of-memory killer"
        )

    def _start(self) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve({TIME_LIMIT_S})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # What this process can import, its helper can.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            # Ctrl-C is for the grading process; the helper follows it.
            start_new_session=True,
        )
        watchdog = threading.Timer(START_LIMIT_S, process.kill)
        watchdog.start()
        ready = process.stdout.read(1)
        watchdog.cancel()
        if ready != _READY:
            process.kill()
            raise RuntimeError(
                f"the helper process for symbolic comparison didn't start (exit status {process.wait()}, "
                "its error is above); check `pip install 'math-verify[antlr4-9-3]>=0.9,<0.10'`"
            )
        return process

    def close(self):
        process, self.process = self.process, None
        if process is not None:
            process.stdin.close()
            process.stdout.close()
            process.kill()
            process.wait()


_helper = _Helper()
atexit.register(lambda: _helper.close())


def _after_fork():
    # The parent keeps its helper. A copy of the pipe left open here would keep that helper alive after its parent.
    global _helper
    inherited = _helper.process
    _helper = _Helper()
    if inherited is not None:
        inherited.stdin.close()
        inherited.stdout.close()
        # Not this process's child: nothing to wait for.
        inherited.returncode = 0


os.register_at_fork(after_in_child=_after_fork)


def serve(time_limit_s: float):
    """The helper: says that it is ready, then keeps one child at work until there is no more input."""
    from .algebra import compare

    # What libraries print must not be taken for a reply, nor fill the log of a run.
    replies = os.dup(1)
    os.write(replies, _READY)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    requests = os.fdopen(0, "rb", buffering=0)
    while True:
        child = os.fork()
        if child == 0:
            _work(requests, replies, compare, time_limit_s)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            return
        if os.waitstatus_to_exitcode(status) != _RENEW:
            os.write(replies, _KILLED)


_RENEW = 3


def _work(requests: io.FileIO, replies: int, compare: Callable[[str, str, float], bool], time_limit_s: float):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    # The thread that started the helper may have blocked or ignored them.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    for _ in range(COMPARISONS_PER_CHILD):
        request = requests.readline()
        if not request:
            os._exit(0)
        signal.setitimer(signal.ITIMER_PROF, time_limit_s)
        signal.setitimer(signal.ITIMER_REAL, WALL_FACTOR * time_limit_s)
        try:
            same = compare(*json.loads(request))
        except MemoryError:
            os._exit(1)
        except Exception:
            # sympy and its parsers raise about anything on what is no mathematics.
            same = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(replies, _YES if same else _NO)
    os._exit(_RENEW)
