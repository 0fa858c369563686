# SPDX-License-Identifier: Apache-2.0
"""Packing of sequences that share prompts: which rows have one prompt, and which forward passes score them.

`plan` returns the passes. There are three ways to share a prompt:

- attention: the tokens of a micro-batch stand in one row without padding (`PackedPass`): a prompt, its responses one
  after the other, the next prompt, and so on. Each token keeps the position that it has in its own sequence. `Layout`
  says where everything stands; `attention` attends by it.
- cache: a pass over the prompt fills the model's own cache (`PromptPass`), and the responses continue from copies of it
  (`ResponsePass`).
- none: each row runs whole, beside others of similar length (`RowsPass`).

Nothing here depends on who runs the model, or why.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

MOST_PADDING = 1.15
"""Pairs of query and key that a batch of attention computes, relative to those that it needs."""


@dataclass(frozen=True)
class PromptGroup:
    """A prompt and responses to it, which continue from one pass over the prompt. Lengths are in tokens."""

    rows: tuple[int, ...]
    """Numbers of the sequences in their batch."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Return the number of tokens that the language model runs for this group."""
        return self.prompt + sum(self.responses)


def group_by_prompt(
    input_ids: Sequence[torch.Tensor],
    position_ids: Sequence[torch.Tensor],
    response_lengths: Sequence[int],
    images: Sequence[dict[str, Any]],
    alone: Collection[int] = (),
) -> list[PromptGroup]:
    """Group the rows whose prompts have equal ids, positions and images.

    Args:
        input_ids: (length,) per row, prompt and response.
        position_ids: (length,) or (axes, length) per row.
        response_lengths: one per row.
        images: the model's further inputs per row, by name; empty without images.
        alone: rows that must not share their prompt: those with images in their responses, because a group brings its
            images once, as its prompt does.

    Returns:
        The groups in the order of their first rows.
    """
    members: list[list[int]] = []
    by_prompt: dict[tuple, list[int]] = {}
    for row, (ids, positions, response) in enumerate(zip(input_ids, position_ids, response_lengths, strict=True)):
        prompt = len(ids) - response
        key: tuple = (ids[:prompt].cpu().numpy().tobytes(), positions[..., :prompt].cpu().numpy().tobytes())
        if row in alone:
            key += (row,)
        # Two prompts of the same words may still ask about different pictures.
        candidates = by_prompt.setdefault(key, [])
        group = next((group for group in candidates if equal_inputs(images[members[group][0]], images[row])), None)
        if group is None:
            group = len(members)
            members.append([])
            candidates.append(group)
        members[group].append(row)
    return [
        PromptGroup(
            tuple(rows), len(input_ids[rows[0]]) - response_lengths[rows[0]], tuple(response_lengths[r] for r in rows)
        )
        for rows in members
    ]


