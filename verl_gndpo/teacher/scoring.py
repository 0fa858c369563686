# SPDX-License-Identifier: Apache-2.0
"""Log-probs of chosen tokens, from the output projection, without the logits of any other position.

Only the rows of the last hidden state that predict a chosen token go through the projection, and only a block of their
logits exists at a time. The peak is `chunk_tokens` x vocabulary at most, whatever the prompt, the image or the batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import overload

import torch
from torch.nn.functional import linear

from verl_gndpo.kl import kl_divergence

CPU_LOGITS = 1 << 21
"""Logits per block on a CPU. A block of this size stays in the cache between the product and its exponentials; all
logits at once would be written to memory and read again several times."""

CPU_TOKENS = 1024
"""Hidden states per block on a CPU: enough to read the weights once for many of them. The projection takes three
quarters of the time (docs/benchmarks.md)."""


@dataclass(frozen=True)
class LogitsChange:
    """What a model does with its logits after the output projection: cap tanh(scale logits / cap)."""

    scale: float = 1.0
    """Granite, Cohere and others divide or multiply all logits by a number."""

    cap: float | None = None
    """Gemma 2 and its relatives bound the absolute value of a logit by this; None: no bound."""

    def apply_(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply the change to float32 logits, in place."""
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)


UNCHANGED = LogitsChange()


@overload
def token_log_probs(
    hidden: torch.Tensor,
    token_ids: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    columns: int,
    *,
    change: LogitsChange = ...,
) -> torch.Tensor: ...


