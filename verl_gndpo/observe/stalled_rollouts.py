# SPDX-License-Identifier: Apache-2.0
"""Waits for responses that do not come: say so, and end the run instead of waiting for ever."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray

from verl_gndpo.teacher.waiting import Patience
from verl_gndpo.verl_patches.replay_buffer import watch_waits

logger = logging.getLogger(__name__)

FIRST_LINE_S = 60.0
"""After how long without a response a wait is told. Each further line comes after twice the time of the one before."""

LINE_FACTOR = 2.0
"""Nor is it told before so many times the longest such time so far: some responses simply take long."""

FIRST_LIMIT_S = 3600.0
"""Limit before any response of the run has come."""

LEAST_LIMIT_S = 1800.0
LIMIT_FACTOR = 10.0
"""Later, responses may take this many times what the longest time without one was, and at least LEAST_LIMIT_S."""

ANSWER_S = 5.0
"""How long a process may take to say that it is there."""


class StalledRolloutsError(RuntimeError):
    """No response was finished for longer than `algorithm.gndpo.rollout_timeout_s`."""


class StalledRollouts:
    """Follows the waits of a replay buffer.

    verl waits for ever when the rollout engine, a reward function or a worker of either hangs.
    """

    def __init__(self, replay_buffer: Any, *, limit: float | None, workers: Callable[[], Mapping[str, Any]]):
        """
        Args:
            replay_buffer: the trainer's. A custom sampler that waits in a way of its own is not followed.
            limit: `algorithm.gndpo.rollout_timeout_s`.
            workers: returns Ray's handles of the processes that make and grade responses, by what they are.
        """
        self._buffer, self._workers = replay_buffer, workers
        self._patience = Patience(limit, first=FIRST_LIMIT_S, least=LEAST_LIMIT_S, factor=LIMIT_FACTOR)
        self._seen: tuple[Any, ...] = ()
        self._since = self._next_line = 0.0
        watch_waits(replay_buffer, self._look)

    def _look(self, partition: str) -> None:
        buffer, now = self._buffer, time.monotonic()
        prompts = frozenset(buffer.prompt_global_steps[partition])
        done = len(buffer.finished_keys[partition]) + len(buffer.failure_keys[partition])
        seen = (partition, prompts, len(buffer.partitions[partition]), done)
        if seen != self._seen:
            # The time before the first look at some prompts belongs to another part of the step.
            if self._seen[:2] == seen[:2]:
                self._patience.has_taken(now - self._since)
            self._seen, self._since = seen, now
            self._next_line = max(FIRST_LINE_S, LINE_FACTOR * (self._patience.longest or 0.0))
            return
        waited, limit = now - self._since, self._patience.limit
        if waited <= limit and waited < self._next_line:
            return
        state = f"{len(prompts) - done} of {len(prompts)} prompts are not finished; {self._describe_workers()}"
        if waited > limit:
            raise StalledRolloutsError(
                f"no response was finished within {limit:.0f} s (algorithm.gndpo.rollout_timeout_s): {state}. "
                "The last checkpoint can be resumed."
            )
        self._next_line = max(2 * self._next_line, waited)
        logger.warning("no response was finished for %.0f s (limit: %.0f): %s", waited, limit, state)

    def _describe_workers(self) -> str:
        silent = find_silent(self._workers())
        if silent:
            return f"these processes do not answer: {', '.join(silent)}"
        return (
            "all workers answer, so that a request to the rollout engine, or a call of the reward function or of a "
            "tool, does not return"
        )


def find_silent(workers: Mapping[str, Any], timeout_s: float = ANSWER_S) -> list[str]:
    """Return the names of the actors that are dead or do not answer.

    Args:
        workers: Ray's handles of actors by name.
    """
    names = {handle.__ray_ready__.remote(): name for name, handle in workers.items()}
    if not names:
        return []
    answered, pending = ray.wait(list(names), num_returns=len(names), timeout=timeout_s)
    silent = [names[future] for future in pending]
    for future in answered:
        try:
            ray.get(future)
        except ray.exceptions.RayError:
            silent.append(f"{names[future]} (dead)")
    return silent
