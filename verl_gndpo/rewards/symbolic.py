# SPDX-License-Identifier: Apache-2.0
"""Compare by computer algebra, in a helper process: model output can keep sympy busy for ever or fill the memory.

math-verify limits its time with SIGALRM, which only a main thread can use, and verl grades in executor threads. So each
process that grades starts one helper when it first needs one. The helper imports sympy and math-verify, but neither
torch nor verl. It forks a child that does the work and waits for it. The kernel kills a child that runs out of time or
memory, and the helper forks the next one in milliseconds, with everything imported. Helper and child end with the
process that grades. The limit on time counts comparisons alone: imports and first use are done before the first fork.
"""

import atexit
import functools
import gc
import io
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, NoReturn

from .spelling import clean

logger = logging.getLogger(__name__)

# Limit per comparison, in seconds of processor time, so that a busy machine doesn't change a grade.
TIME_LIMIT_S = 2.0
# Limit on the elapsed time of a comparison that waits instead of computing. A busy machine must not reach it.
STALL_LIMIT_S = 120.0
MEMORY_LIMIT_BYTES = 1 << 30
START_LIMIT_S = 300.0
# The first comparison builds tables that cost as much as fifteen others.
_FIRST_COMPARISON = ("(x+1)^2", "x^2+2x+1", 0.0)
# Limits the growth of sympy's caches.
COMPARISONS_PER_CHILD = 2_000

# Answers that computer algebra would only lose seconds on, until it ran into its limits.
MAX_CHARS = 1_000
_HOPELESS = re.compile(
    r"\d{60}|\d{4}\s*\}?\s*!|!\s*!|\^\s*[{(]?\s*[-+]?\s*\d{4}|\d\s*\}?\s*\^\s*[{(]?\s*\d+\s*\}?\s*\^\s*[{(]?\s*\d"
)

_READY, _YES, _NO, _KILLED = b"R", b"Y", b"N", b"K"

timeouts = 0
"""Number of this process's comparisons that ran out of time or memory. Each is graded 0."""


def is_hopeless(answer: str) -> bool:
    """Return True if computer algebra shouldn't be asked, because the answer is too long or has too large numbers."""
    return len(answer) > MAX_CHARS or _HOPELESS.search(clean(answer)) is not None


@functools.lru_cache(maxsize=8192)
def equal(answer: str, truth: str, tolerance: float) -> bool:
    """Return `algebra.compare` from the helper process, False if it runs out of time or memory.

    Raises:
        RuntimeError: the helper process doesn't start, or something kills it twice in a row.
    """
    global timeouts
    reply = _helper.ask(json.dumps([answer, truth, tolerance]).encode() + b"\n")
    if reply == _KILLED:
        timeouts += 1
        if timeouts == 1:
            logger.warning(
                "a symbolic comparison ran out of its %s s or %d MiB and is graded 0: answer %.80r, truth %.80r. "
                "Logged once per process; verl_gndpo.rewards.symbolic.timeouts counts them",
                TIME_LIMIT_S,
                MEMORY_LIMIT_BYTES >> 20,
                answer,
                truth,
            )
    return reply == _YES


class _Helper:
    """Start the helper process and send it requests, one at a time, from any thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> bytes:
        with self.lock:
            # Try twice: something such as the machine's out-of-memory killer may have ended an idle helper.
            for _ in range(2):
                if self.process is None:
                    self.process = self._start()
                try:
                    requests, replies = _pipes(self.process)
                    requests.write(request)
                    reply = replies.read(1)
                except BrokenPipeError:
                    reply = b""
                except BaseException:
                    # The next request would take the reply that is still to come for its own.
                    self.close()
                    raise
                if reply:
                    return reply
                self.close()
        raise RuntimeError(
            "the helper process for symbolic comparison ended by itself, twice: look for what kills it, "
            "such as the machine's out-of-memory killer"
        )

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve({TIME_LIMIT_S})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # The helper can import what this process can.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            # Ctrl-C reaches only the grading process, and the helper ends with it.
            start_new_session=True,
        )
        watchdog = threading.Timer(START_LIMIT_S, process.kill)
        watchdog.start()
        ready = _pipes(process)[1].read(1)
        watchdog.cancel()
        if ready != _READY:
            process.kill()
            raise RuntimeError(
                f"the helper process for symbolic comparison didn't start (exit status {process.wait()}, "
                "its error is above); check `pip install 'math-verify[antlr4-9-3]>=0.9,<0.10'`"
            )
        return process

    def close(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            for pipe in _pipes(process):
                pipe.close()
            process.kill()
            process.wait()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """Return the pipes to and from a helper."""
    assert process.stdin and process.stdout
    return process.stdin, process.stdout


_helper = _Helper()
atexit.register(lambda: _helper.close())


def _after_fork() -> None:
    # The helper stays the parent's. An open copy of its pipe in this process would keep it alive after the parent.
    global _helper
    inherited = _helper.process
    _helper = _Helper()
    if inherited is not None:
        for pipe in _pipes(inherited):
            pipe.close()
        # It is not this process's child, so there is nothing to wait for.
        inherited.returncode = 0


os.register_at_fork(after_in_child=_after_fork)


def serve(time_limit_s: float) -> None:
    """Run the helper: say that it is ready, then keep one child at work until the input ends.

    Args:
        time_limit_s: processor time per comparison.
    """
    # Imported here, so that only the helper pays for sympy and math-verify: 0.3 s and 40 MB.
    from .algebra import compare

    # math-verify warns that its own limits are off.
    logging.disable()
    # Each child inherits what the first comparison builds, so that the limit doesn't count it again after a kill.
    compare(*_FIRST_COMPARISON)
    gc.freeze()
    # Output of libraries must neither be taken for a reply nor fill the log of a run.
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


def _work(
    requests: io.FileIO, replies: int, compare: Callable[[str, str, float], bool], time_limit_s: float
) -> NoReturn:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    # The thread that started the helper may block or ignore the timers' signals.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    for _ in range(COMPARISONS_PER_CHILD):
        request = requests.readline()
        if not request:
            os._exit(0)
        signal.setitimer(signal.ITIMER_PROF, time_limit_s)
        signal.setitimer(signal.ITIMER_REAL, STALL_LIMIT_S)
        try:
            same = compare(*json.loads(request))
        except MemoryError:
            os._exit(1)
        except Exception:
            # sympy and its parsers raise all kinds of errors on text that is not mathematics.
            same = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(replies, _YES if same else _NO)
    os._exit(_RENEW)
