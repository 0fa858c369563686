# SPDX-License-Identifier: Apache-2.0
"""The teacher's workers as one thing that may fail: wait for them with a limit, and replace them when they are lost.

The teacher has no state but its weights, so that new workers score what the lost ones were scoring, and nothing else
changes. All ranks are replaced, because those that are left wait in a collective operation for the one that is not.
"""

import contextlib
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from transfer_queue import KVBatchMeta
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

from verl_gndpo.config import TeacherConfig
from verl_gndpo.teacher.waiting import FIRST_LINE_S, Patience, TeacherLostError, first_line, start_limit
from verl_gndpo.teacher.worker import TeacherWorker

logger = logging.getLogger(__name__)

GRACE_S = 10.0
"""How long to wait, after a worker has raised, for the news that another one has died."""

WEIGHTS = (".safetensors", ".bin")

LOST = (RayActorError, OutOfMemoryError, WorkerCrashedError, NodeDiedError)


class _LostError(Exception):
    """Workers died or did not answer in time; the message says which."""


class TeacherGroup:
    """The workers of a teacher, which are asked for one batch at a time."""

    def __init__(self, teacher: TeacherConfig, pool: RayResourcePool, device_name: str):
        """Start the workers, without waiting for them.

        Args:
            teacher: a resolved `teacher` section (`read_teacher_config`).
            pool: the GPUs to run on.
            device_name: as in verl's `trainer.device`.
        """
        self.ranks = 0
        self.restarts = 0
        """How often the workers were replaced in this run."""

        self._teacher, self._pool, self._device_name = teacher, pool, device_name
        self._processes: list[tuple[str, int]] = []
        self._request: KVBatchMeta | None = None
        self._futures: list[Any] = []
        self._since = 0.0
        self._patience = Patience(teacher.timeout_s)
        self._start()

    @property
    def is_busy(self) -> bool:
        """Return True while a batch that was submitted is not known to be finished."""
        return self._request is not None

    def load(self) -> None:
        """Load the weights, and wait for it.

        Raises:
            TeacherLostError: a worker died, or did not answer in time.
            The exception of a worker.
        """
        try:
            self._load()
        except _LostError as lost:
            raise TeacherLostError(f"the teacher can't be loaded: {lost}") from lost.__cause__

    def submit(self, request: KVBatchMeta) -> None:
        """Have the workers score a batch, without waiting for it. They must not be busy."""
        assert self._request is None
        self._request = request
        self._send()

    def look(self) -> bool:
        """Return True if the workers are idle. If they are lost or late, replace them, and have them score again.

        Raises:
            TeacherLostError, and the exception of a worker.
        """
        if self._request is None:
            return True
        ready, pending = ray.wait(self._futures, num_returns=len(self._futures), timeout=0)
        late = time.monotonic() - self._since > self._patience.limit
        try:
            # Raises what one rank has raised while the others wait for it.
            for future in ready:
                self._get(future, pending)
            if pending and late:
                raise _LostError(self._say_late(pending, "scored its rows", self._patience.limit))
        except _LostError as lost:
            self._replace(lost)
            return False
        if pending:
            return False
        self._finished()
        return True

    def finish(self) -> None:
        """Wait until the workers are idle. If they are lost or late, replace them, and have them score again.

        Raises:
            TeacherLostError, and the exception of a worker.
        """
        while self._request is not None:
            try:
                self._wait(self._futures, self._since, self._patience.limit, "scored its rows")
            except _LostError as lost:
                self._replace(lost)
            else:
                self._finished()

    # --- requests -----------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        self._futures = list(self._workers.compute_teacher_log_prob(self._request).futures)
        self._since = time.monotonic()

    def _finished(self) -> None:
        self._patience.has_taken(time.monotonic() - self._since)
        self._request, self._futures = None, []

    def _wait(self, futures: list[Any], since: float, limit: float, done: str, loads: bool = False) -> None:
        """Wait for an answer of each rank, and say so in the log while it lasts.

        Args:
            futures: one of each rank.
            since: when the wait began, by time.monotonic.
            limit: in seconds.
            done: what a rank has done once it has answered.
            loads: True if the ranks read files meanwhile, which the log then names.

        Raises:
            _LostError: a worker died, or did not answer in time.
            The exception of a worker.
        """
        pending, next_line = list(futures), FIRST_LINE_S
        while pending:
            waited = time.monotonic() - since
            if waited > limit:
                reads = self._say_files(pending, futures) if loads else ""
                raise _LostError(self._say_late(pending, done, limit) + reads)
            if waited >= next_line:
                ranks = self._say_ranks(pending, futures)
                reads = self._say_files(pending, futures) if loads else ""
                logger.warning(
                    "waiting for the teacher: %s not %s after %.0f s (limit: %.0f)%s", ranks, done, waited, limit, reads
                )
                next_line = max(2 * next_line, waited)
            ready, pending = ray.wait(pending, timeout=max(min(next_line, limit) - waited, 0.01))
            for future in ready:
                self._get(future, pending)

    def _get(self, future: Any, others: list[Any]) -> Any:
        """Return an answer. What a rank raises because another one has died counts as that one's death."""
        try:
            return ray.get(future)
        except LOST as error:
            raise _LostError(first_line(error)) from error
        except Exception as error:
            failed = error
        deadline = time.monotonic() + GRACE_S
        while others and time.monotonic() < deadline:
            ready, others = ray.wait(others, timeout=max(deadline - time.monotonic(), 0))
            for other in ready:
                try:
                    ray.get(other)
                except LOST as error:
                    raise _LostError(first_line(error)) from error
                # All ranks may raise at the same problem.
                except Exception:
                    continue
        self._request, self._futures = None, []
        raise failed

    def _say_ranks(self, pending: list[Any], futures: list[Any]) -> str:
        ranks = [str(rank) for rank, future in enumerate(futures) if future in pending]
        kind, verb = ("rank", "has") if len(ranks) == 1 else ("ranks", "have")
        return f"{kind} {', '.join(ranks)} of {len(futures)} {verb}"

    def _say_files(self, pending: list[Any], futures: list[Any]) -> str:
        """Say which file each pending rank is reading."""
        asked = {}
        for rank, future in enumerate(futures):
            if future in pending:
                node, process = self._processes[rank]
                asked[rank] = _files_of_process.options(num_cpus=0, scheduling_strategy=_on(node)).remote(process)
        ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=GRACE_S)
        files = {rank: ray.get(answer) for rank, answer in asked.items() if answer in ready}
        said = [f"rank {rank} reads {' and '.join(names)}" for rank, names in files.items() if names]
        return "".join(f"; {words}" for words in said)

    def _say_late(self, pending: list[Any], done: str, limit: float) -> str:
        return f"{len(pending)} of its ranks had not {done} within the limit of {limit:.0f} s (teacher.timeout_s)"

    # --- workers ------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._workers = RayWorkerGroup(
            resource_pool=self._pool,
            ray_cls_with_init=RayClassWithInitArgs(cls=ray.remote(TeacherWorker), config=self._teacher),
            device_name=self._device_name,
            # Ray may still know the names of the lost ones.
            name_prefix="teacher" if self.restarts == 0 else f"teacher_{self.restarts}",
        )

    def _load(self) -> None:
        models = ", ".join(dict.fromkeys(str(model.path) for model in self._teacher.teachers.values()))
        limit = start_limit(self._teacher)
        begin = time.monotonic()
        started = self._workers.execute_all_async("whereabouts")
        self._wait(started, begin, limit, "started")
        self._processes = ray.get(started)
        self._wait(self._workers.execute_all_async("reset"), begin, limit, f"loaded {models}", loads=True)
        self.ranks = max(self._workers._query_dispatch_info("train")) + 1

    def _replace(self, lost: _LostError) -> None:
        """Put new workers in the place of the old ones, and have them score what those were scoring."""
        while True:
            if self.restarts >= self._teacher.max_restarts:
                raise TeacherLostError(
                    f"the teacher was lost: {lost}. It has been replaced {self.restarts} times, which is what "
                    f"teacher.max_restarts={self._teacher.max_restarts} allows. The last checkpoint can be resumed."
                ) from lost.__cause__
            self.restarts += 1
            logger.warning(
                "the teacher was lost and is replaced (%d of %d times): %s",
                self.restarts,
                self._teacher.max_restarts,
                lost,
            )
            self._kill()
            self._start()
            try:
                self._load()
            except _LostError as again:
                lost = again
                continue
            break
        if self._request is not None:
            self._send()

    def _kill(self) -> None:
        """End all workers, also those that were stopped and can't be told to."""
        for worker in self._workers.workers:
            ray.kill(worker, no_restart=True)
        killed = []
        for node, process in self._processes:
            killed.append(_kill_process.options(num_cpus=0, scheduling_strategy=_on(node)).remote(process))
        # The node may be gone, too.
        ray.wait(killed, num_returns=len(killed), timeout=GRACE_S)
        self._processes = []


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


def files_being_read(process: int) -> list[str]:
    """Return the files of weights of which a process has read a part, each with that part.

    They are mapped into memory, so that the kernel knows how much of them has been touched.
    """
    found = []
    # Or the process has ended, or belongs to another user.
    with contextlib.suppress(psutil.Error):
        for mapped in psutil.Process(process).memory_maps(grouped=True):
            if mapped.path.endswith(WEIGHTS) and 0 < mapped.rss < mapped.size:
                found.append(f"{mapped.path} ({mapped.rss / mapped.size:.0%} so far)")
    return found


@ray.remote
def _files_of_process(process: int) -> list[str]:
    return files_being_read(process)


@ray.remote
def _kill_process(process: int) -> None:
    # It has ended, or its number belongs to another one by now.
    with contextlib.suppress(OSError):
        if TeacherWorker.__name__ in Path(f"/proc/{process}/cmdline").read_text():
            os.kill(process, signal.SIGKILL)
