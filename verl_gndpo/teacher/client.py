# SPDX-License-Identifier: Apache-2.0
"""The trainer's side of the teacher: send rows of verl's TransferQueue to the workers."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.single_controller.ray import RayResourcePool
from verl.utils import tensordict_utils as tu

from verl_gndpo.config import TeacherConfig
from verl_gndpo.teacher.group import TeacherGroup
from verl_gndpo.teacher.routing import Routing, place_rows
from verl_gndpo.teacher.worker import FIELDS
from verl_gndpo.verl_patches.replay_buffer import call_back

COPIES = "gndpo_copies"
"""Partition of copies of rows, which verl's replay buffer does not watch."""

SCORES = ["teacher_log_probs", "teacher_kl"]
"""Fields that the workers write; the second one only with the student's most likely tokens."""


class TeacherClient:
    """Sends each row to the workers once. The workers write its scores beside it."""

    def __init__(self, teacher: TeacherConfig, pool: RayResourcePool, device_name: str):
        """Start the workers, without waiting for them.

        Args:
            teacher: a resolved `teacher` section (`read_teacher_config`).
            pool: the GPUs to run on.
            device_name: as in verl's `trainer.device`.
        """
        self.routing = Routing(teacher)
        self._group = TeacherGroup(teacher, pool, device_name)
        self._sent: set[str] = set()
        self._since = 0.0
        self._seconds_ahead = 0.0

    @property
    def restarts(self) -> int:
        """How often the workers were replaced in this run."""
        return self._group.restarts

    def load(self) -> None:
        """Load the weights, and wait for it; the workers can score from then on."""
        self._group.load()

    def score(self, batch: KVBatchMeta) -> dict[str, float]:
        """Score every row of a batch, and wait for it.

        Returns:
            gndpo/teacher_ahead_share: share of the rows that `score_ahead` had sent already.
            timing_s/teacher_ahead: seconds since the last batch in which the workers had such rows to score.
        """
        self._count_seconds_ahead()
        seconds, self._seconds_ahead = self._seconds_ahead, 0.0
        self.finish()
        missing = [row for row, key in enumerate(batch.keys) if key not in self._sent]
        ahead = len(batch) - len(missing)
        if missing:
            # Each rank needs a row, because all ranks gather the weights together. Scoring a row again changes nothing.
            again = (row for row, key in enumerate(batch.keys) if key in self._sent)
            missing += itertools.islice(again, max(self._group.ranks - len(missing), 0))
            if len(missing) < self._group.ranks:
                self._score_copies(batch)
                self._sent.difference_update(batch.keys)
                return {"gndpo/teacher_ahead_share": ahead / len(batch), "timing_s/teacher_ahead": seconds}
            self._send([batch.keys[row] for row in missing], [batch.tags[row] for row in missing], batch.partition_id)
            self.finish()
        self._sent.difference_update(batch.keys)
        return {"gndpo/teacher_ahead_share": ahead / len(batch), "timing_s/teacher_ahead": seconds}

    def score_ahead(self, keys: list[str], tags: list[dict], partition: str) -> None:
        """Send rows that are not sent yet to the workers, if they are idle; see `TeacherGroup.look`.

        Sends nothing before there is a prompt for each rank, because ranks would have to share one.

        Args:
            keys, tags: keys and tags of all rows of some prompts.
            partition: partition of verl's TransferQueue.
        """
        if self._group.is_busy:
            if not self._group.look():
                return
            self._seconds_ahead += time.monotonic() - self._since
        new = [(key, tag) for key, tag in zip(keys, tags, strict=True) if key not in self._sent]
        if len({prompt_of(key) for key, _ in new}) >= self._group.ranks:
            self._send([key for key, _ in new], [tag for _, tag in new], partition)

    def forget(self, prompts: set[str]) -> None:
        """Wait until the workers no longer read rows of these prompts, which verl is about to delete."""
        sent = {key for key in self._sent if prompt_of(key) in prompts}
        if sent:
            self.finish()
            self._sent -= sent

    def finish(self) -> None:
        """Wait until the workers are idle; see `TeacherGroup.finish`."""
        self._group.finish()

    def _score_copies(self, batch: KVBatchMeta) -> None:
        """Score a batch with fewer rows than ranks: give every rank a copy of a row, in a partition of its own."""
        rows = [number % len(batch) for number in range(self._group.ranks)]
        keys = [f"{number}.{batch.keys[row]}" for number, row in enumerate(rows)]
        tags = [batch.tags[row] for row in rows]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=self._fields)
        copies = tu.index_select_tensor_dict(data, rows)
        tq.kv_batch_put(keys=keys, partition_id=COPIES, fields=copies, tags=tags)
        try:
            self._send(keys, tags, COPIES)
            self.finish()
            scores = tq.kv_batch_get(keys=keys[: len(batch)], partition_id=COPIES, select_fields=SCORES)
            tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=scores)
        finally:
            self._sent.difference_update(keys)
            tq.kv_clear(keys=keys, partition_id=COPIES)

    def _count_seconds_ahead(self) -> None:
        if self._group.is_busy:
            self._seconds_ahead += time.monotonic() - self._since

    @property
    def _fields(self) -> list[str]:
        """Return the fields of a batch that the workers read."""
        column = self.routing.column
        return [*FIELDS, *([column] if column is not None and column not in FIELDS else [])]

    def _send(self, keys: list[str], tags: list[dict], partition: str) -> None:
        column = self.routing.column
        values = [""] * len(keys)
        if column is not None:
            values = list(tq.kv_batch_get(keys=keys, partition_id=partition, select_fields=[column])[column])
        order = place_rows(
            prompts=[prompt_of(key) for key in keys],
            routes=[self.routing.route(value) for value in values],
            tokens=[tag["seq_len"] for tag in tags],
            ranks=self._group.ranks,
            # Rows that verl's agent loop has not written may lack it.
            shared=[tag.get("prompt_len", 0) for tag in tags],
        )
        request = KVBatchMeta(
            keys=[keys[row] for row in order],
            tags=[tags[row] for row in order],
            partition_id=partition,
            fields=self._fields,
        )
        self._group.submit(request)
        self._since = time.monotonic()
        self._sent.update(keys)


def prompt_of(key: str) -> str:
    """Return the prompt in a row's key, which verl's agent loop builds as "{prompt}_{session}_{turn}"."""
    return key.rsplit("_", 2)[0]


def score_while_generating(replay_buffer: Any, teacher: TeacherClient) -> Callable[[], None]:
    """Score finished prompts whenever verl's replay buffer waits for others.

    Does nothing for a custom sampler (trainer.v1.sampler.custom_sampler) that waits or deletes rows in another way.

    Returns:
        A function that sends the prompts that are finished now to the teacher, without waiting for it.
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
