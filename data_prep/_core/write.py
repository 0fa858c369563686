# SPDX-License-Identifier: Apache-2.0
"""Writing one split, and the report of what became of it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from .errors import ConversionError, DroppedRow
from .row import SCHEMA, verl_row
from .source import Recipe, Split

ROW_GROUP_ROWS = 64
ROW_GROUP_BYTES = 32 * 1024 * 1024
NAMED_DROPS = 50
TABLE_IDS = 5


@dataclass
class Report:
    """What became of one split."""

    split: str
    read: int = 0
    written: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    first_ids: dict[str, list[str]] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        return sum(self.reasons.values())

    def drop(self, row_id: str, reason: str) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        ids = self.first_ids.setdefault(reason, [])
        if len(ids) < TABLE_IDS:
            ids.append(row_id)


def write_split(split: Split, recipe: Recipe, instruction: str, path: Path) -> Report:
    """Converts one split into the parquet file `path`, in row groups of at most `ROW_GROUP_ROWS` rows.

    Raises:
        SourceError: the source breaks off.
    """
    report = Report(split.name)
    with pq.ParquetWriter(path, SCHEMA) as writer:
        group: list[dict] = []
        size = 0

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))
            report.written += len(group)
            group.clear()

        for row in tqdm(split.rows(), total=split.total, desc=f"{split.name}: converting", unit="row"):
            report.read += 1
            try:
                converted = verl_row(row, split.name, recipe, instruction)
            except DroppedRow as dropped:
                report.drop(row.id, dropped.reason)
                if report.dropped <= NAMED_DROPS:
                    tqdm.write(f"dropped {row.id}: {dropped}", file=sys.stderr)
                elif report.dropped == NAMED_DROPS + 1:
                    tqdm.write("further dropped rows of this split are only counted", file=sys.stderr)
                continue
            group.append(converted)
            size += sum(len(image["bytes"]) for image in converted["images"])
            if len(group) >= ROW_GROUP_ROWS or size >= ROW_GROUP_BYTES:
                flush()
                size = 0
        if group:
            flush()
    return report


def check_dropped(report: Report, max_dropped: float) -> None:
    """Raises ConversionError when more than the fraction `max_dropped` of a split was dropped, or all of it."""
    if not report.written:
        raise ConversionError(f"split {report.split}: all {report.read} rows dropped; nothing written.")
    if report.dropped > max_dropped * report.read:
        raise ConversionError(
            f"split {report.split}: {report.dropped} of {report.read} rows dropped, above --max_dropped "
            f"{max_dropped:g}; nothing written. Mend the source, or raise --max_dropped if these rows can be spared."
        )


def report_table(reports: list[Report]) -> str:
    """Counts by split, then what was dropped by reason with the first ids."""
    width = max(len("split"), *(len(report.split) for report in reports))
    lines = [f"{'split':<{width}}  {'read':>7}  {'written':>7}  {'dropped':>7}"]
    for report in reports:
        lines.append(f"{report.split:<{width}}  {report.read:>7}  {report.written:>7}  {report.dropped:>7}")
        for reason, count in sorted(report.reasons.items()):
            ids = ", ".join(report.first_ids[reason]) + (", ..." if count > TABLE_IDS else "")
            lines.append(f"{'':<{width}}    {count} x {reason}: {ids}")
    return "\n".join(lines)
