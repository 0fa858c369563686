# SPDX-License-Identifier: Apache-2.0
"""Report on a split: rows read, written, repaired and dropped by kind, and the lengths of its prompts."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np

from .errors import ConversionError
from .row import ConvertedRow

TABLE_IDS = 5
NOTED_IDS = 200
"""Rows that were kept with a fault are all named, up to this many: 1 % of the larger sets."""
UNLICENSED = "not licensed for reuse"
OVERLONG = "prompt is over-long"
# The user or the licence excludes these rows, so they do not indicate a broken source.
ON_PURPOSE = (UNLICENSED, OVERLONG)
LENGTH_MARKS = (1024, 2048, 4096, 8192)


@dataclass
class Counts:
    """Count events by kind, with the ids of the first rows for each, at most `shown`."""

    shown: int = TABLE_IDS
    rows: dict[str, int] = field(default_factory=dict)
    first_ids: dict[str, list[str]] = field(default_factory=dict)

    def add(self, row_id: str, kind: str) -> None:
        """Count one event for a row."""
        self.rows[kind] = self.rows.get(kind, 0) + 1
        ids = self.first_ids.setdefault(kind, [])
        if len(ids) < self.shown:
            ids.append(row_id)

    def lines(self, verb: str) -> list[str]:
        """Return one line per kind: how often it happened, and to which rows first."""
        return [
            f"  {verb} {count} x {kind}: {', '.join(self.first_ids[kind])}{', ...' if count > self.shown else ''}"
            for kind, count in sorted(self.rows.items())
        ]


@dataclass
class Report:
    """The report of one split. Lengths are in tokens, one entry per row that was read back."""

    split: str
    read: int = 0
    written: int = 0
    dropped_by: Counts = field(default_factory=Counts)
    repaired_by: Counts = field(default_factory=Counts)
    noted_by: Counts = field(default_factory=lambda: Counts(NOTED_IDS))
    repaired: int = 0
    prompt_tokens: array[int] = field(default_factory=lambda: array("I"))
    image_tokens: array[int] = field(default_factory=lambda: array("I"))
    digests: array[int] = field(default_factory=lambda: array("B"))
    """Pixel digests of all written images, 16 bytes each, for the comparison after reading back."""

    def add(self, row_id: str, row: ConvertedRow) -> None:
        """Count a row that is written."""
        self.written += 1
        self.repaired += bool(row.repairs)
        for repair in row.repairs:
            self.repaired_by.add(row_id, repair)
        for note in row.notes:
            self.noted_by.add(row_id, note)
        for picture in row.pictures:
            self.digests.frombytes(picture.digest)

    @property
    def dropped(self) -> int:
        """Return the number of dropped rows."""
        return sum(self.dropped_by.rows.values())

    @property
    def reasons(self) -> dict[str, int]:
        """Return the number of dropped rows for each reason."""
        return self.dropped_by.rows

    def check_dropped(self, max_dropped: float) -> None:
        """Check that few enough rows were dropped.

        Rows that were excluded on purpose, for their licence or their length, do not count against the limit.

        Raises:
            ConversionError: all rows were dropped, or more than the fraction `max_dropped` of them.
        """
        if not self.written:
            raise ConversionError(f"split {self.split}: all {self.read} rows dropped; nothing written.")
        broken = sum(count for kind, count in self.reasons.items() if kind not in ON_PURPOSE)
        if broken > max_dropped * self.read:
            raise ConversionError(
                f"split {self.split}: {broken} of {self.read} rows dropped, above --max_dropped {max_dropped:g}; "
                "nothing written. Repair the source, or raise --max_dropped if you do not need these rows."
            )


def report_table(reports: list[Report], about: str) -> str:
    """Return a table with one line per split, followed by its repairs and drops by kind with the first ids.

    Args:
        reports: one report per split.
        about: source and licence, for the first line.
    """
    width = max(len("split"), *(len(report.split) for report in reports))
    lines = [about, f"{'split':<{width}}  {'read':>7}  {'written':>7}  {'repaired':>8}  {'dropped':>7}"]
    for report in reports:
        counts = f"{report.read:>7}  {report.written:>7}  {report.repaired:>8}  {report.dropped:>7}"
        lines.append(f"{report.split:<{width}}  {counts}")
        lines += report.repaired_by.lines("repaired") + report.noted_by.lines("kept")
        lines += report.dropped_by.lines("dropped")
    return "\n".join(lines)


def length_lines(report: Report, measured_by: str) -> str:
    """Return lines on the lengths of a split's prompts, and on how many exceed common limits.

    Args:
        report: report of a split that was read back.
        measured_by: description of the tokenizer and processor.
    """

    def spread(values: array[int]) -> str:
        median, high = np.percentile(np.asarray(values), (50, 95))
        return f"median {median:.0f}, 95 % {high:.0f}, max {max(values)}"

    over = [(mark, sum(length > mark for length in report.prompt_tokens)) for mark in LENGTH_MARKS]
    above = ", ".join(f"{count} above {mark}" for mark, count in over if count) or f"none above {LENGTH_MARKS[0]}"
    return "\n".join(
        [
            f"  tokens of a prompt: {spread(report.prompt_tokens)}; {above}",
            f"  of them for images: {spread(report.image_tokens)}",
            f"  counted with: {measured_by}",
        ]
    )
