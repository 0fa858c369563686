# SPDX-License-Identifier: Apache-2.0
"""Micro-batches of rows that share prompts: which rows run together, the same number on every rank."""

from collections.abc import Iterable, Sequence
from typing import Any

from verl_gndpo.teacher.packing import PromptGroup, concatenable, pack

MicroBatch = list[PromptGroup]


def plan_micro_batches(
    groups: Sequence[PromptGroup],
    images: Sequence[dict[str, Any]],
    *,
    max_tokens: int | None = None,
    max_rows: int | None = None,
) -> list[MicroBatch]:
    """Return micro-batches within a limit of tokens, in which a prompt counts once, or of rows.

    A group that is larger than the limit is split, and each part runs the prompt again. A single row may exceed
    `max_tokens`.

    Args:
        groups: with all rows of a rank's mini-batch.
        images: the model's further inputs per row, by name.
        max_tokens, max_rows: one of them.
    """
    together = concatenable(groups, images)
    if max_tokens is not None:
        return [batch for part in together for batch in pack(part, max_tokens)]
    assert max_rows is not None, "micro-batches need a limit"
    whole = {row: group for group in groups for row in group.rows}
    length = {row: n for group in groups for row, n in zip(group.rows, group.responses, strict=True)}
    batches: list[MicroBatch] = []
    for part in together:
        # A row counts as one token, and a prompt as none.
        by_rows = [PromptGroup(group.rows, 0, (1,) * len(group.rows)) for group in part]
        batches += [
            [
                PromptGroup(group.rows, whole[group.rows[0]].prompt, tuple(length[row] for row in group.rows))
                for group in batch
            ]
            for batch in pack(by_rows, max_rows)
        ]
    return batches


def split_into(batches: Sequence[MicroBatch], count: int) -> list[MicroBatch]:
    """Split the largest micro-batches until there are `count`, so that all ranks run equally many.

    Args:
        batches: micro-batches with at least `count` rows in all.
        count: at least their number.
    """
    result = list(batches)
    while len(result) < count:
        # Rather between prompts than within one, which runs the prompt once more.
        place = max(range(len(result)), key=lambda i: (_rows(result[i]) > 1, len(result[i]) > 1, _tokens(result[i])))
        result[place : place + 1] = _halve(result[place])
    return result


def numbered(batch: Iterable[PromptGroup]) -> tuple[list[int], MicroBatch]:
    """Return the rows of a micro-batch in its order, and its groups with the rows numbered in that order."""
    rows: list[int] = []
    groups = []
    for group in batch:
        groups.append(PromptGroup(tuple(range(len(rows), len(rows) + len(group.rows))), group.prompt, group.responses))
        rows += group.rows
    return rows, groups


def _rows(batch: MicroBatch) -> int:
    return sum(len(group.rows) for group in batch)


def _tokens(batch: MicroBatch) -> int:
    return sum(group.tokens for group in batch)


def _halve(batch: MicroBatch) -> list[MicroBatch]:
    """Split a micro-batch of several rows into two of about the same number of tokens."""
    if len(batch) == 1:
        (group,) = batch
        parts: tuple[list[int], list[int]] = ([], [])
        for member in sorted(range(len(group.rows)), key=lambda member: -group.responses[member]):
            min(parts, key=lambda part: (sum(group.responses[m] for m in part), len(part))).append(member)
        if not parts[1]:
            parts[1].append(parts[0].pop())
        return [
            [PromptGroup(tuple(group.rows[m] for m in part), group.prompt, tuple(group.responses[m] for m in part))]
            for part in map(sorted, parts)
        ]
    halves: tuple[MicroBatch, MicroBatch] = ([], [])
    for group in sorted(batch, key=lambda group: -group.tokens):
        min(halves, key=_tokens).append(group)
    return list(halves)
