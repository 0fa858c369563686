# SPDX-License-Identifier: Apache-2.0
"""Write one split: convert its rows in worker processes, and write them in the order of the source."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from verl_gndpo.data_facts import FileFacts

from .errors import ConversionError, DroppedRow, one_line
from .images import ImageStore
from .prompt import Prompt
from .recipe import Recipe
from .report import UNLICENSED, Report
from .row import SCHEMA, ConvertedRow, convert_row
from .source import READ_BATCH_ROWS
from .split import SourceRow, Split

ROW_GROUP_ROWS = 64
ROW_GROUP_BYTES = 32 * 1024 * 1024
NAMED_DROPS = 50

Outcome = tuple[str, ConvertedRow | DroppedRow]
"""Id of a row, and the row as converted or the reason for dropping it."""


class Converter:
    """Convert rows of one split; picklable, so that worker processes can receive it."""

    def __init__(self, recipe: Recipe, prompt: Prompt, split: str, images: ImageStore, include_unlicensed: bool):
        self.recipe, self.prompt, self.split, self.images = recipe, prompt, split, images
        self.include_unlicensed = include_unlicensed

    def __call__(self, rows: list[SourceRow]) -> list[Outcome]:
        return [(self.recipe.row_id(self.split, row.key), self._outcome(row)) for row in rows]

    def _outcome(self, row: SourceRow) -> ConvertedRow | DroppedRow:
        keep = self.recipe.keep
        try:
            if keep and not self.include_unlicensed and isinstance(row.values, dict) and not keep(row.values):
                raise DroppedRow(UNLICENSED, "--include_unlicensed keeps it")
            return convert_row(row, self.split, self.recipe, self.prompt, self.images)
        except DroppedRow as dropped:
            return dropped
        except ConversionError:
            raise
        except Exception as error:  # a value that the published set does not have must not end the whole conversion
            return DroppedRow("row is not as the set has it", one_line(error))


def convert_all(
    rows: Iterable[SourceRow], converter: Converter, pool: ProcessPoolExecutor | None, workers: int
) -> Iterator[Outcome]:
    """Yield the outcomes of the rows in their order, with a bounded number of rows in flight.

    Raises:
        ConversionError: a worker process died.
    """
    rows = iter(rows)
    batches = iter(lambda: list(islice(rows, READ_BATCH_ROWS)), [])
    if pool is None:
        for batch in batches:
            yield from converter(batch)
        return
    waiting: deque[Future] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(converter, batch))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ConversionError(
            "a worker process died, perhaps because memory ran out: try a lower --num_proc."
        ) from error
    finally:
        for future in waiting:
            future.cancel()


def worker_pool(workers: int) -> ProcessPoolExecutor | None:
    """Return a pool of freshly started processes, because this one may run verl's threads; None for one worker."""
    if workers == 1:
        return None
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_follow_parent)


def _follow_parent() -> None:
    """End this worker when its parent is killed, because it would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker process follows its parent"

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class RowGroups:
    """Write rows into a parquet file, in groups that limit the memory of writer and reader.

    A group has at most `ROW_GROUP_ROWS` rows and `ROW_GROUP_BYTES` of images, or one larger row.

    Args:
        path: path of the file.
        facts: facts that the file's metadata states.
    """

    def __init__(self, path: Path, facts: FileFacts):
        self.schema = SCHEMA.with_metadata({**SCHEMA.metadata, **facts.metadata()})
        self.writer = pq.ParquetWriter(path, self.schema)
        self.group: list[dict[str, Any]] = []
        self.size = 0

    def __enter__(self) -> RowGroups:
        return self

    def __exit__(self, failure: type | None, *_: object) -> None:
        if failure is None:
            self._flush()
        self.writer.close()

    def add(self, row: dict[str, Any]) -> None:
        """Append a row in verl's schema."""
        size = sum(len(image["bytes"]) for image in row["images"])
        if len(self.group) == ROW_GROUP_ROWS or self.size + size > ROW_GROUP_BYTES:
            self._flush()
        self.group.append(row)
        self.size += size

    def _flush(self) -> None:
        if self.group:
            self.writer.write_table(pa.Table.from_pylist(self.group, schema=self.schema))
        self.group, self.size = [], 0


def write_split(
    split: Split,
    outcomes: Iterable[Outcome],
    facts: FileFacts,
    folder: Path,
    rows_per_shard: int | None = None,
    fits: Callable[[ConvertedRow], DroppedRow | None] | None = None,
) -> Report:
    """Write the rows of one split that were not dropped.

    Args:
        split: the split that is converted.
        outcomes: outcomes of its rows, in order.
        facts: facts that each file states.
        folder: folder for the files, which are numbered.
        rows_per_shard: rows per file; None for one file.
        fits: returns the reason for dropping a row whose prompt is too long, else None.

    Returns:
        The report of the split.

    Raises:
        SourceError: the source breaks off.
    """
    report = Report(split.name)
    with ExitStack() as stack:
        writer = stack.enter_context(RowGroups(folder / "00000.parquet", facts))
        for row_id, outcome in tqdm(outcomes, total=split.total, desc=f"{split.name}: converting", unit="row"):
            report.read += 1
            if isinstance(outcome, ConvertedRow) and fits is not None:
                outcome = fits(outcome) or outcome
            if isinstance(outcome, DroppedRow):
                _drop(report, row_id, outcome)
                continue
            if rows_per_shard and report.written and report.written % rows_per_shard == 0:
                stack.close()
                number = report.written // rows_per_shard
                writer = stack.enter_context(RowGroups(folder / f"{number:05d}.parquet", facts))
            writer.add(outcome.values)
            report.add(row_id, outcome)
    return report


def _drop(report: Report, row_id: str, dropped: DroppedRow) -> None:
    report.dropped_by.add(row_id, dropped.reason)
    if report.dropped <= NAMED_DROPS:
        tqdm.write(f"dropped {row_id}: {dropped}", file=sys.stderr)
    elif report.dropped == NAMED_DROPS + 1:
        tqdm.write("further dropped rows of this split are only counted", file=sys.stderr)
