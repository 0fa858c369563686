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

from verl_gndpo.teacher.scoring import DistinctImages, ScoringHead
from verl_gndpo.teacher.shared_prompt import Family, Layout, attending, find_families, pack, share_prompts


def image_inputs(data: TensorDict) -> list[dict]:
    """What each row of a batch brings of images, by the names of the model's inputs; empty without any."""
    rows = data.get("multi_modal_inputs", [{}] * len(data))
    return [getattr(inputs, "data", inputs) or {} for inputs in rows]


@dataclass
class TeacherEngineConfig(FSDPEngineConfig):
    """verl's FSDP settings plus the teacher's own; see `verl_gndpo.config.TeacherConfig`."""

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
        share_prompts(module)
        tower = getattr(getattr(module, "model", None), "visual", None)
        if tower is not None:
            DistinctImages(tower)
        return module.requires_grad_(False).eval()

    def _build_optimizer(self, module):
        return None

    def _build_lr_scheduler(self, optimizer):
        return None

    def forward_backward_batch(self, data: TensorDict, loss_function=None, forward_only=True) -> dict:
        """Score a batch, each distinct prompt of a micro-batch once.

        Args:
            data: nested `input_ids` (batch, length), `position_ids` (batch, length) or (batch, 4, length),
                `response_mask` (batch, response length: its lengths count, not its values), `multi_modal_inputs`.

        Returns:
            As verl's engines do; ["model_output"]["teacher_log_probs"] is nested (batch, response length), float32,
            nats, in the order of `data`.
        """
        ids, positions = data["input_ids"].unbind(), data["position_ids"].unbind()
        lengths = data["response_mask"].offsets().diff().tolist()
        images = image_inputs(data)
        longest = max(map(len, ids))
        micro_batches = pack(
            find_families(ids, positions, lengths, images),
            max(self.engine_config.infer_max_token_len_per_gpu, longest),
        )
        count = torch.tensor(len(micro_batches), device=get_device_name())
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX, group=self.get_data_parallel_group())

        scores = [None] * len(ids)
        for number in range(int(count)):
            # A rank that has fewer repeats its last: every rank has to take part in gathering the weights.
            families = micro_batches[min(number, len(micro_batches) - 1)]
            rows = [row for family in families for row in family.rows]
            log_probs = self._score(families, ids, positions, images)
            for row, scored in zip(rows, log_probs.split([lengths[row] for row in rows]), strict=True):
                scores[row] = scored
        nested = torch.nested.as_nested_tensor(scores, layout=torch.jagged)
        return {"model_output": {"teacher_log_probs": nested}, "loss": [], "metrics": {}}

    def _score(self, families: list[Family], ids, positions, images: list[dict]) -> torch.Tensor:
        """Log-probs of the response tokens of one micro-batch, (tokens,), response by response."""
        device = get_device_id()
        layout = Layout(families, device)

        def row(values) -> torch.Tensor:
            """(..., length) of each sequence to (..., tokens of the micro-batch)."""
            parts = []
            for family in families:
                parts.append(values[family.rows[0]][..., : family.prompt])
                parts += [values[member][..., family.prompt :] for member in family.rows]
            return torch.cat(parts, -1).to(device)

        targets = torch.cat([ids[member][family.prompt :] for family in families for member in family.rows])
        packed_ids, packed_positions = row(ids).unsqueeze(0), row(positions)
        # Images of a prompt come once, as its placeholders do.
        inputs = extract_multi_modal_inputs([images[family.rows[0]] for family in families])
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        inputs |= {"input_ids": packed_ids, "attention_mask": None, "use_cache": False}
        inputs["position_ids"] = packed_positions.unsqueeze(1 if packed_positions.dim() == 2 else 0)

        dtype = self._autocast_dtype
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(get_device_name(), dtype=dtype)
        scoring = self.head.scoring(layout.predicting, targets.to(device), self.engine_config.temperature)
        with torch.no_grad(), autocast, attending(layout), scoring:
            log_probs = self.module(**inputs).logits.squeeze(0)
        layers = self.module.config.get_text_config().num_hidden_layers
        if layout.calls != layers:
            raise NotImplementedError(
                f"teacher {self.model_config.path}: {layout.calls} of its {layers} layers use the attention that "
                "transformers was told to use, so responses to one prompt would see each other"
            )
        return log_probs
