# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model that scores response tokens. It needs torch and transformers, and nothing of verl.

`packing` decides which rows run together, `attention` lets responses to a prompt continue from one pass over it, and
`scoring` projects only the hidden states that predict a response token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import ProcessGroup

from verl_gndpo.families import family_of
from verl_gndpo.teacher.attention import SharedPromptAttention
from verl_gndpo.teacher.distinct_images import encode_distinct_images
from verl_gndpo.teacher.packing import Layout, PromptGroup, concatenate
from verl_gndpo.teacher.scoring import ScoringHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        flex: bool = False,
        name: str = "",
        concatenate_inputs: Callable[[Sequence[dict[str, Any]]], dict[str, Any]] = concatenate_inputs,
    ):
        """Change the model so that it shares prompts and images, and returns log-probs.

        Args:
            model: a causal language model or an image-text model, before it is sharded.
            chunk_tokens: the number of response tokens whose logits exist at the same time; see `ScoringHead`.
            temperature: divides the logits.
            flex: attend by FlexAttention; see `SharedPromptAttention`.
            name: the model's name, for messages.
            concatenate_inputs: joins the further inputs of several rows.

        Raises:
            NotImplementedError: the model changes logits after the output projection, or has layers that mix tokens by
                other means than attention.
        """
        config = model.config.get_text_config()
        for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
            if getattr(config, key, None) is not None:
                raise NotImplementedError(
                    f"teacher {name}: its config sets {key}, which changes logits after the output projection; the "
                    "chunked scorer can't reproduce that"
                )
        self._config = model.config
        self._temperature = temperature
        self._concatenate_inputs = concatenate_inputs
        self._projection = model.get_output_embeddings()
        self.head = ScoringHead(self._projection, chunk_tokens)
        self.attention = SharedPromptAttention(model, flex=flex)
        encode_distinct_images(model)
        self._rotary_axes = "mrope_section" in (getattr(config, "rope_parameters", None) or {})
        self._embedded_ids: torch.Tensor | None = None
        model.get_input_embeddings().register_forward_pre_hook(
            lambda _, ids: ids if self._embedded_ids is None else (self._embedded_ids,)
        )
        model.requires_grad_(False).eval()

    def score(
        self,
        module: torch.nn.Module,
        groups: Sequence[PromptGroup],
        rows: Rows,
        *,
        device: torch.device | int | str,
        dtype: torch.dtype,
        process_group: ProcessGroup | None = None,
    ) -> torch.Tensor:
        """Score one micro-batch.

        Args:
            module: the model, or what it has become when it was sharded.
            groups: the micro-batch; their rows are those of `rows`.
            device: of the computation.
            dtype: of the computation.
            process_group: ranks that share the row.

        Returns:
            (response tokens, 1) of log-probs, or (response tokens, 2) of log-probs and KL divergences, response by
            response, float32, nats.
        """
        members = [row for group in groups for row in group.rows]
        layout = Layout(groups, device, process_group)
        targets = torch.cat([rows.ids[row][group.prompt :] for group in groups for row in group.rows]).to(device)
        here, places = layout.predicted_here()
        student = None
        if rows.student is not None:
            top_ids, top_log_probs = (torch.cat([x[row] for row in members]) for x in rows.student)
            student = top_ids.to(device)[here].long(), top_log_probs.to(device)[here]
        scoring = self.head.scoring(places, targets[here], self._temperature, student)
        with self.attention.attending(layout), scoring:
            scored = self._forward(
                module,
                concatenate(groups, rows.ids),
                concatenate(groups, rows.positions),
                # Images of a prompt come once, as its placeholders do.
                [rows.images[group.rows[0]] for group in groups],
                concatenate(groups, rows.sampled),
                device,
                dtype,
            ).squeeze(0)
        if process_group is None:
            return scored
        # Each rank has scored the tokens that its part of the row predicts.
        whole = torch.zeros(len(targets), scored.shape[1], dtype=scored.dtype, device=scored.device)
        whole[here] = scored
        torch.distributed.all_reduce(whole, group=process_group)
        return whole

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
        prompt = len(rows.ids[row]) - rows.lengths[row]
        cut = slice(None) if whole else slice(prompt + count)
        places = torch.arange(prompt - 1, prompt - 1 + count, device=device)
        with self.attention.plainly(), self._projecting_only(places):
            logits = self._forward(
                module,
                rows.ids[row][cut],
                rows.positions[row][..., cut],
                [rows.images[row]],
                rows.sampled[row][cut],
                device,
                dtype,
            )
        plain = (logits.flatten(0, -2).float() / self._temperature).log_softmax(-1)
        targets = rows.ids[row][prompt : prompt + count].to(plain.device)
        return plain.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    def _forward(
        self,
        module: torch.nn.Module,
        ids: torch.Tensor,
        positions: torch.Tensor,
        images: Sequence[dict[str, Any]],
        sampled: torch.Tensor,
        device: torch.device | int | str,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Run the model on one row without padding, and return its output `logits`.

        Args:
            ids, sampled: (tokens,).
            positions: (tokens,) or (axes, tokens).
            images: the model's further inputs by name, in the order of their placeholders.
        """
        inputs = self._concatenate_inputs(images)
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        ids, positions = ids.to(device).unsqueeze(0), positions.to(device)
        if positions.dim() == 1 and self._rotary_axes:
            # A student that sees no images counts positions on one axis.
            positions = positions.expand(4, -1)
        inputs |= {"input_ids": ids, "attention_mask": None, "use_cache": False}
        inputs["position_ids"] = positions.unsqueeze(1 if positions.dim() == 2 else 0)
        if bool(sampled.any()):
            # A model puts image features wherever it sees the placeholder's id, so it is shown another id. It still
            # embeds the placeholder's own row there, as the rollout engine did when it continued from that token.
            # (verl's own engines, and therefore the student's, fail on such a row.)
            taken = set(family_of(self._config).placeholder_ids(self._config).values())
            other = next(token_id for token_id in range(len(taken) + 1) if token_id not in taken)
            inputs["input_ids"] = ids.masked_fill(sampled.to(device), other)
            self._embedded_ids = ids
        kind = torch.device(device).type
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(kind, dtype=dtype)
        try:
            with torch.no_grad(), autocast:
                return module(**inputs).logits
        finally:
            self._embedded_ids = None

    @contextmanager
    def _projecting_only(self, places: torch.Tensor) -> Iterator[None]:
        """Have the model return the logits of these places of its row only, within this context."""
        hook = self._projection.register_forward_pre_hook(lambda _, hidden: (hidden[0].flatten(0, -2)[places],))
        try:
            yield
        finally:
            hook.remove()
