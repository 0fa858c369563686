# SPDX-License-Identifier: Apache-2.0
"""A process that answers rows: `pool` starts it, tells it rows on its standard input, and reads answers from a pipe.

python -m verl_gndpo.evaluation.worker JOB.json MEANS FD

MEANS is JSON. Its messages are lines of JSON: {"ready": rows at a time}, then an entry for `Answers` per row, in any
order, or {"error": one line}. It ends when it is told to, and when `pool` is no longer there.
"""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, Protocol

END = "end"
"""What is told after the last row."""


class Answerer(Protocol):
    """Answers rows, several at a time."""

    capacity: int
    """Rows that it needs to be busy."""

    def add(self, row: int) -> None: ...

    def finished(self) -> list[dict[str, Any]]:
        """Wait until rows are answered, and return their entries. It may return none."""


def main() -> None:
    path, means, pipe = sys.argv[1:]
    told: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(told,), daemon=True).start()
    with os.fdopen(int(pipe), "w", encoding="utf-8") as out:
        try:
            _answer(Path(path), json.loads(means), told, out)
        # verl, transformers and vLLM raise whatever is wrong with a model.
        except Exception as error:
            traceback.print_exc()
            reason = " ".join(str(error).split())
            named = (
                reason
                if isinstance(error, ValueError) and " -> " in reason
                else f"{type(error).__name__}: {reason[:300]}"
            )
            _send(out, {"error": named})
            raise SystemExit(1) from error


def _listen(told: "queue.Queue[str]") -> None:
    for line in sys.stdin:
        told.put(line.strip())
        if line.strip() == END:
            return
    # The pool was killed. What it started of vLLM is in this process's group.
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _send(out: Any, message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def _answer(path: Path, means: dict[str, Any], told: "queue.Queue[str]", out: Any) -> None:
    from verl_gndpo.evaluation.job import Job, Means
    from verl_gndpo.evaluation.prompts import Prompts

    job, using = Job(**json.loads(path.read_text())), Means(**means)
    prompts = Prompts(job, using.trust_remote_code)
    answerer: Answerer
    if job.server:
        from verl_gndpo.evaluation.server import Server

        answerer = Server(job, using, prompts)
    else:
        from verl_gndpo.evaluation.engine import Engine

        answerer = Engine(job, using, prompts)
    _send(out, {"ready": answerer.capacity})
    asked = 0
    while True:
        # An idle process waits; a busy one only looks.
        while asked == 0 or not told.empty():
            message = told.get()
            if message == END:
                return
            answerer.add(int(message))
            asked += 1
        for entry in answerer.finished():
            _send(out, entry)
            asked -= 1


if __name__ == "__main__":
    main()
