# SPDX-License-Identifier: Apache-2.0
"""Record the tokens of a step on which teacher and student disagree most, with their context, as lines of JSON."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    # It imports torch, which the checks before a run do not need.
    from verl_gndpo.observe.metrics import Tokens

FILE_NAME = "gndpo_worst_tokens.jsonl"
# Limit of the whole file. A step adds a few kilobytes.
MAX_BYTES = 10_000_000

# Tokens of context to both sides, and the marks around the token itself.
BEFORE, AFTER = 12, 6
OPENING, CLOSING = "⟦", "⟧"


def find_worst(tokens: "Tokens", count: int) -> list[tuple[int, int, int]]:
    """Return the `count` tokens with the largest |D|, largest first. (A bound gives many tokens the same |A|.)

    Returns:
        For each, its index among the valid tokens, its row, and its position in the response.
    """
    distance = np.abs(tokens.d)
    worst = np.argpartition(distance, -min(count, distance.size))[-min(count, distance.size) :]
    worst = worst[np.argsort(-distance[worst], kind="stable")]
    rows = np.searchsorted(tokens.starts + tokens.counts, worst, side="right")
    return [
        (int(i), int(row), int(np.flatnonzero(tokens.valid[row])[i - tokens.starts[row]]))
        for i, row in zip(worst, rows, strict=True)
    ]


def show_in_context(
    prompt: Sequence[int], response: Sequence[int], position: int, decode: Callable[[list[int]], str]
) -> str:
    """Return a token between brackets, with `BEFORE` tokens before it (also of the prompt) and `AFTER` tokens after it.

    Args:
        prompt, response: ids of a row.
        position: of the token, in the response.
        decode: maps ids to text, including special tokens.
    """
    # Decode the pieces separately, so that the mark is at the token even if it is a part of a character.
    pieces = (
        [*prompt[-BEFORE:], *response[max(position - BEFORE, 0) : position]][-BEFORE:],
        [response[position]],
        response[position + 1 : position + 1 + AFTER],
    )
    before, token, after = (decode(list(ids)) if len(ids) else "" for ids in pieces)
    return f"{before}{OPENING}{token}{CLOSING}{after}"


class WorstTokenLog:
    """Decides which steps are recorded, and appends them to a file of bounded size."""

    def __init__(self, path: Path, every: int):
        """
        Args:
            path: the file. Its folder is created when it is first needed.
            every: record one of so many steps; 0: none.
        """
        self.path = path
        self._every = every
        self._last: int | None = None
        self._last_warned: int | None = None

    def is_due(self, step: int, warned: bool) -> bool:
        """Return True if a step is to be recorded: every `every`-th one, and one with a warning unless one within the
        last `every` steps was recorded for its warning.

        Args:
            step: verl's global step, from 1.
            warned: True if the step has raised a warning.
        """
        if not self._every or step == self._last:
            return False
        extra = warned and (self._last_warned is None or step - self._last_warned >= self._every)
        if extra:
            self._last_warned = step
        if extra or step % self._every == 0:
            self._last = step
            return True
        return False

    def write(self, entries: list[dict]) -> str | None:
        """Append one line per entry. The file is closed again each time, so that a crash loses nothing.

        Returns:
            None, or the reason why this was the last write: the file is full, or can't be written.
        """
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                if file.tell() + len(lines) <= MAX_BYTES:
                    file.write(lines)
                    return None
            reason = f"has reached {MAX_BYTES / 1e6:.0f} MB; move it away and restart for more"
        except OSError as error:
            # A long run must not end because of a file that may never be read.
            reason = f"can't be written: {error}"
        self._every = 0
        return f"{self.path} {reason}; no more of the worst tokens will be written"


def locate(path: str | None, default_folder: str) -> Path:
    """Return the file in which the worst tokens of a run are recorded.

    Args:
        path: `algorithm.gndpo.worst_tokens.path`; null: beside the file of verl's file logger, else in
            `default_folder`.
        default_folder: `trainer.default_local_dir`.
    """
    if path is not None:
        return Path(path).expanduser()
    log = os.environ.get("VERL_FILE_LOGGER_PATH")
    return (Path(log).parent if log else Path(default_folder).expanduser()) / FILE_NAME


def why_not_writable(path: Path) -> str | None:
    """Return why a file can't be appended to or created; None if nothing speaks against it. Changes nothing."""
    if path.is_dir():
        return f"{path} is a folder"
    nearest = path if path.exists() else next(folder for folder in path.absolute().parents if folder.exists())
    if not path.exists() and not nearest.is_dir():
        return f"{nearest} is not a folder"
    return None if os.access(nearest, os.W_OK) else f"{nearest} is not writable"
