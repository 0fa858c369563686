# SPDX-License-Identifier: Apache-2.0
"""Log-probs and entropies of response tokens from the output projection, with gradients, and few logits at a time.

Only the rows of the last hidden state that predict a response token go through the projection. A block of their logits
is made, used and dropped. The backward pass makes each block again. Therefore neither pass holds logits of a prompt, or
of the vocabulary times the batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from verl_gndpo.kl import top_log_probs
from verl_gndpo.teacher.scoring import CPU_LOGITS, CPU_TOKENS, float32_logits

LEAST_COLUMNS = 512
"""Columns of a block, at least: with fewer, the products with the weights no longer run at full speed."""


@dataclass(frozen=True)
class Request:
    """What a forward pass computes for response tokens."""

    rows: torch.Tensor
    """(tokens,), the rows of the flattened hidden state that predict the tokens."""

    ids: torch.Tensor
    """(tokens,), the tokens."""

    temperature: torch.Tensor | float
    """Divides the logits: one number, or (tokens,)."""

    entropy: bool = False
    """Compute the entropies of the distributions, too."""

    sum_pi_squared: bool = False
    """Compute the sums of the squared probabilities, too. They have no gradient."""

    top_k: int | None = None
    """Find this number of most likely ids, too. They have no gradient."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Return what is computed, by verl's names, in the order of the columns of `token_scores`."""
        return (
            "log_probs",
            *(("entropy",) if self.entropy else ()),
            *(("sum_pi_squared",) if self.sum_pi_squared else ()),
        )


