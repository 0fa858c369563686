# SPDX-License-Identifier: Apache-2.0
"""Log-probs of response tokens without the logits of anything else, and without encoding an image twice.

Only the rows of the last hidden state that predict a response token go through the output projection, `chunk_tokens` at
a time, so that the peak is chunk_tokens x vocabulary whatever the prompt, the image or the batch.
"""

from contextlib import contextmanager
from typing import Any

import torch


def token_log_probs(logits: torch.Tensor, token_ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits / temperature)[token] in float32: (tokens, vocabulary) and (tokens,) to (tokens,), nats.

    Overwrites `logits`: without further copies of them it is an eighth faster, and its peak is theirs alone.
    """
    logits = logits.float()
    if temperature != 1.0:
        logits = logits.div_(temperature)
    peak = logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, token_ids.unsqueeze(-1))
    return (chosen - peak).squeeze(-1) - logits.sub_(peak).exp_().sum(-1).log()


class ScoringHead:
    """Makes a model's output projection return log-probs of given tokens instead of logits.

    Hugging Face models, and verl's variants of them, end in `logits = self.lm_head(hidden_states)`. The projection's
    own forward is replaced on the instance: the parameters keep their names, and FSDP has gathered them when it runs,
    whichever way the model is sharded.
    """

    def __init__(self, lm_head: torch.nn.Module, chunk_tokens: int):
        self._project = lm_head.forward
        self._chunk_tokens = chunk_tokens
        self._request: tuple[torch.Tensor, torch.Tensor, float] | None = None
        lm_head.forward = self._forward

    @contextmanager
    def scoring(self, rows: torch.Tensor, token_ids: torch.Tensor, temperature: float):
        """Within this context a forward of the model returns, as `logits`, (1, rows) float32 log-probs in nats.

        Args:
            rows: (tokens,), rows of the hidden state flattened to (rows, hidden_size).
            token_ids: (tokens,), the token that each row is to predict.
            temperature: divides the logits.
        """
        self._request = (rows, token_ids, temperature)
        try:
            yield
        finally:
            self._request = None

    def _forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self._request is None:
            return self._project(hidden_states)
        rows, token_ids, temperature = self._request
        hidden = hidden_states.flatten(0, -2)
        out = torch.empty(len(rows), dtype=torch.float32, device=hidden.device)
        for i in range(0, len(rows), self._chunk_tokens):
            chunk = slice(i, i + self._chunk_tokens)
            out[chunk] = token_log_probs(self._project(hidden[rows[chunk]]), token_ids[chunk], temperature)
        return out.unsqueeze(0)


class DistinctImages:
    """Lets a vision tower of the Qwen-VL kind encode each distinct image of a call once.

    The n responses to a prompt each bring a copy of its images. As with `ScoringHead`, the tower's own forward is
    replaced on the instance: it takes `pixel_values` (patches, features) and `grid_thw` (images, 3), and what it
    returns holds rows of patches or of merged tokens, image by image.
    """

    def __init__(self, tower: torch.nn.Module):
        self._encode = tower.forward
        self._patches_per_token = tower.spatial_merge_size**2
        tower.forward = self._forward

    def _forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, **options):
        patches = grid_thw.prod(-1).tolist()
        images = pixel_values.split(patches)
        distinct, which = _distinct(images, grid_thw)
        if len(distinct) == len(images):
            return self._encode(pixel_values, grid_thw=grid_thw, **options)
        encoded = self._encode(torch.cat([images[i] for i in distinct]), grid_thw=grid_thw[distinct], **options)
        patches = [patches[i] for i in distinct]
        return self._repeat(encoded, patches, which)

    def _repeat(self, encoded: Any, patches: list[int], which: list[int]):
        """Give each image of the call the rows of the distinct image that it equals."""
        if isinstance(encoded, torch.Tensor):
            rows = patches if len(encoded) == sum(patches) else [n // self._patches_per_token for n in patches]
            parts = encoded.split(rows)
            return torch.cat([parts[i] for i in which])
        if isinstance(encoded, dict):
            return type(encoded)(**{key: self._repeat(value, patches, which) for key, value in encoded.items()})
        if isinstance(encoded, list | tuple):
            return type(encoded)(self._repeat(value, patches, which) for value in encoded)
        return encoded


def _distinct(images: tuple[torch.Tensor, ...], grid_thw: torch.Tensor) -> tuple[list[int], list[int]]:
    """Indices of the distinct images, and for each image the position of its equal among them."""
    distinct, which = [], []
    seen: dict[tuple, list[int]] = {}
    for i, (image, grid) in enumerate(zip(images, grid_thw.tolist(), strict=True)):
        # The sum finds candidates; only equality makes two images one.
        candidates = seen.setdefault((*grid, image.sum(dtype=torch.float64).item()), [])
        position = next((p for p in candidates if torch.equal(images[distinct[p]], image)), None)
        if position is None:
            position = len(distinct)
            distinct.append(i)
            candidates.append(position)
        which.append(position)
    return distinct, which
