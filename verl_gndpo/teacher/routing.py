# SPDX-License-Identifier: Apache-2.0
"""Choose the teachers that score a sample, and the rank that runs it."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from verl_gndpo.config import EVERY_SAMPLE, TeacherConfig


class NoTeacherError(ValueError):
    """A sample has no teacher; the message names its key and the keys that have one."""


@dataclass(frozen=True)
class Route:
    """Teachers that score a sample together."""

    weights: tuple[tuple[str, float], ...]
    """Names of teachers, each with its share of the log-prob. The shares add up to 1."""

    @property
    def label(self) -> str:
        """Return the teachers' names joined by "+", which metrics and statistics use for samples of this route."""
        return "+".join(name for name, _ in self.weights)


class Routing:
    """Finds a sample's teachers by its value of `teacher.routing_key`."""

    def __init__(self, teacher: TeacherConfig):
        self._named = teacher.teachers
        self._column = teacher.routing_key
        self._setting = teacher.keys_setting
        self._routes: dict[str, Route] = {}

    @property
    def column(self) -> str | None:
        """Return the name of the column that decides; None if every teacher scores every sample."""
        every = all(EVERY_SAMPLE in model.keys for model in self._named.values())
        return None if every else self._column

    @property
    def keys(self) -> list[str]:
        """Return the sorted values that have a teacher, including "*" if every value has one."""
        return sorted({key for model in self._named.values() for key in model.keys})

    def route(self, key: object) -> Route:
        """Return the teachers of a sample.

        Args:
            key: its value in `column`. Any value will do if `column` is None.

        Raises:
            NoTeacherError: no teacher has this key.
        """
        key = str(key)
        if key not in self._routes:
            scoring = {n: m.weight for n, m in self._named.items() if key in m.keys or EVERY_SAMPLE in m.keys}
            if not scoring:
                raise NoTeacherError(f"no teacher for {self._column}={key}; {self._setting} has {', '.join(self.keys)}")
            total = sum(scoring.values())
            self._routes[key] = Route(tuple((name, weight / total) for name, weight in scoring.items()))
        return self._routes[key]


def place_rows(
    prompts: Sequence[Hashable],
    routes: Sequence[Hashable],
    tokens: Sequence[int],
    ranks: int,
    shared: Sequence[int] | None = None,
) -> list[int]:
    """Order rows so that each rank gets whole prompts and about the same number of tokens.

    The rows are dispatched in consecutive parts, one per rank. All ranks run one route at a time, because each route's
    teacher is sharded over all of them. The tokens of each route are therefore balanced separately.

    Args:
        prompts: an identifier of each row's prompt.
        routes: an identifier of each row's teachers, the same for all rows of a prompt.
        tokens: the number of tokens of each row.
        ranks: number of parts. If they can't have equal size, the first ones have one row more, as in verl's dispatch.
        shared: the number of these tokens that a row shares with the others of its prompt, which run once; None for
            none.

    Returns:
        Row numbers. Prompts are split between ranks only where whole prompts don't fill the parts.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    shared = [0] * len(prompts) if shared is None else shared

    def cost(rows: list[int]) -> int:
        return shared[rows[0]] + sum(tokens[row] - shared[row] for row in rows)

    free = [len(prompts) // ranks + (rank < len(prompts) % ranks) for rank in range(ranks)]
    parts: list[list[int]] = [[] for _ in range(ranks)]
    for route in dict.fromkeys(routes):
        load = [0] * ranks
        members = [rows for rows in groups.values() if routes[rows[0]] == route]
        for rows in sorted(members, key=lambda rows: -cost(rows)):
            for part in _cut(rows, free):
                # `_cut` ensures that there is such a rank.
                rank = min((r for r in range(ranks) if free[r] >= len(part)), key=lambda r: load[r])
                parts[rank] += part
                free[rank] -= len(part)
                load[rank] += cost(part)
    return [row for part in parts for row in part]


def _cut(rows: list[int], free: list[int]) -> Iterable[list[int]]:
    """Yield parts of a prompt's rows, as few as possible, each small enough for some rank."""
    while rows:
        room = max(free)
        yield rows[:room]
        rows = rows[room:]
