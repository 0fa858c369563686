# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model that scores response tokens. It needs torch and transformers, and nothing of verl.

`packing` plans the forward passes, in which responses continue from one pass over their prompt, through `attention` or
through the model's own cache. `scoring` projects only the hidden states that predict a response token.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import ProcessGroup

from verl_gndpo.families import family_of
from verl_gndpo.teacher.attention import SharedPromptAttention
from verl_gndpo.teacher.distinct_images import encode_distinct_images
from verl_gndpo.teacher.packing import (
    Layout,
    PackedPass,
    Pass,
    PromptPass,
    ResponsePass,
    RowsPass,
    concatenate,
    pad_right,
)
from verl_gndpo.teacher.scoring import UNCHANGED, LogitsChange, ScoringHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

SHARING = ("attention", "cache", "none")
"""Ways to share a prompt among its responses, the fastest first; see `packing`."""


@dataclass(frozen=True)
class Rows:
    """Sequences to score. Each field has one entry per row."""

    ids: Sequence[torch.Tensor]
    """(length,): prompt and response."""

    positions: Sequence[torch.Tensor]
    """(length,) or (axes, length)."""

    lengths: Sequence[int]
    """Lengths of the responses, in tokens."""

    images: Sequence[dict[str, Any]]
    """The model's further inputs by name; empty without images."""

    sampled: Sequence[torch.Tensor]
    """(length,) bool, True where the policy sampled a placeholder of an image."""

    student: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]] | None = None
    """The student's most likely ids, (response length, k), and their log-probs with the mass of the others,
    (response length, k + 1). None: no KL divergence is wanted."""