def equal_inputs(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return True if two rows have the same further inputs of the model: the same object, or equal ones."""
    return one is other or (
        one.keys() == other.keys()
        and all(
            torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
            for name, value in one.items()
        )
    )


def concatenable(groups: Iterable[PromptGroup], images: Sequence[dict[str, Any]]) -> list[list[PromptGroup]]:
    """Separate groups whose images have other shapes, as processors make them that pad the images of a prompt.

    Args:
        images: the model's further inputs per row, by name. Tensors are concatenated along their first dimension.

    Returns:
        Groups that can run in one pass. Those without images are with the first of the others.
    """
    by_shape: dict[tuple, list[PromptGroup]] = {}
    without: list[PromptGroup] = []
    for group in groups:
        inputs = images[group.rows[0]]
        shapes = tuple((name, tuple(x.shape[1:])) for name, x in inputs.items() if isinstance(x, torch.Tensor))
        (by_shape.setdefault(shapes, []) if inputs else without).append(group)
    if not by_shape:
        return [without] if without else []
    first, *others = by_shape.values()
    return [without + first, *others]


def pack(groups: Iterable[PromptGroup], max_tokens: int) -> list[list[PromptGroup]]:
    """Pack groups into micro-batches of at most `max_tokens` tokens: the largest first, each where it still fits.

    A group that is larger than that is split, and each part runs the prompt again. A single sequence may exceed
    `max_tokens`.
    """
    parts = [part for group in groups for part in _split(group, max_tokens)]
    batches: list[list[PromptGroup]] = []
    free: list[int] = []
    for part in sorted(parts, key=lambda part: -part.tokens):
        place = next((i for i, room in enumerate(free) if room >= part.tokens), None)
        if place is None:
            place = len(batches)
            batches.append([])
            free.append(max_tokens)
        batches[place].append(part)
        free[place] -= part.tokens
    return batches


def _split(group: PromptGroup, max_tokens: int) -> list[PromptGroup]:
    """Split a group into few parts, because each part runs the prompt: the longest response first, where it fits."""
    parts: list[list[int]] = []
    free: list[int] = []
    for member in sorted(range(len(group.responses)), key=lambda member: -group.responses[member]):
        response = group.responses[member]
        place = next((i for i, room in enumerate(free) if room >= response), None)
        if place is None:
            place = len(parts)
            parts.append([])
            free.append(max_tokens - group.prompt)
        parts[place].append(member)
        free[place] -= response
    return [
        PromptGroup(tuple(group.rows[m] for m in part), group.prompt, tuple(group.responses[m] for m in part))
        for part in (sorted(part) for part in parts)
    ]


@dataclass(frozen=True)
class PackedPass:
    """One row without padding, in which responses attend to their prompts."""

    groups: tuple[PromptGroup, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """Return the rows that this pass scores."""
        return tuple(row for group in self.groups for row in group.rows)


@dataclass(frozen=True)
class PromptPass:
    """A prompt without its last token, which fills a cache and scores nothing."""

    group: PromptGroup
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class ResponsePass:
    """Responses that continue from the cache of the last `PromptPass`, beginning with the prompt's last token."""

    rows: tuple[int, ...]
    prompt: int
    responses: tuple[int, ...]


@dataclass(frozen=True)
class RowsPass:
    """Whole rows beside each other, padded at their ends."""

    rows: tuple[int, ...]


Pass = PackedPass | PromptPass | ResponsePass | RowsPass


def plan(groups: Sequence[PromptGroup], sharing: str, max_tokens: int, alone: Collection[int] = ()) -> list[Pass]:
    """Return the forward passes that score groups, in an order in which each finds the cache that it continues from.

    Args:
        groups: with all rows of a batch.
        sharing: attention, cache or none.
        max_tokens: the number of tokens of a pass, with its padding and the cached tokens. A single sequence may exceed
            it.
        alone: rows that can't continue from a cache: those with images in their responses.
    """
    if sharing == "attention":
        return [PackedPass(tuple(batch)) for batch in pack(groups, max_tokens)]
    passes: list[Pass] = []
    rows: dict[int, int] = {}
    for group in groups:
        # A single response gains nothing from a cache, and a prompt of one token leaves nothing to put into it.
        if sharing == "none" or len(group.rows) == 1 or group.prompt < 2 or not set(group.rows).isdisjoint(alone):
            rows |= {row: group.prompt + response for row, response in zip(group.rows, group.responses, strict=True)}
            continue
        passes.append(PromptPass(group))
        for members in _side_by_side(group.responses, max_tokens, group.prompt):
            continued = tuple(group.rows[m] for m in members), group.prompt, tuple(group.responses[m] for m in members)
            passes.append(ResponsePass(*continued))
    names = list(rows)
    passes += [
        RowsPass(tuple(names[member] for member in members))
        for members in _side_by_side([rows[name] for name in names], max_tokens, 0)
    ]
    return passes


def _side_by_side(lengths: Sequence[int], max_tokens: int, prompt: int) -> list[list[int]]:
    """Group sequences of similar length, so that each group has at most `max_tokens` tokens with `prompt` before each.

    Returns:
        Indices of the sequences, longest first.
    """
    batches = []
    for members in alike(lengths, prompt):
        size = max(max_tokens // (prompt + lengths[members[0]]), 1)
        batches += [members[start : start + size] for start in range(0, len(members), size)]
    return batches


def pad_right(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Put sequences beside each other, and repeat the last value of each to the length of the longest.

    Args:
        values: (length,) or (axes, length), at least one token long.

    Returns:
        (sequences, longest), or (axes, sequences, longest).
    """
    longest = max(value.shape[-1] for value in values)
    padded = [
        torch.cat([value, value[..., -1:].expand(*value.shape[:-1], longest - value.shape[-1])], -1) for value in values
    ]
    return torch.stack(padded, -2)


def concatenate(groups: Iterable[PromptGroup], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Lay values of whole sequences out as a micro-batch.

    Args:
        values: (..., length) per row of the batch; rows of a group have equal values in their prompts.

    Returns:
        (..., tokens of the micro-batch).
    """
    parts = []
    for group in groups:
        parts.append(values[group.rows[0]][..., : group.prompt])
        parts += [values[row][..., group.prompt :] for row in group.rows]
    return torch.cat(parts, -1)


@dataclass(frozen=True)
class ResponsePlaces:
    """The places of responses of similar length, which attend as one batch."""

    places: torch.Tensor
    """(responses, longest response), the places of each response's tokens, padded at the ends with another place."""

    valid: torch.Tensor
    """(response tokens,), indices into the flattened `places` that are not padding."""


@dataclass(frozen=True)
class GroupPlaces:
    """The places of a group's tokens in the row of a micro-batch."""

    prompt: slice
    """The prompt. For a group with a single response, prompt and response, because they are one causal sequence."""

    responses: tuple[ResponsePlaces, ...]
    """Batches of responses; none for a single response."""


def alike(lengths: Sequence[int], prompt: int = 0) -> list[list[int]]:
    """Group responses so that padding each to the longest of its group adds little.

    One long response among short ones would otherwise multiply the attention of all of them (docs/benchmarks.md).

    Args:
        lengths: of the responses.
        prompt: the number of tokens before each response that it attends to.

    Returns:
        Indices of the responses in each group, longest group first. A group, padded to its longest response, computes
        at most `MOST_PADDING` times the pairs of query and key that it needs. The same holds for its tokens, of which
        padding adds a smaller part.
    """
    groups: list[list[int]] = []
    needed = 0
    for response in sorted(range(len(lengths)), key=lambda response: -lengths[response]):
        own = causal_pairs(lengths[response], prompt)
        if groups:
            padded = (len(groups[-1]) + 1) * causal_pairs(lengths[groups[-1][0]], prompt)
        if not groups or padded > MOST_PADDING * (needed + own):
            groups.append([])
            needed = 0
        groups[-1].append(response)
        needed += own
    return groups


def causal_pairs(length: int, prompt: int) -> int:
    """Return the number of pairs of query and key of a response: each token attends to the prompt and to its past."""
    return length * prompt + length * (length + 1) // 2


class Layout:
    """The places of prompts and responses in the row of a micro-batch.

    Args:
        groups: in their order in the row.
        device: of the row.
        process_group: ranks that share the row, each with an equal part of it, padded at the row's end; None for one
            rank alone.
    """

    def __init__(
        self, groups: Sequence[PromptGroup], device: torch.device | int | str, process_group: ProcessGroup | None = None
    ):
        self.prompt_groups = tuple(groups)
        self.device = device
        self.process_group = process_group
        self.tokens = sum(group.tokens for group in groups)
        """The length of the row without its padding."""
        ranks, rank = (1, 0) if process_group is None else (process_group.size(), process_group.rank())
        length = -(-self.tokens // ranks)
        self.part = slice(rank * length, (rank + 1) * length)
        """The tokens of the padded row that this rank runs through the decoder."""
        predicting: list[torch.Tensor] = []
        slices: list[slice] = []
        batches: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        start = 0
        # On the host, because an accelerator would have to be waited for wherever a shape depends on a value.
        for group in groups:
            end, stop = start + group.prompt, start + group.tokens
            lengths = torch.tensor(group.responses)
            starts = end + lengths.cumsum(0) - lengths
            within = torch.arange(max(group.responses))
            valid = within < lengths.unsqueeze(1)
            places = torch.where(valid, starts.unsqueeze(1) + within, end)
            # The prompt's last token predicts the first of each response, and each token but the last the next one.
            before = torch.cat([torch.full_like(places[:, :1], end - 1), places[:, :-1]], 1)
            predicting.append(before[valid])
            single = len(group.responses) == 1
            slices.append(slice(start, stop if single else end))
            batches.append([])
            for members in [] if single else alike(group.responses, group.prompt):
                longest = max(group.responses[member] for member in members)
                inside = valid[members, :longest].flatten().nonzero().squeeze(1)
                batches[-1].append((places[members, :longest], inside))
            start = stop
        every = torch.cat(predicting)
        here = ((every >= self.part.start) & (every < self.part.stop)).nonzero().squeeze(1)
        indices = [
            every,
            here,
            every[here] - self.part.start,
            *(x for of_group in batches for b in of_group for x in b),
        ]
        moved = iter(_upload(indices, device))
        self.predicting = next(moved)
        """(response tokens,), the place whose output predicts each response token, response by response."""
        self._predicted_here = next(moved), next(moved)
        self.places = [
            GroupPlaces(prompt, tuple(ResponsePlaces(next(moved), next(moved)) for _ in of_group))
            for prompt, of_group in zip(slices, batches, strict=True)
        ]
        """One per group."""

    def predicted_here(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which response tokens this rank's part predicts, (tokens,), and the places in the part that do."""
        return self._predicted_here


def _upload(tensors: Sequence[torch.Tensor], device: torch.device | int | str) -> list[torch.Tensor]:
    """Move integer tensors to a device, all of them in one transfer."""
    whole = torch.cat([x.flatten() for x in tensors]).to(device)
    return [part.view(x.shape) for part, x in zip(whole.split([x.numel() for x in tensors]), tensors, strict=True)]
