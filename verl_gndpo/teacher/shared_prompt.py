# SPDX-License-Identifier: Apache-2.0
"""Each distinct prompt of a micro-batch goes through the language model once, and its responses continue from it.

The tokens of a micro-batch stand in one row without padding: a prompt, its responses one after the other, the next
prompt, and so on, each token with the position that it has in its own sequence. All of a decoder but its attention
works token by token, so that only attention has to know this layout: here a prompt attends to itself, and a response to
its prompt and itself. It is registered with transformers under `ATTENTION` like any other attention implementation.
"""

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

ATTENTION = "gndpo_shared_prompt"


@dataclass(frozen=True)
class Family:
    """Rows of a batch that have one prompt; all lengths in tokens."""

    rows: tuple[int, ...]
    prompt: int
    responses: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """What the language model runs."""
        return self.prompt + sum(self.responses)


def find_families(
    input_ids: list[torch.Tensor],
    position_ids: list[torch.Tensor],
    response_lengths: list[int],
    images: list[dict],
) -> list[Family]:
    """Rows with equal prompts: ids, positions and whatever tensors of images belong to them.

    Args:
        input_ids: of each row, (length,), prompt and response.
        position_ids: of each row, (length,) or (axes, length).
        response_lengths: of each row.
        images: of each row, the model's further inputs by name; empty without images.

    Returns:
        The families in the order of their first rows.
    """
    members: list[list[int]] = []
    by_prompt: dict[tuple, list[int]] = {}
    for row, (ids, positions, response) in enumerate(zip(input_ids, position_ids, response_lengths, strict=True)):
        prompt = len(ids) - response
        key = (ids[:prompt].cpu().numpy().tobytes(), positions[..., :prompt].cpu().numpy().tobytes())
        # Two prompts of the same words may still ask about different pictures.
        candidates = by_prompt.setdefault(key, [])
        family = next((family for family in candidates if _equal(images[members[family][0]], images[row])), None)
        if family is None:
            family = len(members)
            members.append([])
            candidates.append(family)
        members[family].append(row)
    return [
        Family(
            tuple(rows), len(input_ids[rows[0]]) - response_lengths[rows[0]], tuple(response_lengths[r] for r in rows)
        )
        for rows in members
    ]


def _equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


def pack(families: Iterable[Family], max_tokens: int) -> list[list[Family]]:
    """Micro-batches of at most `max_tokens` tokens: the largest family first, each where it still fits.

    A family that is larger is split, and its prompt run once a part; a single sequence may exceed `max_tokens`.
    """
    parts = [part for family in families for part in _split(family, max_tokens)]
    batches: list[list[Family]] = []
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


def _split(family: Family, max_tokens: int) -> list[Family]:
    parts: list[list[int]] = []
    room = 0
    for member, response in enumerate(family.responses):
        if not parts or response > room:
            parts.append([])
            room = max_tokens - family.prompt
        parts[-1].append(member)
        room -= response
    return [
        Family(tuple(family.rows[m] for m in part), family.prompt, tuple(family.responses[m] for m in part))
        for part in parts
    ]


def order_by_prompt(keys: list[str], tags: list[dict], ranks: int) -> list[int]:
    """An order of rows in which equal consecutive parts, one a rank, hold whole prompts and have like work to do.

    Args:
        keys: of the rows, "{prompt}_{session}_{turn}" as verl's agent loop writes them.
        tags: of the rows, with `prompt_len` and `response_len` in tokens.
        ranks: how many parts; it divides the number of rows.

    Returns:
        Row numbers. Where prompts can't be dealt out whole, the parts cut some of them.
    """
    members: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        members.setdefault(key.rsplit("_", 2)[0], []).append(row)
    families = list(members.values())
    if len(families) % ranks == 0 and len({len(rows) for rows in families}) == 1:
        tokens = [tags[rows[0]]["prompt_len"] + sum(tags[row]["response_len"] for row in rows) for rows in families]
        parts = get_seqlen_balanced_partitions(tokens, k_partitions=ranks, equal_size=True)
        families = [families[family] for part in parts for family in part]
    return [row for rows in families for row in rows]


