# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, and how far it reaches: the conversion, the source, or one row."""

from __future__ import annotations


class ConversionError(Exception):
    """The conversion cannot go on; the message is the one line that the user sees."""


class SourceError(ConversionError):
    """The source cannot be read."""


class DroppedRow(Exception):
    """One row fails a check.

    Args:
        reason: one of a few fixed phrases, counted in the report.
        detail: what exactly was wrong with this row.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)  # as its arguments, so that it survives the way back from a worker process
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