@overload
def token_log_probs(
    hidden: torch.Tensor,
    token_ids: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    columns: int,
    top_ids: torch.Tensor,
    change: LogitsChange = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def token_log_probs(
    hidden: torch.Tensor,
    token_ids: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    columns: int,
    top_ids: torch.Tensor | None = None,
    change: LogitsChange = UNCHANGED,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute log softmax((hidden weight^T + bias) / temperature)[token] in float32, with few ids' logits at a time.

    Args:
        hidden: (tokens, hidden size).
        token_ids: (tokens,).
        weight, bias: (vocabulary, hidden size) and (vocabulary,), of the output projection.
        temperature: divides the logits.
        columns: the number of ids whose logits exist at the same time.
        top_ids: (tokens, k), distinct in each row; further ids whose log-probs are wanted.
        change: of the logits, before the temperature.

    Returns:
        (tokens,), nats. With `top_ids`, also their log-probs, (tokens, k + 1): -inf for an id beyond the vocabulary,
        and in the last column the log of the mass of all other ids.
    """
    ids = token_ids.unsqueeze(-1) if top_ids is None else torch.cat([token_ids.unsqueeze(-1), top_ids], -1)
    chosen = torch.zeros(ids.shape, device=hidden.device)
    peak = torch.full(token_ids.shape, -torch.inf, device=hidden.device)
    total = torch.zeros(token_ids.shape, device=hidden.device)
    for start in range(0, len(weight), columns):
        block = slice(start, start + columns)
        logits = change.apply_(float32_logits(hidden, weight[block], None if bias is None else bias[block]))
        if temperature != 1.0:
            logits = logits.div_(temperature)
        here = logits.gather(-1, (ids - start).clamp(0, logits.shape[-1] - 1))
        chosen = torch.where(ids >= start, here, chosen)
        new_peak = torch.maximum(peak, logits.amax(-1))
        if top_ids is not None:
            # They are left out of the sum here; subtracting them from it afterwards would cancel digits.
            # Of two values at a place the lower one stays, so that ids of other blocks change nothing.
            inside = (top_ids >= start) & (top_ids < start + logits.shape[-1])
            lower = torch.where(inside, -torch.inf, torch.inf)
            logits.scatter_reduce_(-1, (top_ids - start).clamp(0, logits.shape[-1] - 1), lower, "amin")
        # In place: without further copies of the logits it is an eighth faster, and they alone make the peak.
        total = total * (peak - new_peak).exp_() + logits.sub_(new_peak.unsqueeze(-1)).exp_().sum(-1)
        peak = new_peak
    chosen = chosen - peak.unsqueeze(-1)
    if top_ids is None:
        return chosen.squeeze(-1) - total.log()
    own, top = chosen[:, 0], chosen[:, 1:].masked_fill(top_ids >= len(weight), -torch.inf)
    whole = (total + top.exp().sum(-1)).log()
    return own - whole, torch.cat([top, total.log().unsqueeze(-1)], -1) - whole.unsqueeze(-1)


def float32_logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return hidden weight^T + bias in float32, where CUDA can do so also from operands in 16 bits.

    Logits that are rounded to bfloat16 are off by 0.009 nats in the mean and by 0.04 at most. Kept in float32, they are
    off by 0.00005, in the same time (docs/benchmarks.md).

    Args:
        hidden: (tokens, hidden size).
        weight, bias: (columns, hidden size) and (columns,).
    """
    if hidden.device.type != "cuda" or weight.dtype == torch.float32:
        return linear(hidden, weight, bias).float()
    logits = torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
    return logits if bias is None else logits.add_(bias)


class ScoringHead:
    """An output projection that returns log-probs of given tokens instead of logits.

    Hugging Face models, and verl's variants of them, compute `self.lm_head(hidden_states)`, and some change the result.
    The projection's own forward is replaced on the instance: the parameters keep their names, and FSDP has gathered
    them when it runs, however the model is sharded.
    """

    def __init__(self, lm_head: torch.nn.Linear, chunk_tokens: int, change: LogitsChange = UNCHANGED):
        """
        Args:
            lm_head: the output projection.
            chunk_tokens: the number of tokens whose logits exist at the same time. On a CPU, `CPU_LOGITS` and
                `CPU_TOKENS` decide.
            change: what the model does with the logits that the projection returns.
        """
        self._change = change
        self._scored: torch.Tensor | None = None
        self._lm_head = lm_head
        self._project = lm_head.forward
        self._chunk_tokens = chunk_tokens
        self._request: tuple | None = None
        lm_head.forward = self._forward  # type: ignore[method-assign, assignment]  # of this instance only

    @contextmanager
    def scoring(
        self,
        rows: torch.Tensor,
        token_ids: torch.Tensor,
        temperature: float,
        student: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Iterator[None]:
        """Have a forward of the model compute log-probs instead of logits, in this context; `take` returns them.

        Args:
            rows: (tokens,), rows of the hidden state flattened to (rows, hidden size).
            token_ids: (tokens,), the token that each row predicts.
            temperature: divides the logits.
            student: for each row another model's most likely ids, (tokens, k), and their log-probs with the mass of the
                others, (tokens, k + 1). KL(student || model) is then computed, too.
        """
        self._request = (rows, token_ids, temperature, student)
        try:
            yield
        finally:
            self._request = None

    def take(self) -> torch.Tensor:
        """Return what the last forward within `scoring` has computed, once.

        Returns:
            (tokens, 1) of log-probs, or (tokens, 2) of log-probs and KL divergences; float32, nats.

        Raises:
            NotImplementedError: the model has not used this output projection.
        """
        scored, self._scored = self._scored, None
        if scored is None:
            raise NotImplementedError("the model computes its logits by other means than its output projection")
        return scored

    def _forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self._request is None:
            return self._project(hidden_states)
        rows, token_ids, temperature, student = self._request
        hidden = hidden_states.flatten(0, -2)
        weight, bias = self._lm_head.weight, self._lm_head.bias
        tokens, columns = self._chunk_tokens, len(weight)
        if hidden.device.type == "cpu":
            tokens, logits = max(min(len(rows), CPU_TOKENS), 1), min(tokens * columns, CPU_LOGITS)
            columns = max(logits // tokens, 1)
        out = torch.empty(len(rows), 1 if student is None else 2, dtype=torch.float32, device=hidden.device)
        for i in range(0, len(rows), tokens):
            chunk = slice(i, i + tokens)
            projected = (hidden[rows[chunk]], token_ids[chunk], weight, bias, temperature, columns)
            if student is None:
                out[chunk, 0] = token_log_probs(*projected, change=self._change)
                continue
            out[chunk, 0], teacher = token_log_probs(*projected, student[0][chunk], self._change)
            out[chunk, 1] = kl_divergence(student[1][chunk], teacher)
        self._scored = out
        # The model may go on to scale or bound what it takes for logits, so the scores do not go through it.
        return hidden_states.new_zeros(*hidden_states.shape[:-1], 1)
