# SPDX-License-Identifier: Apache-2.0
"""Each distinct prompt of a micro-batch goes through the language model once, and its responses continue from it.

The tokens of a micro-batch stand in one row without padding: a prompt, its responses one after the other, the next
prompt, and so on, each token with the position that it has in its own sequence. All of a decoder but its attention
works token by token, so that only attention has to know this layout: here a prompt attends to itself, and a response to
its prompt and itself. It is registered with transformers under `ATTENTION` like any other attention implementation.

Ranks can share a row (Ulysses sequence parallelism): each runs a part of the tokens through the decoder, and in
attention each has all tokens and a part of the heads. verl's own way of doing so replaces forwards of classes, with
attentions that know nothing of a layout; here the decoder's instance takes its part of the row, and `attention`
exchanges tokens for heads.
"""

import functools
from collections.abc import Collection, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention
from verl.utils.ulysses import gather_heads_scatter_seq, gather_seq_scatter_heads

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
    alone: Collection[int] = (),
) -> list[Family]:
    """Rows with equal prompts: ids, positions and whatever tensors of images belong to them.

    Args:
        input_ids: of each row, (length,), prompt and response.
        position_ids: of each row, (length,) or (axes, length).
        response_lengths: of each row.
        images: of each row, the model's further inputs by name; empty without images.
        alone: rows with images in their responses: a family's images come once, as those of a prompt do.

    Returns:
        The families in the order of their first rows.
    """
    members: list[list[int]] = []
    by_prompt: dict[tuple, list[int]] = {}
    for row, (ids, positions, response) in enumerate(zip(input_ids, position_ids, response_lengths, strict=True)):
        prompt = len(ids) - response
        key = (ids[:prompt].cpu().numpy().tobytes(), positions[..., :prompt].cpu().numpy().tobytes())
        if row in alone:
            key += (row,)
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


