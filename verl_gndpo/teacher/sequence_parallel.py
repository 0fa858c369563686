# SPDX-License-Identifier: Apache-2.0
"""Ulysses sequence parallelism over a packed row: ranks that share the tokens of a row, and the heads of its attention.

Each rank runs a part of the tokens through the decoder. In attention, each rank has all tokens and a part of the heads.
verl's own way is to replace the forwards of classes, whose attentions do not support a `Layout`. Here the inputs of one
decoder are cut to the rank's part (`take_part`), and its attention exchanges tokens for heads and back.
"""

from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from verl_gndpo.families import ModelFamily
from verl_gndpo.teacher.packing import Layout

# Inputs of every decoder that have an entry for each token, and the dimension of the tokens.
TOKEN_INPUTS = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1}


def check_sequence_parallel(config: Any, ranks: int) -> None:
    """Check that this number of ranks can share a row.

    Args:
        config: of a Hugging Face model.
        ranks: `ulysses_sequence_parallel_size`.

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
            f"ulysses_sequence_parallel_size={ranks} does not fit a model with {heads} attention heads and {shared} of "
            f"keys and values, which are dealt out to the ranks; possible are {', '.join(map(str, possible))}"
        )


def tokens_to_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: ProcessGroup
) -> tuple[torch.Tensor, ...]:
    """Exchange a part of the tokens with all heads for all tokens with a part of the heads.

    Args:
        query: (1, heads, tokens of this rank's part, head size).
        key, value: (1, key-value heads, tokens of this rank's part, head size).

    Returns:
        The three, (1, heads of this rank, tokens of the padded row, head size).
    """
    from verl.utils.ulysses import gather_seq_scatter_heads

    # Each rank needs at least one head of keys and values.
    key, value = (tensor.repeat_interleave(max(group.size() // key.shape[1], 1), 1) for tensor in (key, value))
    return tuple(gather_seq_scatter_heads(tensor, seq_dim=2, head_dim=1, group=group) for tensor in (query, key, value))


def heads_to_tokens(out: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Undo `tokens_to_heads`: (1, heads of this rank, tokens, ...) to (1, heads, tokens of this rank's part, ...)."""
    from verl.utils.ulysses import gather_heads_scatter_seq

    return gather_heads_scatter_seq(out, head_dim=1, seq_dim=2, group=group)


def take_part(
    layout: Layout, family: ModelFamily, decoder: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Cut the inputs of a decoder to this rank's part of the row.

    Args:
        layout: of a row that ranks share.
        family: of the model; names what its decoder is given besides `TOKEN_INPUTS`.
        decoder, args, kwargs: as a forward pre-hook gets them.

    Returns:
        The arguments to call the decoder with.

    Raises:
        NotImplementedError: the decoder is given another input with an entry for each token.
    """
    dimensions = TOKEN_INPUTS | dict(family.token_inputs)
    part, tokens = layout.part, layout.tokens
    taken = dict(kwargs)
    unknown = [f"input {number} without a name" for number in range(len(args))]
    for name, value in kwargs.items():
        if name in family.masked_inputs and value is not None:
            # Of the masked tokens, those whose places are in this part.
            mask = kwargs[family.masked_inputs[name]][0]
            start, count = int(mask[: part.start].sum()), int(mask[part].sum())
            taken[name] = [features[start : start + count] for features in value]
        elif isinstance(value, torch.Tensor) and name in dimensions:
            taken[name] = _part_of(value, dimensions[name], part)
        elif isinstance(value, torch.Tensor) and tokens in value.shape:
            unknown.append(name)
    if unknown:
        raise NotImplementedError(
            f"{type(decoder).__name__} is given {', '.join(unknown)}, which sequence parallelism can't cut into parts; "
            "set ulysses_sequence_parallel_size=1"
        )
    return args, taken


def _part_of(tensor: torch.Tensor, dimension: int, part: slice) -> torch.Tensor:
    taken = tensor.movedim(dimension, -1)[..., part]
    return pad(taken, (0, part.stop - part.start - taken.shape[-1])).movedim(-1, dimension)
