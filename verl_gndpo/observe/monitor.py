# SPDX-License-Identifier: Apache-2.0
"""Observe the signal of every step: compute metrics, log warnings, record the worst tokens."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils.fs import copy_to_local
from verl.utils.model import get_generation_config
from verl.utils.tokenizer import get_processor_token_id

from verl_gndpo.advantage import Trace
from verl_gndpo.config import GNDPOConfig
from verl_gndpo.families import MEDIA
from verl_gndpo.observe.limits import SignalWarnings
from verl_gndpo.observe.metrics import (
    Tokens,
    describe_classes,
    describe_positions,
    describe_responses,
    describe_signal,
    describe_sources,
    describe_teachers,
    sum_parts,
)
from verl_gndpo.observe.token_classes import classify_tokens, classify_vocabulary
from verl_gndpo.observe.worst_tokens import WorstTokenLog, find_worst, locate, show_in_context

logger = logging.getLogger(__name__)

# Fields of verl's agent loop that the metrics read, if a batch has them.
FIELDS = ["responses", "prompts", "data_source"]


class SignalMonitor:
    """Describes the signal once per step."""

    def __init__(self, config: Any, settings: GNDPOConfig, tokenizer: Any, processor: Any = None):
        """
        Args:
            config: verl's whole config.
            settings: the resolved `algorithm.gndpo`.
            tokenizer, processor: the student's; the processor of a text-only student is None.
        """
        self._settings = settings
        self._tokenizer = tokenizer
        self._table = classify_vocabulary(
            tokenizer.batch_decode([[i] for i in range(len(tokenizer))]),
            special=tokenizer.all_special_ids,
            eos=_eos_ids(config.actor_rollout_ref.model, tokenizer),
            placeholders=[i for medium in MEDIA if (i := get_processor_token_id(processor, medium)) is not None],
        )
        self._warnings = SignalWarnings(settings.warn)
        path = locate(settings.worst_tokens.path, config.trainer.default_local_dir)
        self._log = WorstTokenLog(path, settings.worst_tokens.every)

    def look(
        self,
        batch: KVBatchMeta,
        step: int,
        metrics: dict[str, float],
        *,
        teacher_log_probs: torch.Tensor,
        old_log_probs: torch.Tensor,
        trace: Trace,
        lengths: np.ndarray,
        uids: Sequence[str],
        teachers: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """Describe a step.

        Args:
            batch: the rows of the step, in the order of the tensors.
            step: verl's global step.
            metrics: verl's metrics of this step so far, which warnings may read.
            teacher_log_probs, old_log_probs: (batch, response_length), as the estimator got them.
            trace: what the estimator made of them.
            lengths: (batch,), tokens of each response, including those that the mask hides.
            uids: prompt of each row.
            teachers: teacher of each row; None: one for all.

        Returns:
            The step's metrics, `gndpo/...` (docs/metrics.md).
        """
        tokens = Tokens(trace)
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=FIELDS)
        sources = [str(name) for name in data["data_source"]] if "data_source" in data.keys() else None
        parts = sum_parts(tokens, lengths)
        described = describe_signal(tokens) | describe_positions(parts)
        if teachers is not None:
            described |= describe_teachers(teachers, tokens)
        if sources is not None:
            described |= describe_sources(tokens, parts, sources)
        classes = self._classify(data)
        described |= describe_responses(tokens, lengths, classes)
        if classes is not None:
            if classes.size > tokens.d.size:
                classes = classes[tokens.valid[np.arange(tokens.valid.shape[1]) < lengths[:, None]]]
            described |= describe_classes(tokens, classes)

        flags, texts = self._warnings.check(step, metrics | described)
        for text in texts:
            logger.warning("step %d: %s", step, text)
        if self._log.is_due(step, warned=any(flags.values())):
            end = self._log.write(
                self._describe_worst(step, tokens, teacher_log_probs, old_log_probs, lengths, uids, sources, data)
            )
            if end:
                logger.warning("%s", end)
        return described | flags

    def _classify(self, data: TensorDict) -> np.ndarray | None:
        if "responses" not in data.keys():
            return None
        ids = [data[name] for name in ("responses", "prompts") if name in data.keys()]
        return classify_tokens(
            self._table, *(x.numpy() for part in ids for x in (part.values(), part.offsets().diff()))
        )

    def _describe_worst(
        self,
        step: int,
        tokens: Tokens,
        teacher_log_probs: torch.Tensor,
        old_log_probs: torch.Tensor,
        lengths: np.ndarray,
        uids: Sequence[str],
        sources: Sequence[str] | None,
        data: TensorDict,
    ) -> list[dict]:
        def decode(ids: list[int]) -> str:
            return self._tokenizer.decode(ids, skip_special_tokens=False)

        entries = []
        for rank, (i, row, position) in enumerate(find_worst(tokens, self._settings.worst_tokens.count), 1):
            prompt, response = (
                data[name][row].tolist() if name in data.keys() else [] for name in ("prompts", "responses")
            )
            text = {}
            if response:
                context = show_in_context(prompt, response, position, decode)
                text = {"id": response[position], "text": decode([response[position]]), "context": context}
            entries.append(
                {
                    "step": step,
                    "rank": rank,
                    "uid": uids[row],
                    "data_source": None if sources is None else sources[row],
                    "row": row,
                    "position": position,
                    "response_length": int(lengths[row]),
                    **text,
                    "teacher_log_prob": float(teacher_log_probs[row, position]),
                    "old_log_prob": float(old_log_probs[row, position]),
                    "log_ratio": float(tokens.d[i]),
                    "bounded": float(tokens.k[i]),
                    "advantage": float(tokens.a[i]),
                }
            )
        return entries


def _eos_ids(model: Any, tokenizer: Any) -> set[int]:
    """Return the ids that end a response: the tokenizer's EOS, and those of the generation config that rollouts use."""
    path = copy_to_local(model.get("hf_config_path") or model.path)
    generation = get_generation_config(path, trust_remote_code=model.get("trust_remote_code", False))
    ids = getattr(generation, "eos_token_id", None)
    ids = ids if isinstance(ids, list) else [ids]
    return {i for i in (tokenizer.eos_token_id, *ids) if i is not None}