@dataclass(frozen=True)
class Blocks:
    """How many logits exist at the same time."""

    tokens: int
    columns: int

    @classmethod
    def fit(cls, tokens: int, vocabulary: int, chunk_tokens: int, device: torch.device) -> "Blocks":
        """Return blocks of at most `chunk_tokens` x vocabulary logits; on a CPU, what stays in the cache."""
        budget = chunk_tokens * vocabulary
        if device.type == "cpu":
            budget = min(budget, CPU_LOGITS)
            tokens = min(tokens, CPU_TOKENS)
        # As many tokens as possible: the gradient of the weights adds up over tokens.
        tokens = max(min(tokens, budget // min(LEAST_COLUMNS, vocabulary)), 1)
        return cls(tokens, max(min(budget // tokens, vocabulary), 1))


class _TokenScores(torch.autograd.Function):
    """Log-probs, entropies and sums of squared probabilities of tokens; see `token_scores`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ids: torch.Tensor,
        inverse: torch.Tensor | None,
        blocks: Blocks,
        entropy: bool,
        squares: bool,
    ) -> torch.Tensor:
        count = len(ids)
        state = torch.zeros(5, count, device=hidden.device)
        chosen, peak, total, weighted, squared = state
        peak.fill_(-torch.inf)
        for tokens, columns in _each_block(count, len(weight), blocks):
            logits = _scaled_logits(hidden[tokens], weight[columns], bias, columns, inverse, tokens)
            place = (ids[tokens] - columns.start).unsqueeze(1)
            width = logits.shape[1]
            found = logits.gather(1, place.clamp(0, width - 1)).squeeze(1)
            place = place.squeeze(1)
            chosen[tokens] = torch.where((place >= 0) & (place < width), found, chosen[tokens])
            new_peak = torch.maximum(peak[tokens], logits.amax(1))
            rescale = (peak[tokens] - new_peak).exp_()
            peak[tokens] = new_peak
            likelihood = logits.sub(new_peak.unsqueeze(1)) if entropy else logits.sub_(new_peak.unsqueeze(1))
            likelihood = likelihood.exp_()
            total[tokens] = total[tokens] * rescale + likelihood.sum(1)
            if entropy:
                weighted[tokens] = weighted[tokens] * rescale + logits.mul_(likelihood).sum(1)
            if squares:
                squared[tokens] = squared[tokens] * rescale.square_() + likelihood.square_().sum(1)
        normalizer = total.log() + peak
        scores = [chosen - normalizer]
        if entropy:
            scores.append(normalizer - weighted / total)
        if squares:
            scores.append(squared / total.square())
        ctx.blocks, ctx.entropy = blocks, entropy
        ctx.save_for_backward(hidden, weight, bias, ids, inverse, normalizer, scores[1] if entropy else None)
        return torch.stack(scores, 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        hidden, weight, bias, ids, inverse, normalizer, entropies = ctx.saved_tensors
        of_log_prob = gradient[:, 0]
        of_entropy = gradient[:, 1] if ctx.entropy else None
        # Masked tokens, and those without an advantage, have no gradient.
        needed = of_log_prob != 0 if of_entropy is None else (of_log_prob != 0) | (of_entropy != 0)
        all_hidden, kept = hidden, needed.nonzero().squeeze(1)
        if len(kept) < len(ids):
            hidden, ids, normalizer, of_log_prob = hidden[kept], ids[kept], normalizer[kept], of_log_prob[kept]
            inverse = None if inverse is None else inverse[kept]
            if of_entropy is not None:
                of_entropy, entropies = of_entropy[kept], entropies[kept]
        if of_entropy is not None and not bool((of_entropy != 0).any()):
            of_entropy = None
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        blocks = ctx.blocks
        # In float32 until a block is complete, because 16 bits would lose small parts of a long sum.
        to_hidden = torch.zeros(hidden.shape, device=hidden.device) if needs_hidden else None
        to_weight = torch.zeros_like(weight) if needs_weight else None
        to_bias = torch.zeros_like(bias) if needs_bias else None
        previous, part = None, None
        for tokens, columns in _each_block(len(ids), len(weight), blocks):
            if needs_weight and columns != previous:
                _store(to_weight, previous, part)
                previous = columns
                part = torch.zeros(columns.stop - columns.start, hidden.shape[1], device=hidden.device)
            logits = _scaled_logits(hidden[tokens], weight[columns], bias, columns, inverse, tokens)
            log_probs = logits.sub_(normalizer[tokens].unsqueeze(1))
            # d log p(chosen) / d logit = [chosen] - p, and d entropy / d logit = -p (log p + entropy).
            slope = -of_log_prob[tokens].unsqueeze(1)
            if of_entropy is not None:
                shifted = log_probs + entropies[tokens].unsqueeze(1)
                slope = shifted.mul_(-of_entropy[tokens].unsqueeze(1)).add_(slope)
            slope = log_probs.exp_().mul_(slope)
            place = ids[tokens] - columns.start
            # Tokens of other blocks add 0 somewhere, because to pick those of this one would wait for the device.
            inside = (place >= 0) & (place < slope.shape[1])
            place = place.clamp(0, slope.shape[1] - 1).unsqueeze(1)
            slope.scatter_add_(1, place, torch.where(inside, of_log_prob[tokens], 0.0).unsqueeze(1))
            if inverse is not None:
                slope.mul_(inverse[tokens].unsqueeze(1))
            if to_bias is not None:
                to_bias[columns] += slope.sum(0).to(to_bias.dtype)
            slope = slope.to(weight.dtype)
            if to_hidden is not None:
                _add_product(to_hidden[tokens], slope, weight[columns])
            if part is not None:
                _add_product(part, slope.T, hidden[tokens].to(weight.dtype))
        _store(to_weight, previous, part)
        if to_hidden is not None and len(kept) < len(all_hidden):
            to_hidden = torch.zeros(all_hidden.shape, device=hidden.device).index_copy_(0, kept, to_hidden)
        if to_hidden is not None:
            to_hidden = to_hidden.to(hidden.dtype)
        return to_hidden, to_weight, to_bias, None, None, None, None, None


def _each_block(tokens: int, vocabulary: int, blocks: Blocks) -> Iterator[tuple[slice, slice]]:
    """Yield the tokens and the columns of each block, all tokens of the same columns after each other."""
    for start in range(0, vocabulary, blocks.columns):
        columns = slice(start, min(start + blocks.columns, vocabulary))
        for first in range(0, tokens, blocks.tokens):
            yield slice(first, min(first + blocks.tokens, tokens)), columns


def _scaled_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    columns: slice,
    inverse: torch.Tensor | None,
    tokens: slice,
) -> torch.Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        logits = float32_logits(hidden.to(weight.dtype), weight, None if bias is None else bias[columns])
    return logits if inverse is None else logits.mul_(inverse[tokens].unsqueeze(1))


def _add_product(target: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
    """Add the product of two matrices to a float32 one in place."""
    if one.dtype == torch.float32:
        target.addmm_(one, other)
    elif one.device.type == "cuda":
        target.add_(torch.mm(one, other, out_dtype=torch.float32))
    else:
        target.add_(torch.mm(one, other))


def _store(target: torch.Tensor | None, columns: slice | None, part: torch.Tensor | None) -> None:
    if target is not None and columns is not None and part is not None:
        target[columns] = part.to(target.dtype)


def token_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    temperature: torch.Tensor | float = 1.0,
    *,
    chunk_tokens: int,
    entropy: bool = False,
    sum_pi_squared: bool = False,
) -> torch.Tensor:
    """Score tokens under softmax((hidden weight^T + bias) / temperature), in float32, block by block in both passes.

    Args:
        hidden: (tokens, hidden size).
        weight, bias: (vocabulary, hidden size) and (vocabulary,), of the output projection.
        ids: (tokens,).
        temperature: one number, or (tokens,); as in verl, at least 1e-8.
        chunk_tokens: the number of tokens whose logits may exist at the same time.
        entropy: return entropies, too.
        sum_pi_squared: return the sums of the squared probabilities, too, which have no gradient.

    Returns:
        (tokens, 1 to 3), float32: log-probs in nats, then entropies in nats, then sums of squared probabilities.
    """
    inverse = None
    if isinstance(temperature, torch.Tensor):
        inverse = 1 / temperature.to(hidden.device, torch.float32).clamp(min=1e-8)
    elif temperature != 1.0:
        inverse = torch.full((len(ids),), 1 / max(temperature, 1e-8), device=hidden.device)
    blocks = Blocks.fit(len(ids), len(weight), chunk_tokens, hidden.device)
    return _TokenScores.apply(hidden, weight, bias, ids, inverse, blocks, entropy, sum_pi_squared)


class ResponseHead:
    """An output projection that returns scores of response tokens instead of logits, (tokens, 1 to 3).

    The projection's own forward is replaced on the instance: the parameters keep their names, and FSDP has gathered
    them when it runs. The scores are the model's `logits`, so that FSDP sees the tensor from which the backward pass
    starts.
    """

    def __init__(self, lm_head: torch.nn.Linear, chunk_tokens: int):
        """
        Args:
            lm_head: the output projection, whose result is the model's output.
            chunk_tokens: the number of tokens whose logits may exist at the same time.
        """
        self._lm_head = lm_head
        self._project = lm_head.forward
        self._chunk_tokens = chunk_tokens
        self._request: Request | None = None
        self._top: tuple[torch.Tensor, torch.Tensor] | None = None
        lm_head.forward = self._forward  # type: ignore[method-assign, assignment]  # of this instance only

    @contextmanager
    def answering(self, request: Request) -> Iterator[None]:
        """Have the projection return what `token_scores` does, in this context."""
        self._request = request
        try:
            yield
        finally:
            self._request = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Return what the columns hold, by verl's names; only within `answering`."""
        assert self._request is not None, "the projection computes nothing but logits here"
        return self._request.columns

    def take_top(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the most likely ids of the last forward pass, once, as `top_log_probs` does; None without `top_k`."""
        top, self._top = self._top, None
        return top

    def _forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        request = self._request
        if request is None:
            return self._project(hidden_states)
        hidden = hidden_states.flatten(0, -2)[request.rows]
        weight, bias = self._lm_head.weight, self._lm_head.bias
        if request.top_k is not None:
            self._top = self._most_likely(hidden, request, request.top_k)
        return token_scores(
            hidden,
            weight,
            bias,
            request.ids,
            request.temperature,
            chunk_tokens=self._chunk_tokens,
            entropy=request.entropy,
            sum_pi_squared=request.sum_pi_squared,
        )

    @torch.no_grad()
    def _most_likely(self, hidden: torch.Tensor, request: Request, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias, divisor = self._lm_head.weight, self._lm_head.bias, request.temperature
        ids, log_probs = [], []
        for start in range(0, max(len(hidden), 1), self._chunk_tokens):
            tokens = slice(start, start + self._chunk_tokens)
            with torch.autocast(hidden.device.type, enabled=False):
                logits = float32_logits(hidden[tokens].to(weight.dtype), weight, bias)
            top = top_log_probs(logits / (divisor[tokens, None] if isinstance(divisor, torch.Tensor) else divisor), k)
            ids.append(top[0])
            log_probs.append(top[1])
        return torch.cat(ids), torch.cat(log_probs)
