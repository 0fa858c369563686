# SPDX-License-Identifier: Apache-2.0
"""The tokens of a step on which teacher and student disagree most, with what stands around them, as lines of JSON."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    # It imports torch, without which the checks before a run can do.
    from verl_gndpo.observe.metrics import Tokens

FILE_NAME = "gndpo_worst_tokens.jsonl"
# Of the whole file; a step adds a few kilobytes.
MAX_BYTES = 10_000_000

# How many tokens of context are shown, and what the token itself is put between.
BEFORE, AFTER = 12, 6
OPENING, CLOSING = "⟦", "⟧"


def find_worst(tokens: "Tokens", count: int) -> list[tuple[int, int, int]]:
    """The `count` tokens with the largest |D|, largest first: D and not A, which a bound makes equal for many.

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
    """The token between brackets, with the `BEFORE` tokens before it, the prompt's included, and the `AFTER` after it.

    Args:
        prompt, response: ids of a row.
        position: in the response.
        decode: ids to text, special tokens included.
    """
    before = [*prompt[-BEFORE:], *response[max(position - BEFORE, 0) : position]][-BEFORE:]
    token, after = response[position : position + 1], response[position + 1 : position + 1 + AFTER]
    # Piece by piece, so that the mark is where the token is even if a character is cut in two.
    before, token, after = (decode(list(ids)) if len(ids) else "" for ids in (before, token, after))
    return f"{before}{OPENING}{token}{CLOSING}{after}"


class WorstTokenLog:
    """Decides which steps are written down, and appends them to a file of bounded size."""

    def __init__(self, path: Path, every: int):
        """
        Args:
            path: the file; its folder is made when it is first needed.
            every: steps from one that is written down to the next; 0: none is.
        """
        self.path = path
        self._every = every
        self._last = self._last_warned = None

    def is_due(self, step: int, warned: bool) -> bool:
        """Whether to write a step down: every `every`-th one, and one with a warning unless one within the last `every`
        steps was.

        Args:
            step: counted from 1.
            warned: whether the step has raised a warning.
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
        """Append one line an entry. The file is opened for that alone, so that a crash loses nothing.

        Returns:
            None, or why this was the last write: the file has reached its size, or can't be written.
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
            # A run of days must not end because of a file that nobody may look at.
            reason = f"can't be written: {error}"
        self._every = 0
        return f"{self.path} {reason}; no more of the worst tokens will be written"


def locate(path: str | None, default_folder: str) -> Path:
    """Where the worst tokens of a run are written.

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
    """What would keep a file from being appended to, or made; None if nothing is known to. Leaves no trace."""
    if path.is_dir():
        return f"{path} is a folder"
    nearest = path if path.exists() else next(folder for folder in path.absolute().parents if folder.exists())
    if not path.exists() and not nearest.is_dir():
        return f"{nearest} is no folder"
    return None if os.access(nearest, os.W_OK) else f"{nearest} is not writable"
