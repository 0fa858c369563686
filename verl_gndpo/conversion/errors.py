# SPDX-License-Identifier: Apache-2.0
"""Errors of a conversion by what they end: the whole conversion, the reading of the source, or one row."""

from __future__ import annotations


class ConversionError(Exception):
    """The conversion cannot continue; the message is the one line that the user sees."""


class SourceError(ConversionError):
    """The source cannot be read."""


DETAIL_CHARS = 300


class DroppedRow(Exception):
    """One row fails a check.

    Args:
        reason: one of a few fixed phrases; the report counts each.
        detail: what exactly is wrong with this row; it is cut to `DETAIL_CHARS`.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)  # as arguments, so that unpickling from a worker process works
        self.reason = reason
        # A path may turn out to be megabytes of text, or hold half a character.
        detail = detail if len(detail) <= DETAIL_CHARS else f"{detail[:DETAIL_CHARS]}..."
        self.detail = detail.encode(errors="backslashreplace").decode()

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


def one_line(error: BaseException) -> str:
    """Return the error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
