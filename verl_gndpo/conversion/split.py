# SPDX-License-Identifier: Apache-2.0
"""The rows of a source, before anything about them is checked."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from .errors import DroppedRow
from .images import ImageStore


@dataclass(frozen=True)
class SourceRow:
    """A row as its source states it.

    `index` and `key` depend only on the row's place in the source or on its own id. So they are the same in every run
    and on every machine, and a dropped row leaves a gap.

    Args:
        index: place of the row in its split.
        key: id of the row in its split; the index when the source has no ids.
        values: one value for each column of the recipe, or the reason why the row cannot be read.
        repeated: True when an earlier row has the same id; `key` then ends in a number.
    """

    index: int
    key: object
    values: dict[str, Any] | DroppedRow
    repeated: bool = False


@dataclass(frozen=True)
class Split:
    """One split of a source.

    Args:
        name: name of the split and of its file.
        total: number of rows.
        rows: starts a fresh pass over the rows; raises SourceError when the source breaks off.
        images: images that rows name by their paths.
        folder: folder of the split's files; None for a split of the hub.
    """

    name: str
    total: int
    rows: Callable[[], Iterable[SourceRow]]
    images: ImageStore
    folder: Path | None = None

    def sample(self, limit: int, seed: int | None) -> Split:
        """Return the split with at most `limit` rows, in the order of the source.

        Args:
            limit: number of rows to keep.
            seed: draws the rows at random; None keeps the first ones.
        """
        if limit >= self.total:
            return self
        if seed is None:
            return replace(self, total=limit, rows=lambda: islice(self.rows(), limit))
        chosen = set(random.Random(f"{seed} {self.name}").sample(range(self.total), limit))
        rows = self.rows
        return replace(self, total=limit, rows=lambda: (row for place, row in enumerate(rows()) if place in chosen))