def concatenate_inputs(images: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Concatenate the further inputs of several rows by name, in the order of the rows."""
    names = dict.fromkeys(name for inputs in images for name in inputs)
    return {name: torch.cat([inputs[name] for inputs in images if name in inputs]) for name in names}


class Scorer:
    """Scores response tokens with one Hugging Face model, which runs only within the calls of this object."""

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        chunk_tokens: int,
        temperature: float,
        sharing: str = "attention",
        change: LogitsChange = UNCHANGED,
        flex: bool = False,
        concatenate_inputs: Callable[[Sequence[dict[str, Any]]], dict[str, Any]] = concatenate_inputs,
    ):
        """Change the model so that it shares prompts and images, and computes log-probs.

        Args:
            model: a causal language model or an image-text model, before it is sharded.
            chunk_tokens: the number of response tokens whose logits exist at the same time; see `ScoringHead`.
            temperature: divides the logits.
            sharing: one of `SHARING`. `trial.choose_sharing` finds out which of them are exact for a model.
            change: what the model does with the logits after the output projection; see `trial.logits_change`.
            flex: with sharing=attention, attend by FlexAttention; see `SharedPromptAttention`.
            concatenate_inputs: joins the further inputs of several rows.

        Raises:
            NotImplementedError: with sharing=attention, the model has layers that mix tokens by other means.
        """
        self.sharing = sharing
        self.model = model
        self._config = model.config
        self._temperature = temperature
        self._concatenate_inputs = concatenate_inputs
        self._projection = model.get_output_embeddings()
        self.head = ScoringHead(self._projection, chunk_tokens, change)
        self.attention = SharedPromptAttention(model, flex=flex) if sharing == "attention" else None
        encode_distinct_images(model)
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        self._rotary_axes = "mrope_section" in rope
        # Gemma 3 and its relatives attend in both directions within an image, which they find by these inputs.
        self._kinds = [n for n in ("token_type_ids", "mm_token_type_ids") if n in _parameters(model.forward)]
        self._cache: Cache | None = None
        self._embedded_ids: torch.Tensor | None = None
        model.get_input_embeddings().register_forward_pre_hook(
            lambda _, ids: ids if self._embedded_ids is None else (self._embedded_ids,)
        )
        model.requires_grad_(False).eval()

    @property
    def model_attention(self) -> str:
        """Return transformers' name of the attention that the model has without this object."""
        if self.attention is not None:
            return self.attention.replaced
        return str(self._config.get_text_config()._attn_implementation)

    def score(
        self,
        module: torch.nn.Module,
        step: Pass,
        rows: Rows,
        *,
        device: torch.device | int | str,
        dtype: torch.dtype,
        process_group: ProcessGroup | None = None,
    ) -> torch.Tensor:
        """Run one forward pass.

        Args:
            module: the model, or what it has become when it was sharded.
            step: of `packing.plan` for these rows.
            device: of the computation.
            dtype: of the computation.
            process_group: ranks that share the row; only a `PackedPass` can be shared.

        Returns:
            (response tokens, 1) of log-probs, or (response tokens, 2) of log-probs and KL divergences, response by
            response in the order of `step.rows`, float32, nats.
        """
        run = {"module": module, "device": device, "dtype": dtype}
        match step:
            case PackedPass():
                return self._score_packed(step, rows, process_group, run)
            case PromptPass():
                return self._fill_cache(step, rows, run)
            case ResponsePass():
                return self._score_from_cache(step, rows, run)
            case RowsPass():
                return self._score_rows(step, rows, run)

    def forget(self) -> None:
        """Free the cache of the last prompt."""
        self._cache = None

    def _score_packed(
        self, step: PackedPass, rows: Rows, process_group: ProcessGroup | None, run: dict[str, Any]
    ) -> torch.Tensor:
        assert self.attention is not None, "planned for another way to share prompts"
        layout = Layout(step.groups, run["device"], process_group)
        here, places = layout.predicted_here()
        with self.attention.attending(layout):
            scored = self._scores(
                step.rows,
                rows,
                places,
                run,
                ids=concatenate(step.groups, rows.ids).unsqueeze(0),
                positions=concatenate(step.groups, rows.positions).unsqueeze(-2),
                # Images of a prompt come once, as its placeholders do.
                images=[rows.images[group.rows[0]] for group in step.groups],
                sampled=concatenate(step.groups, rows.sampled).unsqueeze(0),
                here=here,
            )
        if process_group is None:
            return scored
        # Each rank has scored the tokens that its part of the row predicts.
        count = sum(rows.lengths[row] for row in step.rows)
        whole = torch.zeros(count, scored.shape[1], dtype=scored.dtype, device=scored.device)
        whole[here] = scored
        torch.distributed.all_reduce(whole, group=process_group)
        return whole

    def _fill_cache(self, step: PromptPass, rows: Rows, run: dict[str, Any]) -> torch.Tensor:
        from transformers import DynamicCache

        row, cut = step.group.rows[0], slice(step.group.prompt - 1)
        cache = DynamicCache(config=self._config)
        nothing = torch.empty(0, dtype=torch.long, device=run["device"])
        with self._projecting_only(nothing):
            self._forward(
                **run,
                ids=rows.ids[row][cut].unsqueeze(0),
                positions=rows.positions[row][..., cut].unsqueeze(-2),
                images=[rows.images[row]],
                sampled=rows.sampled[row][cut].unsqueeze(0),
                cache=cache,
            )
        self._cache = cache
        return torch.empty(0, 1, device=run["device"])

    def _score_from_cache(self, step: ResponsePass, rows: Rows, run: dict[str, Any]) -> torch.Tensor:
        assert self._cache is not None, "a ResponsePass comes after the PromptPass of its prompt"
        # The prompt's last token predicts the first token of the response, and nothing follows the last one.
        parts = slice(step.prompt - 1, -1)
        ids = pad_right([rows.ids[row][parts] for row in step.rows])
        return self._scores(
            step.rows,
            rows,
            _places([0] * len(step.rows), step.responses, ids.shape[1], run["device"]),
            run,
            ids=ids,
            positions=pad_right([rows.positions[row][..., parts] for row in step.rows]),
            images=[],
            sampled=pad_right([rows.sampled[row][parts] for row in step.rows]),
            cache=_repeat_cache(self._cache, len(step.rows), run["device"]),
        )

    def _score_rows(self, step: RowsPass, rows: Rows, run: dict[str, Any]) -> torch.Tensor:
        ids = pad_right([rows.ids[row] for row in step.rows])
        lengths = [rows.lengths[row] for row in step.rows]
        starts = [len(rows.ids[row]) - length - 1 for row, length in zip(step.rows, lengths, strict=True)]
        return self._scores(
            step.rows,
            rows,
            _places(starts, lengths, ids.shape[1], run["device"]),
            run,
            ids=ids,
            positions=pad_right([rows.positions[row] for row in step.rows]),
            images=[rows.images[row] for row in step.rows],
            sampled=pad_right([rows.sampled[row] for row in step.rows]),
        )

    def _scores(
        self,
        members: Sequence[int],
        rows: Rows,
        places: torch.Tensor,
        run: dict[str, Any],
        *,
        here: torch.Tensor | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """Run a forward pass and return the scores of response tokens; see `score`.

        Args:
            members: the rows whose responses are scored.
            places: (tokens,), the places of the flattened input whose outputs predict the response tokens.
            here: (tokens,), which of the responses' tokens these are; None for all.
            inputs: of `_forward`.
        """
        device = run["device"]
        targets = torch.cat([rows.ids[row][len(rows.ids[row]) - rows.lengths[row] :] for row in members]).to(device)
        student = None
        if rows.student is not None:
            top_ids, top_log_probs = (torch.cat([x[row] for row in members]).to(device) for x in rows.student)
            student = top_ids.long(), top_log_probs
        if here is not None:
            targets, student = targets[here], None if student is None else (student[0][here], student[1][here])
        with self.head.scoring(places, targets, self._temperature, student):
            self._forward(**run, **inputs)
        return self.head.take()

    def score_plainly(
        self,
        module: torch.nn.Module,
        row: int,
        rows: Rows,
        count: int,
        *,
        whole: bool,
        device: torch.device | int | str,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Score the first response tokens of a row alone, with the model's own attention and a log-softmax over logits.

        Args:
            count: the number of tokens.
            whole: run the whole row, which images in the response need; otherwise cut it after these tokens.

        Returns:
            (count,), float32, nats.
        """
        logits = self.logits(module, row, rows, count, whole=whole, device=device, dtype=dtype)
        plain = (logits.float() / self._temperature).log_softmax(-1)
        prompt = len(rows.ids[row]) - rows.lengths[row]
        targets = rows.ids[row][prompt : prompt + count].to(plain.device)
        return plain.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    def logits(
        self,
        module: torch.nn.Module,
        row: int,
        rows: Rows,
        count: int,
        *,
        whole: bool,
        device: torch.device | int | str,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return the logits, (count, vocabulary), with which the model predicts a row's first response tokens.

        The arguments are those of `score_plainly`.
        """
        prompt = len(rows.ids[row]) - rows.lengths[row]
        cut = slice(None) if whole else slice(prompt + count)
        places = torch.arange(prompt - 1, prompt - 1 + count, device=device)
        plainly = nullcontext() if self.attention is None else self.attention.plainly()
        with plainly, self._projecting_only(places):
            logits = self._forward(
                module,
                ids=rows.ids[row][cut].unsqueeze(0),
                positions=rows.positions[row][..., cut].unsqueeze(-2),
                images=[rows.images[row]],
                sampled=rows.sampled[row][cut].unsqueeze(0),
                device=device,
                dtype=dtype,
            )
        return logits.flatten(0, -2)

    def _forward(
        self,
        module: torch.nn.Module,
        *,
        ids: torch.Tensor,
        positions: torch.Tensor,
        images: Sequence[dict[str, Any]],
        sampled: torch.Tensor,
        device: torch.device | int | str,
        dtype: torch.dtype,
        cache: "Cache | None" = None,
    ) -> torch.Tensor:
        """Run the model and return its output `logits`.

        Args:
            ids, sampled: (rows, tokens); what stands after the end of a row has no influence on it.
            positions: (rows, tokens) or (axes, rows, tokens).
            images: the model's further inputs by name, in the order of their placeholders.
            cache: of the tokens before these; the model adds these tokens to it.
        """
        inputs = self._concatenate_inputs(images)
        if self._kinds and inputs:
            placeholders = list(family_of(self._config).placeholder_ids(self._config).values())
            kinds = (torch.isin(ids, ids.new_tensor(placeholders)) & ~sampled).long()
            inputs |= dict.fromkeys(self._kinds, kinds)
        if self._rotary_axes and positions.dim() == 2:
            # A student that sees no images counts positions on one axis.
            positions = positions.expand(4, -1, -1)
        elif not self._rotary_axes and positions.dim() == 3:
            # The student counts on four axes, the first of which is that of text.
            positions = positions[0]
        inputs |= {"input_ids": ids, "attention_mask": None, "position_ids": positions, "use_cache": cache is not None}
        if cache is not None:
            inputs["past_key_values"] = cache
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        # Asked before anything moves, because the answer of an accelerator would have to be waited for.
        if bool(sampled.any()):
            # A model puts image features wherever it sees the placeholder's id, so it is shown another id. It still
            # embeds the placeholder's own row there, as the rollout engine did when it continued from that token.
            # (verl's own engines, and therefore the student's, fail on such a row.)
            taken = set(family_of(self._config).placeholder_ids(self._config).values())
            other = next(token_id for token_id in range(len(taken) + 1) if token_id not in taken)
            inputs["input_ids"] = ids.masked_fill(sampled, other).to(device)
            self._embedded_ids = ids.to(device)
        kind = torch.device(device).type
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(kind, dtype=dtype)
        try:
            with torch.no_grad(), autocast:
                return module(**inputs).logits
        finally:
            self._embedded_ids = None

    @contextmanager
    def _projecting_only(self, places: torch.Tensor) -> Iterator[None]:
        """Have the model return the logits of these places of its flattened input only, within this context."""
        hook = self._projection.register_forward_pre_hook(
            lambda _, hidden: (hidden[0].flatten(0, -2)[places].unsqueeze(0),)
        )
        try:
            yield
        finally:
            hook.remove()


def _parameters(forward: Callable[..., Any]) -> Sequence[str]:
    return list(inspect.signature(forward).parameters)


def _places(
    starts: Sequence[int], lengths: Sequence[int], width: int, device: torch.device | int | str
) -> torch.Tensor:
    """Return the places of runs of tokens in a flattened batch.

    Args:
        starts, lengths: of each row's run.
        width: tokens of a row, with its padding.
    """
    runs = [
        torch.arange(row * width + start, row * width + start + length)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    return torch.cat(runs).to(device)


def _repeat_cache(cache: "Cache", times: int, device: torch.device | int | str) -> "Cache":
    """Return a copy of a cache of one row with this many rows. The tensors of the original stay as they are."""
    rows = torch.zeros(times, dtype=torch.long, device=device)
    repeated = copy.copy(cache)
    repeated.layers = [copy.copy(layer) for layer in cache.layers]
    repeated.reorder_cache(rows)
    for layer in repeated.layers:
        # transformers reorders keys, values and recurrent states only. DeepSeek-V4's layers keep more, in dicts.
        for name, state in vars(layer).items():
            if isinstance(state, dict):
                kept = {k: x.index_select(0, rows) if isinstance(x, torch.Tensor) else x for k, x in state.items()}
                setattr(layer, name, kept)
    return repeated
