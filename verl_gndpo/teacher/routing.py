# SPDX-License-Identifier: Apache-2.0
"""Which teacher scores which sample, and on which rank."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from verl_gndpo.config import EVERY_SAMPLE, TeacherConfig


class NoTeacherError(ValueError):
    """A sample has no teacher; the message names its key and the keys that have one."""


@dataclass(frozen=True)
class Route:
    """The teachers of a sample."""

    weights: tuple[tuple[str, float], ...]
    """Teachers by name, each with its share of the log-prob; the shares add up to 1."""

    @property
    def label(self) -> str:
        """The teachers' names joined by "+": what metrics and statistics call the samples of this route."""
        return "+".join(name for name, _ in self.weights)


class Routing:
    """Finds a sample's teachers by its value of `teacher.routing_key`."""

    def __init__(self, teacher: TeacherConfig):
        self._named = teacher.teachers
        self._column = teacher.routing_key
        self._routes: dict[str, Route] = {}

    @property
    def column(self) -> str | None:
        """The column that decides; None where every teacher scores every sample."""
        every = all(EVERY_SAMPLE in model.keys for model in self._named.values())
        return None if every else self._column

    @property
    def keys(self) -> list[str]:
        """What the column may hold, sorted; "*" among them if it may hold anything."""
        return sorted({key for model in self._named.values() for key in model.keys})

    def route(self, key: object) -> Route:
        """The teachers of a sample.

        Args:
            key: its value in `column`; anything where there is no such column.

        Raises:
            NoTeacherError: no teacher has this key.
        """
        key = str(key)
        if key not in self._routes:
            scoring = {n: m.weight for n, m in self._named.items() if key in m.keys or EVERY_SAMPLE in m.keys}
            if not scoring:
                raise NoTeacherError(
                    f"no teacher for {self._column}={key}; teacher.models has keys for {', '.join(self.keys)}"
                )
            total = sum(scoring.values())
            self._routes[key] = Route(tuple((name, weight / total) for name, weight in scoring.items()))
        return self._routes[key]


def place_rows(prompts: Sequence[Hashable], routes: Sequence[Hashable], tokens: Sequence[int], ranks: int) -> list[int]:
    """An order of rows in which consecutive parts, one a rank, hold whole prompts and give each rank like work.

    All ranks work for one route at a time, since they hold its teacher's weights together; so the work of each route is
    balanced by itself.

    Args:
        prompts: of each row, what tells its prompt from others.
        routes: of each row, what tells its teachers from others; the same for all rows of a prompt.
        tokens: of each row.
        ranks: how many parts; as in verl's dispatch, the first ones are longer by one row where they can't be equal.

    Returns:
        Row numbers. Where prompts can't be dealt out whole, some of them are cut.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    free = [len(prompts) // ranks + (rank < len(prompts) % ranks) for rank in range(ranks)]
    parts: list[list[int]] = [[] for _ in range(ranks)]
    for route in dict.fromkeys(routes):
        load = [0] * ranks
        members = [rows for rows in groups.values() if routes[rows[0]] == route]
        for rows in sorted(members, key=lambda rows: -sum(tokens[row] for row in rows)):
            for part in _cut(rows, free):
                # `_cut` has seen to it that there is such a rank.
                rank = min((r for r in range(ranks) if free[r] >= len(part)), key=lambda r: load[r])
                parts[rank] += part
                free[rank] -= len(part)
                load[rank] += sum(tokens[row] for row in part)
    return [row for part in parts for row in part]


def _cut(rows: list[int], free: list[int]) -> Iterable[list[int]]:
    """Parts of a prompt's rows, each of which fits into some rank; a single part wherever that is possible."""
    while rows:
        room = max(free)
        yield rows[:room]
        rows = rows[room:]
