# SPDX-License-Identifier: Apache-2.0
"""The teacher as the trainer sees it: a worker group that is asked for rows of verl's TransferQueue."""

import time
from collections.abc import Callable

import ray
import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.protocol import DataProtoFuture
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

from verl_gndpo.config import TeacherConfig
from verl_gndpo.teacher.routing import Routing, place_rows
from verl_gndpo.teacher.worker import FIELDS, TeacherWorker
from verl_gndpo.verl_patches.replay_buffer import call_back


class TeacherClient:
    """Sends rows to the workers, each once, and waits for their scores, which the workers write beside the rows."""

    def __init__(self, teacher: TeacherConfig, pool: RayResourcePool, device_name: str):
        """Start the workers, without waiting for them.

        Args:
            teacher: a resolved `teacher` section (`read_teacher_config`).
            pool: the GPUs to run on.
            device_name: as in verl's `trainer.device`.
        """
        self.routing = Routing(teacher)
        self._workers = RayWorkerGroup(
            resource_pool=pool,
            ray_cls_with_init=RayClassWithInitArgs(cls=ray.remote(TeacherWorker), config=teacher),
            device_name=device_name,
            name_prefix="teacher",
        )
        self._ranks = 0
        self._sent: set[str] = set()
        self._running: DataProtoFuture | None = None
        self._since = 0.0
        self._seconds_ahead = 0.0

    def load(self) -> None:
        """Load the weights, and wait for it; the workers can score from then on."""
        self._workers.reset()
        self._ranks = max(self._workers._query_dispatch_info("train")) + 1

    def score(self, batch: KVBatchMeta) -> dict[str, float]:
        """Have every row of a batch scored, and wait for it.

        Returns:
            gndpo/teacher_ahead_share: share of the rows that were sent before by `score_ahead`;
            timing_s/teacher_ahead: how long the workers have worked on such rows until now, since the last batch.
        """
        self._count_seconds_ahead()
        seconds, self._seconds_ahead = self._seconds_ahead, 0.0
        self.finish()
        missing = [row for row, key in enumerate(batch.keys) if key not in self._sent]
        ahead = len(batch) - len(missing)
        if missing:
            # Each rank needs a row, or it would miss the others' gathering of the weights.
            again = (row for row, key in enumerate(batch.keys) if key in self._sent)
            missing += [row for row, _ in zip(again, range(self._ranks - len(missing)), strict=False)]
            self._send([batch.keys[row] for row in missing], [batch.tags[row] for row in missing], batch.partition_id)
            self.finish()
        self._sent.difference_update(batch.keys)
        return {"gndpo/teacher_ahead_share": ahead / len(batch), "timing_s/teacher_ahead": seconds}

    def score_ahead(self, keys: list[str], tags: list[dict], partition: str) -> None:
        """Have the workers begin with those of these rows that they don't have yet, if they are idle.

        Nothing is sent before there is a prompt for each rank, since ranks would have to run one together.

        Args:
            keys, tags: of all rows of some prompts.
            partition: of verl's TransferQueue.
        """
        if self._running is not None:
            ready, pending = ray.wait(self._running.futures, num_returns=len(self._running.futures), timeout=0)
            # Raises what one rank has raised while the others wait for it.
            ray.get(ready)
            if pending:
                return
            self._count_seconds_ahead()
            self._running = None
        new = [(key, tag) for key, tag in zip(keys, tags, strict=True) if key not in self._sent]
        if len({prompt_of(key) for key, _ in new}) >= self._ranks:
            self._send([key for key, _ in new], [tag for _, tag in new], partition)

    def forget(self, prompts: set[str]) -> None:
        """Rows of these prompts are about to be thrown away, and the workers must not be reading them then."""
        sent = {key for key in self._sent if prompt_of(key) in prompts}
        if sent:
            self.finish()
            self._sent -= sent

    def finish(self) -> None:
        """Wait for what the workers are doing.

        Raises:
            Whatever a worker has raised.
        """
        if self._running is not None:
            running, self._running = self._running, None
            ray.get(running.futures)

    def _count_seconds_ahead(self) -> None:
        if self._running is not None:
            self._seconds_ahead += time.monotonic() - self._since

    def _send(self, keys: list[str], tags: list[dict], partition: str) -> None:
        column = self.routing.column
        values = [""] * len(keys)
        if column is not None:
            values = list(tq.kv_batch_get(keys=keys, partition_id=partition, select_fields=[column])[column])
        order = place_rows(
            prompts=[prompt_of(key) for key in keys],
            routes=[self.routing.route(value) for value in values],
            tokens=[tag["seq_len"] for tag in tags],
            ranks=self._ranks,
        )
        request = KVBatchMeta(
            keys=[keys[row] for row in order],
            tags=[tags[row] for row in order],
            partition_id=partition,
            fields=[*FIELDS, *([column] if column is not None and column not in FIELDS else [])],
        )
        self._running = self._workers.compute_teacher_log_prob(request)
        self._since = time.monotonic()
        self._sent.update(keys)


def prompt_of(key: str) -> str:
    """The prompt of a row: verl's agent loop names rows "{prompt}_{session}_{turn}"."""
    return key.rsplit("_", 2)[0]


def score_while_generating(replay_buffer, teacher: TeacherClient) -> Callable[[], None]:
    """Have the teacher score finished prompts whenever verl's replay buffer waits for others.

    A custom sampler (trainer.v1.sampler.custom_sampler) that waits or throws rows away in another way is left alone.

    Returns:
        What has the teacher begin with prompts that are finished now; it does not wait.
    """

    def score_finished() -> None:
        rows, finished = replay_buffer.partitions["train"], replay_buffer.finished_keys["train"]
        keys = [key for key in rows if prompt_of(key) in finished]
        teacher.score_ahead(keys, [rows[key] for key in keys], "train")

    def look_and_score() -> None:
        replay_buffer._sync_metadata_from_transfer_queue()
        score_finished()

    if not call_back(replay_buffer, waiting=score_finished, discarding=teacher.forget):
        return lambda: None
    return look_and_score