class Layout:
    """Where in the row of a micro-batch each prompt and each response stands.

    Args:
        families: in their order in the row.
        device: of the row.
        group: ranks that share the row, each with an equal part of it, padded at its end; None for one rank alone.
        flex: attend by FlexAttention, in one kernel over the whole row, and not prompt by prompt.
    """

    def __init__(
        self, families: list[Family], device: torch.device, group: ProcessGroup | None = None, flex: bool = False
    ):
        self.group = group
        self.flex = _Flex(families, device) if flex else None
        self.tokens = sum(family.tokens for family in families)
        """Of the row, without its padding."""
        ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
        length = -(-self.tokens // ranks)
        self.part = slice(rank * length, (rank + 1) * length)
        """The tokens of the padded row that this rank runs through the decoder."""
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

    def predicted_here(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which response tokens this rank's part predicts, (tokens,), and the places in the part that do."""
        here = (self.predicting >= self.part.start) & (self.predicting < self.part.stop)
        tokens = here.nonzero().squeeze(1)
        return tokens, self.predicting[tokens] - self.part.start


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
        query: (1, heads, tokens, head size); the tokens of this rank's part where ranks share the row.
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
        raise RuntimeError(f"{ATTENTION} works only within verl_gndpo.teacher.attention.attending")
    _layout.calls += 1
    group = _layout.group
    if group is not None:
        # As few heads as there may be of keys and values, each rank needs one.
        key, value = (tensor.repeat_interleave(max(group.size() // key.shape[1], 1), 1) for tensor in (key, value))
        query, key, value = (
            gather_seq_scatter_heads(tensor, seq_dim=2, head_dim=1, group=group) for tensor in (query, key, value)
        )
    if _layout.flex is not None:
        out = _layout.flex.attend(query, key, value, scaling, sliding_window)
    else:
        out = _by_family(_layout, query, key, value, scaling, sliding_window)
    if group is not None:
        out = gather_heads_scatter_seq(out, head_dim=1, seq_dim=2, group=group)
    return out.transpose(1, 2), None


def _by_family(
    layout: Layout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attention of one prompt after the other, its responses padded to the longest; (1, heads, tokens, head size)."""
    repeats = query.shape[1] // key.shape[1]
    query, key, value = query[0], key[0].repeat_interleave(repeats, 0), value[0].repeat_interleave(repeats, 0)
    out = torch.empty_like(query)
    # Padding attends to nothing.
    out[:, layout.tokens :] = 0
    for prompt, places, valid in layout.families:
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
    return out.unsqueeze(0)


class _Flex:
    """The same by FlexAttention: nothing is padded, no prompt's keys are repeated, but on an accelerator its kernel has
    to be compiled first."""

    def __init__(self, families: list[Family], device: torch.device):
        family, response, place = [], [], []
        for number, f in enumerate(families):
            family += [number] * f.tokens
            response += [-1] * f.prompt + [r for r, length in enumerate(f.responses) for _ in range(length)]
            place += [*range(f.prompt), *(f.prompt + t for length in f.responses for t in range(length))]
        self._family, self._response, self._place = (torch.tensor(x, device=device) for x in (family, response, place))
        self._masks: dict[int | None, BlockMask] = {}

    def attend(self, query, key, value, scaling: float | None, sliding_window: int | None) -> torch.Tensor:
        """(1, heads, tokens, head size)."""
        compiled = query.device.type != "cpu"
        if sliding_window not in self._masks:
            self._masks[sliding_window] = self._mask(query.shape[2], sliding_window, compiled)
        kernel = _compiled_flex_attention() if compiled else flex_attention
        return kernel(query, key, value, block_mask=self._masks[sliding_window], scale=scaling, enable_gqa=True)

    def _mask(self, tokens: int, sliding_window: int | None, compiled: bool) -> BlockMask:
        # Padding at the end of the row is a family of its own.
        family, response, place = (
            pad(x, (0, tokens - len(x)), value=-1) for x in (self._family, self._response, self._place)
        )

        def sees(_batch, _head, q, k):
            seen = (k <= q) & (family[q] == family[k]) & ((response[k] < 0) | (response[q] == response[k]))
            return seen if sliding_window is None else seen & (place[q] - place[k] < sliding_window)

        return create_block_mask(sees, None, None, tokens, tokens, device=family.device, _compile=compiled)


@functools.cache
def _compiled_flex_attention():
    # Every micro-batch has another number of tokens.
    return torch.compile(flex_attention, dynamic=True)


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


def share_prompts(module: torch.nn.Module) -> str:
    """Has the language model in `module` attend by layouts from now on, and take its part of a row that ranks share.

    Returns:
        The attention implementation that it had.

    Raises:
        NotImplementedError: it has layers that mix tokens otherwise than by attention.
    """
    from transformers import AttentionInterface

    config = module.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise NotImplementedError(f"a teacher with layers of the kind {', '.join(sorted(kinds))} can't share prompts")
    AttentionInterface.register(ATTENTION, attention)
    replaced, config._attn_implementation = config._attn_implementation, ATTENTION
    module.get_decoder().register_forward_pre_hook(_take_part, with_kwargs=True)
    return replaced


@contextmanager
def attending_plainly(module: torch.nn.Module, implementation: str):
    """Within this context the language model in `module` has an attention implementation of transformers again."""
    config = module.config.get_text_config()
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = ATTENTION


def check_sequence_parallel(config: Any, ranks: int) -> None:
    """Whether so many ranks can share a row.

    Args:
        config: of a Hugging Face model.
        ranks: `teacher.ulysses_sequence_parallel_size`.

    Raises:
        ValueError: the attention heads can't be dealt out evenly; names the numbers.
    """
    if ranks == 1:
        return
    text = config.get_text_config()
    heads = text.num_attention_heads
    shared = getattr(text, "num_key_value_heads", None) or heads
    if heads % ranks or (shared % ranks and ranks % shared):
        possible = [n for n in range(1, heads + 1) if heads % n == 0 and (shared % n == 0 or n % shared == 0)]
        raise ValueError(
            f"ulysses_sequence_parallel_size={ranks} does not fit a teacher with {heads} attention heads and {shared} "
            f"of keys and values, which are dealt out to the ranks; possible are {', '.join(map(str, possible))}"
        )


# What a decoder is given of each token, and the dimension of the tokens.
_TOKEN_DIMENSIONS = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1, "visual_pos_masks": 1}


def _take_part(decoder: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of a decoder: its inputs for this rank's part of a row that ranks share.

    Raises:
        NotImplementedError: something else of each token goes into the decoder.
    """
    if _layout is None or _layout.group is None:
        return None
    part, tokens = _layout.part, _layout.tokens
    taken = dict(kwargs)
    unknown = [f"input {number} without a name" for number in range(len(args))]
    for name, value in kwargs.items():
        if name == "deepstack_visual_embeds" and value is not None:
            # Of each layer (visual tokens, hidden size): those whose places are in this part.
            mask = kwargs["visual_pos_masks"][0]
            start, count = int(mask[: part.start].sum()), int(mask[part].sum())
            taken[name] = [features[start : start + count] for features in value]
        elif isinstance(value, torch.Tensor) and name in _TOKEN_DIMENSIONS:
            taken[name] = _part_of(value, _TOKEN_DIMENSIONS[name], part)
        elif isinstance(value, torch.Tensor) and tokens in value.shape:
            unknown.append(name)
    if unknown:
        raise NotImplementedError(
            f"{type(decoder).__name__} is given {', '.join(unknown)}, which sequence parallelism of the teacher "
            "does not know; set teacher.ulysses_sequence_parallel_size=1"
        )
    return args, taken


def _part_of(tensor: torch.Tensor, dimension: int, part: slice) -> torch.Tensor:
    taken = tensor.movedim(dimension, -1)[..., part]
    return pad(taken, (0, part.stop - part.start - taken.shape[-1])).movedim(-1, dimension)
