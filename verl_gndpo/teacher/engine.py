# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engine without anything that a teacher does not need: no optimizer, no gradients, no full logits."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from verl.utils.device import get_device_id, get_device_name
from verl.utils.model import extract_multi_modal_inputs
from verl.workers.config import FSDPEngineConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_gndpo.teacher.scoring import DistinctImages, ScoringHead, response_rows


@dataclass
class TeacherEngineConfig(FSDPEngineConfig):
    """verl's FSDP settings plus the teacher's own; see `verl_gndpo.config.TeacherConfig`."""

    pack_sequences: bool = False
    logits_chunk_tokens: int = 256
    temperature: float = 1.0


@EngineRegistry.register(model_type="teacher", backend=["fsdp", "fsdp2"], device=["cuda", "npu", "cpu"])
class TeacherEngine(FSDPEngineWithLMHead):
    """Scores response tokens under a frozen model.

    `forward_only` stays off in its config: verl's forward-only engines offload every parameter whatever `param_offload`
    says, and upload them again for each micro-batch. Here the weights go up once a call and down after it, or stay.
    """

    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config):
        # The registry is asked for a "teacher"; the base class builds a language model.
        model_config.model_type = "language_model"
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def _build_module(self):
        module = super()._build_module()
        config = module.config.get_text_config()
        for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
            if getattr(config, key, None) is not None:
                raise NotImplementedError(
                    f"teacher {self.model_config.path}: its config sets {key}, which changes logits after the output "
                    "projection; the chunked scorer can't reproduce that"
                )
        self.head = ScoringHead(module.get_output_embeddings(), self.engine_config.logits_chunk_tokens)
        tower = getattr(getattr(module, "model", None), "visual", None)
        if tower is not None:
            DistinctImages(tower)
        return module.requires_grad_(False).eval()

    def _build_optimizer(self, module):
        return None

    def _build_lr_scheduler(self, optimizer):
        return None

    def forward_step(self, micro_batch: TensorDict, loss_function, forward_only):
        """Score one micro-batch.

        Args:
            micro_batch: nested `input_ids` (batch, length), `position_ids` (batch, length) or (batch, 4, length),
                `response_mask` (batch, response length: its lengths count, not its values), `multi_modal_inputs`.

        Returns:
            (loss, output) as verl's engines do; output["model_output"]["teacher_log_probs"] is nested
            (batch, response length), float32, nats.
        """
        micro_batch = micro_batch.to(get_device_id())
        ids = micro_batch["input_ids"]
        ends = ids.offsets()[1:]
        response_lengths = micro_batch["response_mask"].offsets().diff()
        token_rows = response_rows(ends, response_lengths)
        inputs = extract_multi_modal_inputs(micro_batch.get("multi_modal_inputs", []))

        if self.engine_config.pack_sequences:
            rows = token_rows
            inputs |= _packed(ids, micro_batch["position_ids"])
        else:
            padded = _padded(ids, micro_batch["position_ids"])
            width = padded["input_ids"].shape[1]
            row_starts = torch.arange(len(ends), device=ends.device) * width
            rows = response_rows(row_starts + ids.offsets().diff(), response_lengths)
            inputs |= padded

        dtype = self._autocast_dtype
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(get_device_name(), dtype=dtype)
        with autocast, self.head.scoring(rows, ids.values()[token_rows + 1], self.engine_config.temperature):
            log_probs = self.module(**inputs, use_cache=False).logits.squeeze(0)

        offsets = micro_batch["response_mask"].offsets()
        output = {"teacher_log_probs": torch.nested.nested_tensor_from_jagged(log_probs, offsets)}
        return log_probs.new_zeros(()), {"model_output": output, "loss": 0.0, "metrics": {}}


def _packed(ids: torch.Tensor, position_ids: torch.Tensor) -> dict:
    """All sequences in one row; the restarting text positions tell the attention where one ends."""
    positions = position_ids.values()
    return {
        "input_ids": ids.values().unsqueeze(0),
        "attention_mask": None,
        "position_ids": positions.unsqueeze(1 if positions.dim() == 2 else 0),
    }


def _padded(ids: torch.Tensor, position_ids: torch.Tensor) -> dict:
    """One row a sequence, padded on the right to the longest."""
    lengths = ids.offsets().diff()
    mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths.unsqueeze(1)

    def pad(values: torch.Tensor) -> torch.Tensor:
        """(..., total tokens) to (..., batch, longest)."""
        out = values.new_zeros(*values.shape[:-1], *mask.shape)
        out[..., mask] = values
        return out

    return {
        "input_ids": pad(ids.values()),
        "attention_mask": mask.to(torch.int64),
        "position_ids": pad(position_ids.values()),
    }
