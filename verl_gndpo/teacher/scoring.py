# SPDX-License-Identifier: Apache-2.0
"""Log-probs of response tokens without the logits of anything else, and without encoding an image twice.

Only the rows of the last hidden state that predict a response token go through the output projection, in blocks, so
that the peak is at most `chunk_tokens` x vocabulary whatever the prompt, the image or the batch.
"""

import inspect
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import linear

from verl_gndpo.kl import kl_divergence

# On a CPU, logits at the same time: a block of them stays in the cache between the product and its exponentials, where
# all at once would be written to memory and read again several times; and hidden states at the same time, enough that
# the weights are read once for many of them. The projection takes three quarters of the time (benchmarks.md).
CPU_LOGITS, CPU_TOKENS = 1 << 21, 1024


def token_log_probs(
    hidden: torch.Tensor,
    token_ids: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    columns: int,
    top_ids: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """log softmax((hidden weight^T + bias) / temperature)[token] in float32, with the logits of few ids at a time.

    Args:
        hidden: (tokens, hidden size).
        token_ids: (tokens,).
        weight, bias: (vocabulary, hidden size) and (vocabulary,) of the output projection.
        temperature: divides the logits.
        columns: ids whose logits exist at the same time.
        top_ids: (tokens, k), distinct in each row; further ids whose log-probs are wanted.

    Returns:
        (tokens,), nats; with `top_ids` also theirs, (tokens, k + 1): -inf for an id beyond the vocabulary, and last the
        log of the mass of all other ids.
    """
    ids = token_ids.unsqueeze(-1) if top_ids is None else torch.cat([token_ids.unsqueeze(-1), top_ids], -1)
    chosen = peak = total = None
    for start in range(0, len(weight), columns):
        block = slice(start, start + columns)
        logits = linear(hidden, weight[block], None if bias is None else bias[block]).float()
        if temperature != 1.0:
            logits = logits.div_(temperature)
        here = logits.gather(-1, (ids - start).clamp(0, logits.shape[-1] - 1))
        chosen = here if chosen is None else torch.where(ids >= start, here, chosen)
        highest = logits.amax(-1)
        new_peak = highest if peak is None else torch.maximum(peak, highest)
        if top_ids is not None:
            # Left out of the sum, since what is left of a sum after a subtraction has few digits.
            row, place = ((top_ids >= start) & (top_ids < start + logits.shape[-1])).nonzero(as_tuple=True)
            logits[row, top_ids[row, place] - start] = -torch.inf
        # In place: without further copies of the logits it is an eighth faster, and the peak is theirs alone.
        sums = logits.sub_(new_peak.unsqueeze(-1)).exp_().sum(-1)
        total = sums if total is None else total * (peak - new_peak).exp_() + sums
        peak = new_peak
    chosen = chosen - peak.unsqueeze(-1)
    if top_ids is None:
        return chosen.squeeze(-1) - total.log()
    own, top = chosen[:, 0], chosen[:, 1:].masked_fill(top_ids >= len(weight), -torch.inf)
    whole = (total + top.exp().sum(-1)).log()
    return own - whole, torch.cat([top, total.log().unsqueeze(-1)], -1) - whole.unsqueeze(-1)


class ScoringHead:
    """Makes a model's output projection return log-probs of given tokens instead of logits.

    Hugging Face models, and verl's variants of them, end in `logits = self.lm_head(hidden_states)`. The projection's
    own forward is replaced on the instance: the parameters keep their names, and FSDP has gathered them when it runs,
    whichever way the model is sharded.
    """

    def __init__(self, lm_head: torch.nn.Linear, chunk_tokens: int):
        self._lm_head = lm_head
        self._project = lm_head.forward
        self._chunk_tokens = chunk_tokens
        self._request: tuple | None = None
        lm_head.forward = self._forward

    @contextmanager
    def scoring(
        self,
        rows: torch.Tensor,
        token_ids: torch.Tensor,
        temperature: float,
        student: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        """Within this context a forward of the model returns, as `logits`, (1, rows, 1) float32 log-probs in nats.

        Args:
            rows: (tokens,), rows of the hidden state flattened to (rows, hidden_size).
            token_ids: (tokens,), the token that each row is to predict.
            temperature: divides the logits.
            student: at each row the student's most likely ids, (tokens, k), and their log-probs with the mass of the
                others, (tokens, k + 1). What is returned is then (1, rows, 2): KL(student || model) comes second.
        """
        self._request = (rows, token_ids, temperature, student)
        try:
            yield
        finally:
            self._request = None

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
                out[chunk, 0] = token_log_probs(*projected)
                continue
            out[chunk, 0], teacher = token_log_probs(*projected, student[0][chunk])
            out[chunk, 1] = kl_divergence(student[1][chunk], teacher)
        return out.unsqueeze(0)


def encode_distinct_images(module: torch.nn.Module) -> None:
    """Have the vision tower of a model encode each distinct image of a call once; see `DistinctImages`.

    Does nothing to a model without one, or with one whose inputs can't be cut into images: it encodes every copy.

    Args:
        module: a Hugging Face model. Its tower is `model.visual` (Qwen-VL, GLM-V) or `model.vision_tower` (InternVL,
            LLaVA).
    """
    inner = getattr(module, "model", None)
    for name in ("visual", "vision_tower"):
        tower = getattr(inner, name, None)
        if tower is None:
            continue
        parameters = inspect.signature(tower.forward).parameters
        by_grid = "grid_thw" in parameters and hasattr(tower, "spatial_merge_size")
        if by_grid or next(iter(parameters)) == "pixel_values":
            DistinctImages(tower)


class DistinctImages:
    """Lets a vision tower encode each distinct image of a call once.

    Prompts that share an image each bring a copy of it. As with `ScoringHead`, the tower's own forward is replaced on
    the instance. It takes either all patches in one row and a grid an image (Qwen-VL), and what it returns holds rows
    of patches or of merged tokens, image by image; or an image or tile a row (InternVL), and so does what it returns.
    Whatever else it returns beside, as Qwen3-VL's features of inner layers, has rows of one of these kinds.
    """

    def __init__(self, tower: torch.nn.Module):
        self._encode = tower.forward
        self._tower = tower
        tower.forward = self._forward

    def _forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor | None = None, **options):
        """
        Args:
            pixel_values: (patches, features) with a grid, (images, ...) without.
            grid_thw: (images, 3), time, height and width in patches.
            options: handed on. A tensor among them may belong to the images; then every copy is encoded.
        """
        grid = {} if grid_thw is None else {"grid_thw": grid_thw}
        if any(not isinstance(value, bool | int | str | None) for value in options.values()):
            return self._encode(pixel_values, **grid, **options)
        rows = [1] * len(pixel_values) if grid_thw is None else grid_thw.prod(-1).tolist()
        images = pixel_values.split(rows)
        distinct, which = _distinct(images, [()] * len(images) if grid_thw is None else grid_thw.tolist())
        if len(distinct) == len(images):
            return self._encode(pixel_values, **grid, **options)
        if grid_thw is not None:
            grid = {"grid_thw": grid_thw[distinct]}
        encoded = self._encode(torch.cat([images[i] for i in distinct]), **grid, **options)
        rows = [rows[i] for i in distinct]
        sizes = [rows] if grid_thw is None else [rows, [n // self._tower.spatial_merge_size**2 for n in rows]]
        return _repeat(encoded, {sum(size): size for size in sizes}, which)


def _repeat(encoded: Any, sizes: dict[int, list[int]], which: list[int]):
    """Give each image of a call the rows of the distinct image that it equals.

    Args:
        encoded: what a tower made of the distinct images: tensors, in any nesting.
        sizes: by their sum, how many rows each distinct image may have in a tensor.
        which: of each image, the distinct one.

    Raises:
        ValueError: a tensor has a number of rows that no way of cutting it explains.
    """
    if isinstance(encoded, torch.Tensor):
        if len(encoded) not in sizes:
            raise ValueError(f"a vision tower returned {len(encoded)} rows for images that have {list(sizes)}")
        parts = encoded.split(sizes[len(encoded)])
        return torch.cat([parts[i] for i in which])
    if isinstance(encoded, dict):
        return type(encoded)(**{key: _repeat(value, sizes, which) for key, value in encoded.items()})
    if isinstance(encoded, list | tuple):
        return type(encoded)(_repeat(value, sizes, which) for value in encoded)
    return encoded


def _distinct(images: Sequence[torch.Tensor], shapes: list) -> tuple[list[int], list[int]]:
    """Indices of the distinct images, and for each image the position of its equal among them."""
    distinct, which = [], []
    seen: dict[tuple, list[int]] = {}
    for i, (image, shape) in enumerate(zip(images, shapes, strict=True)):
        # The sum finds candidates; only equality makes two images one.
        candidates = seen.setdefault((*shape, image.sum(dtype=torch.float64).item()), [])
        position = next((p for p in candidates if torch.equal(images[distinct[p]], image)), None)
        if position is None:
            position = len(distinct)
            distinct.append(i)
            candidates.append(position)
        which.append(position)
    return distinct, which
