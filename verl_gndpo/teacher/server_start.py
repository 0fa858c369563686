# SPDX-License-Identifier: Apache-2.0
"""A limit for the start of verl's teacher servers, for which verl waits without a word and for ever."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray

from verl_gndpo.teacher.waiting import FIRST_LINE_S

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def limited_start(key: str, path: str, replicas: Callable[[], list[Any]], limit: float) -> Iterator[None]:
    """Say in the log how long servers have been starting within this block, and end them at the limit.

    Args:
        key: of their teacher.
        path: of its weights.
        replicas: returns verl's `RolloutReplica`s. There may be none yet.
        limit: in seconds.

    Raises:
        TimeoutError: they were not ready within the limit.
    """
    over, problems, begin = threading.Event(), [], time.monotonic()

    def watch() -> None:
        waited, next_line = 0.0, FIRST_LINE_S
        while not over.wait(max(min(next_line, limit) - waited, 0.01)):
            waited = time.monotonic() - begin
            late = [replica for replica in replicas() if replica.server_address is None]
            ranks = ", ".join(str(replica.replica_rank) for replica in late)
            if waited >= limit:
                problems.append(
                    f"servers {ranks} of teacher {key} had not loaded {path} within the limit of {limit:.0f} s"
                )
                # What waits for them fails then.
                for replica in late:
                    for actor in (*replica.servers, *replica.workers):
                        ray.kill(actor, no_restart=True)
                return
            if waited >= next_line:
                logger.warning(
                    "waiting for the teacher: servers %s of teacher %s have not loaded %s after %.0f s (limit: %.0f)",
                    ranks,
                    key,
                    path,
                    waited,
                    limit,
                )
                next_line = max(2 * next_line, waited)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    except Exception as error:
        if problems:
            raise TimeoutError(problems[0]) from error
        raise
    finally:
        over.set()
        thread.join()