class Layout:
    """Where in the row of a micro-batch each prompt and each response stands.

    Args:
        families: in their order in the row.
        device: of the row.
    """

    def __init__(self, families: list[Family], device: torch.device):
        self.calls = 0
        """How many layers have attended by this layout."""
        self.families: list[tuple[slice, torch.Tensor | None, torch.Tensor | None]] = []
        """Of each family the prompt's place, and of its responses the places (responses, longest), padded with any
        place at their ends, and which of those, counted through, are no padding; None for a single response, which the
        first covers."""
        predicting = []
        start = 0
        for family in families:
            end = start + family.prompt
            lengths = torch.tensor(family.responses, device=device)
            starts = end + lengths.cumsum(0) - lengths
            within = torch.arange(int(lengths.max()), device=device)
            valid = within < lengths.unsqueeze(1)
            places = torch.where(valid, starts.unsqueeze(1) + within, end)
            # The prompt's last token predicts the first of each response, and each token but the last the next one.
            before = torch.cat([torch.full_like(places[:, :1], end - 1), places[:, :-1]], 1)
            predicting.append(before[valid])
            stop = start + family.tokens
            self.families.append(
                (slice(start, stop), None, None)
                if len(lengths) == 1
                # Looked up once, not in every layer: an accelerator would have to be waited for.
                else (slice(start, end), places, valid.flatten().nonzero().squeeze(1))
            )
            start = stop
        self.predicting = torch.cat(predicting)
        """(response tokens,), the place whose output predicts each response token, response by response."""


_layout: Layout | None = None


@contextmanager
def attending(layout: Layout):
    """Within this context models whose attention implementation is `ATTENTION` attend by `layout`."""
    global _layout
    _layout = layout
    try:
        yield
    finally:
        _layout = None


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """Attention by the layout, for transformers' `AttentionInterface`.

    Args:
        query: (1, heads, tokens, head size).
        key, value: (1, key-value heads, tokens, head size).
        attention_mask: none; the layout says it all.
        scaling: of the scores; None for the inverse root of the head size.
        sliding_window: how many tokens back attention reaches; None for all.

    Returns:
        (1, tokens, heads, head size), and None for the weights.

    Raises:
        NotImplementedError: the model bounds its scores or has attention sinks.
        RuntimeError: a forward pass of the model outside of `attending`.
    """
    if softcap is not None or s_aux is not None:
        raise NotImplementedError(f"{type(module).__name__} bounds its scores or has attention sinks")
    if _layout is None:
        raise RuntimeError(f"{ATTENTION} works only within verl_gndpo.teacher.shared_prompt.attending")
    _layout.calls += 1
    repeats = query.shape[1] // key.shape[1]
    query, key, value = query[0], key[0].repeat_interleave(repeats, 0), value[0].repeat_interleave(repeats, 0)
    out = torch.empty_like(query)
    for prompt, places, valid in _layout.families:
        own = query[:, prompt], key[:, prompt], value[:, prompt]
        out[:, prompt] = _causal(*own, scaling, sliding_window)
        if places is None:
            continue
        # (heads, responses, longest, head size) to (responses, heads, ...): a batch that shares the prompt's keys.
        queries, keys, values = (tensor[:, places].transpose(0, 1) for tensor in (query, key, value))
        keys, values = (
            torch.cat([shared.unsqueeze(0).expand(len(places), -1, -1, -1), tensor], 2)
            for shared, tensor in zip(own[1:], (keys, values), strict=True)
        )
        attended = _causal(queries, keys, values, scaling, sliding_window)
        out[:, places.flatten()[valid]] = attended.transpose(0, 1).flatten(1, 2)[:, valid]
    return out.transpose(0, 1).unsqueeze(0), None


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, sliding_window: int | None
) -> torch.Tensor:
    """Causal attention where the last query and the last key are the same token; (..., heads, tokens, head size)."""
    batched = query.dim() == 4
    if not batched:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    length, reach = query.shape[2], key.shape[2]
    if sliding_window is not None and sliding_window < reach:
        ahead = (
            torch.arange(reach, device=query.device) - torch.arange(reach - length, reach, device=query.device)[:, None]
        )
        mask = (ahead <= 0) & (ahead > -sliding_window)
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    elif length == reach:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    else:
        mask = causal_lower_right(length, reach)
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out if batched else out.squeeze(0)


def share_prompts(module: torch.nn.Module) -> None:
    """Has the language model in `module` attend by layouts from now on.

    Raises:
        NotImplementedError: it has layers that mix tokens otherwise than by attention.
    """
    from transformers import AttentionInterface

    config = module.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise NotImplementedError(f"a teacher with layers of the kind {', '.join(sorted(kinds))} can't share prompts")
    AttentionInterface.register(ATTENTION, attention)
    config._attn_implementation = ATTENTION
