# SPDX-License-Identifier: Apache-2.0
"""Attention of a packed row: a prompt attends to itself, a response to its prompt and to itself.

Everything in a decoder but its attention works token by token, so that only attention has to support a `Layout`.
`SharedPromptAttention` makes a model attend by one, through transformers' registry of attention implementations, in
either of two ways with equal results:

- `attend_by_prompt`: torch's scaled_dot_product_attention, prompt by prompt;
- `FlexKernel`: FlexAttention, one kernel over the whole row.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from verl_gndpo.families import family_of
from verl_gndpo.teacher.packing import Layout
from verl_gndpo.teacher.sequence_parallel import heads_to_tokens, take_part, tokens_to_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Each model gets an attention implementation of its own, because it holds the layout that the model attends by.
_NAME = "gndpo_shared_prompt_{}"
_numbers = itertools.count()


def attend_by_prompt(
    layout: Layout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attend prompt by prompt, responses of similar length to a prompt as one batch.

    Args:
        query: (1, heads, tokens of the padded row, head size).
        key, value: (1, key-value heads, tokens of the padded row, head size). Values may have a head size of their own.
        scaling: of the scores; None for the inverse root of the head size.
        sliding_window: how many tokens back attention reaches; None for all.

    Returns:
        (1, heads, tokens of the padded row, head size of the values).
    """
    query, key, value = query[0], key[0], value[0]
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    # Padding attends to nothing.
    out[:, layout.tokens :] = 0
    for group in layout.places:
        own = query[:, group.prompt], key[:, group.prompt], value[:, group.prompt]
        out[:, group.prompt] = _causal(*own, scaling, sliding_window)
        for batch in group.responses:
            # (heads, responses, longest, head size) to (responses, heads, ...): a batch that shares the prompt's keys.
            queries, keys, values = (tensor[:, batch.places].transpose(0, 1) for tensor in (query, key, value))
            keys, values = (
                torch.cat([shared.unsqueeze(0).expand(len(batch.places), -1, -1, -1), tensor], 2)
                for shared, tensor in zip(own[1:], (keys, values), strict=True)
            )
            attended = _causal(queries, keys, values, scaling, sliding_window)
            out[:, batch.places.flatten()[batch.valid]] = attended.transpose(0, 1).flatten(1, 2)[:, batch.valid]
    return out.unsqueeze(0)


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, sliding_window: int | None
) -> torch.Tensor:
    """Attend causally, where the last query and the last key are the same token; (..., heads, tokens, head size)."""
    batched = query.dim() == 4
    if not batched:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    length, reach = query.shape[2], key.shape[2]
    attend = functools.partial(scaled_dot_product_attention, scale=scaling)
    if sliding_window is not None and sliding_window < reach:
        ahead = (
            torch.arange(reach, device=query.device) - torch.arange(reach - length, reach, device=query.device)[:, None]
        )
        # With a mask as a tensor, no kernel but the slowest takes fewer heads of keys than of queries. A view repeats
        # them without a copy: each head of keys becomes a sequence of its own, seen by all of its heads of queries.
        batch, heads, shared = query.shape[0], query.shape[1], key.shape[1]
        key, value = (
            x.reshape(batch * shared, 1, reach, x.shape[-1]).expand(-1, heads // shared, -1, -1) for x in (key, value)
        )
        query = query.reshape(batch * shared, heads // shared, length, query.shape[-1])
        out = attend(query, key, value, attn_mask=(ahead <= 0) & (ahead > -sliding_window))
        out = out.reshape(batch, heads, length, out.shape[-1])
    elif length == reach:
        out = attend(query, key, value, is_causal=True, enable_gqa=True)
    else:
        out = attend(query, key, value, attn_mask=causal_lower_right(length, reach), enable_gqa=True)
    return out if batched else out.squeeze(0)


class FlexKernel:
    """FlexAttention over one layout. It pads nothing and repeats no keys, but is compiled on an accelerator."""

    def __init__(self, layout: Layout):
        group, response, place = [], [], []
        for number, g in enumerate(layout.prompt_groups):
            group += [number] * g.tokens
            response += [-1] * g.prompt + [r for r, length in enumerate(g.responses) for _ in range(length)]
            place += [*range(g.prompt), *(g.prompt + t for length in g.responses for t in range(length))]
        self._group, self._response, self._place = (
            torch.tensor(x, device=layout.device) for x in (group, response, place)
        )
        self._masks: dict[int | None, BlockMask] = {}

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Attend by the layout; arguments and result are those of `attend_by_prompt`."""
        compiled = query.device.type != "cpu"
        if sliding_window not in self._masks:
            self._masks[sliding_window] = self._mask(query.shape[2], sliding_window, compiled)
        kernel = _compiled_flex_attention() if compiled else cast(Callable[..., torch.Tensor], flex_attention)
        return kernel(query, key, value, block_mask=self._masks[sliding_window], scale=scaling, enable_gqa=True)

    def _mask(self, tokens: int, sliding_window: int | None, compiled: bool) -> BlockMask:
        # Padding at the end of the row is a group of its own.
        group, response, place = (
            pad(x, (0, tokens - len(x)), value=-1) for x in (self._group, self._response, self._place)
        )

        def sees(_batch: torch.Tensor, _head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            seen = (k <= q) & (group[q] == group[k]) & ((response[k] < 0) | (response[q] == response[k]))
            return seen if sliding_window is None else seen & (place[q] - place[k] < sliding_window)

        return create_block_mask(sees, None, None, tokens, tokens, device=group.device, _compile=compiled)


@functools.cache
def _compiled_flex_attention() -> Callable[..., torch.Tensor]:
    # Every micro-batch has another number of tokens.
    return torch.compile(flex_attention, dynamic=True)


class SharedPromptAttention:
    """The attention of one Hugging Face model, which attends by the layout of the row that the model runs.

    From its construction on, the model runs only within `attending` or `plainly`. Where ranks share a row, its decoder
    also runs only the rank's part of the tokens.
    """

    def __init__(self, model: "PreTrainedModel", flex: bool = False):
        """Register an attention implementation with transformers and switch the model's language model to it.

        Args:
            model: a Hugging Face model with a decoder.
            flex: attend by `FlexKernel` instead of `attend_by_prompt`.

        Raises:
            NotImplementedError: the model has layers that mix tokens otherwise than by attention.
        """
        from transformers import AttentionInterface

        self._config = model.config.get_text_config()
        self._model_name = model.config.name_or_path or type(model).__name__
        kinds = set(getattr(self._config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise NotImplementedError(
                f"{self._model_name} has layers of the kind {', '.join(sorted(kinds))}, which can't share prompts"
            )
        self._family = family_of(model)
        self._flex = flex
        self._layout: Layout | None = None
        self._kernel: FlexKernel | None = None
        self._attended: set[int] = set()
        self._name = _NAME.format(next(_numbers))
        AttentionInterface.register(self._name, self.attention)
        self.replaced: str = self._config._attn_implementation
        """The attention implementation that the language model had."""
        self._config._attn_implementation = self._name
        model.get_decoder().register_forward_pre_hook(self._take_part, with_kwargs=True)

    @contextmanager
    def attending(self, layout: Layout) -> Iterator[None]:
        """Have the model attend by `layout` within this context.

        Raises:
            NotImplementedError: some layers have not used this attention, so that responses have seen each other.
        """
        self._layout, self._kernel = layout, FlexKernel(layout) if self._flex else None
        self._attended.clear()
        try:
            yield
        finally:
            self._layout = self._kernel = None
        layers = self._config.num_hidden_layers
        if len(self._attended) != layers:
            raise NotImplementedError(
                f"{self._model_name}: {len(self._attended)} of its {layers} layers use the attention that "
                "transformers was told to use, so responses to one prompt would see each other"
            )

    @contextmanager
    def plainly(self) -> Iterator[None]:
        """Have the model attend as it did before within this context: one sequence per row, on one rank."""
        self._config._attn_implementation = self.replaced
        try:
            yield
        finally:
            self._config._attn_implementation = self._name

    def attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend by the layout, as transformers' `AttentionInterface` asks for it.

        Args:
            module: the layer.
            query: (1, heads, tokens of this rank's part of the row, head size).
            key, value: (1, key-value heads, tokens of this rank's part of the row, head size).
            attention_mask: None, because the layout says it all.
            scaling, sliding_window: as in `attend_by_prompt`.

        Returns:
            (1, tokens, heads, head size), and None for the weights.

        Raises:
            NotImplementedError: the model bounds its scores or has attention sinks.
            RuntimeError: the model runs outside of `attending`.
        """
        if softcap is not None or s_aux is not None:
            raise NotImplementedError(f"{type(module).__name__} bounds its scores or has attention sinks")
        layout = self._layout
        if layout is None:
            raise RuntimeError("a model that shares prompts runs only within SharedPromptAttention.attending")
        self._attended.add(id(module))
        if layout.process_group is not None:
            query, key, value = tokens_to_heads(query, key, value, layout.process_group)
        if self._kernel is not None:
            out = self._kernel.attend(query, key, value, scaling, sliding_window)
        else:
            out = attend_by_prompt(layout, query, key, value, scaling, sliding_window)
        if layout.process_group is not None:
            out = heads_to_tokens(out, layout.process_group)
        return out.transpose(1, 2), None

    def _take_part(
        self, decoder: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Have the decoder run this rank's part of a row that ranks share; a forward pre-hook."""
        if self._layout is None or self._layout.process_group is None:
            return None
        return take_part(self._layout, self._family, decoder, args, kwargs)
