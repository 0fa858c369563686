# SPDX-License-Identifier: Apache-2.0
"""The teacher's engine: verl's FSDP engine without optimizer, gradients and full logits.

It computes the log-probs of response tokens. `packing` decides which rows run together, `attention` lets responses to a
prompt continue from one pass over it, and `scoring` projects only what predicts a response token.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FullyShardedDataParallel
from verl.utils.device import get_device_id, get_device_name
from verl.utils.model import extract_multi_modal_inputs
from verl.workers.config import FSDPEngineConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_gndpo.families import family_of
from verl_gndpo.kl import IDS, LOG_PROBS
from verl_gndpo.teacher import self_check
from verl_gndpo.teacher.attention import SharedPromptAttention
from verl_gndpo.teacher.distinct_images import encode_distinct_images
from verl_gndpo.teacher.packing import Layout, PromptGroup, concatenate, group_by_prompt, pack
from verl_gndpo.teacher.rows import (
    check_log_probs,
    check_positions,
    image_inputs,
    rows_with_images_in_response,
    sampled_placeholders,
)
from verl_gndpo.teacher.scoring import ScoringHead
from verl_gndpo.teacher.sequence_parallel import check_sequence_parallel


@dataclass
class TeacherEngineConfig(FSDPEngineConfig):
    """verl's FSDP settings and the teacher's own; see `verl_gndpo.config.TeacherConfig`."""

    logits_chunk_tokens: int = 256
    temperature: float = 1.0
    self_check: bool = True
    attention: str = "sdpa"


@dataclass(frozen=True)
class _Batch:
    """A batch as the engine reads it. Each field has one entry per row."""

    ids: tuple[torch.Tensor, ...]
    positions: tuple[torch.Tensor, ...]
    lengths: list[int]
    """Of the responses, in tokens."""

    images: list[dict[str, Any]]
    sampled: list[torch.Tensor]
    """(length,), where the policy sampled a placeholder of an image."""

    student: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]] | None
    """The student's most likely ids, (response length, k), and their log-probs with the mass of the others,
    (response length, k + 1). None: no KL divergence is wanted."""

    alone: set[int]
    """Rows that must not share their prompt: those with images in their responses."""


@EngineRegistry.register(model_type="teacher", backend=["fsdp", "fsdp2"], device=["cuda", "npu", "cpu"])
class TeacherEngine(FSDPEngineWithLMHead):
    """Scores response tokens under a frozen model.

    `forward_only` stays off in its config: verl's forward-only engines offload every parameter whatever `param_offload`
    says, and upload them again for each micro-batch. Here the weights are uploaded once per call and offloaded after
    it, or stay where they are.
    """

    _ranks_of_row = 1
    """The number of ranks that share a row of tokens (Ulysses sequence parallelism)."""

    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any):
        # The registry is asked for a "teacher"; the base class builds a language model.
        model_config.model_type = "language_model"
        self._ranks_of_row = engine_config.ulysses_sequence_parallel_size
        check_sequence_parallel(model_config.hf_config, self._ranks_of_row)
        # verl wants its own packing for ranks that share a row; see `_init_device_mesh`.
        engine_config.ulysses_sequence_parallel_size = 1
        self._unchecked = engine_config.self_check
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def _init_device_mesh(self) -> None:
        ranks = torch.distributed.get_world_size()
        if ranks % self._ranks_of_row:
            raise ValueError(f"ulysses_sequence_parallel_size={self._ranks_of_row} does not divide {ranks} ranks")
        self.engine_config.ulysses_sequence_parallel_size = self._ranks_of_row
        super()._init_device_mesh()
        # verl's contexts hand this group to its own attention, which must not exchange anything here.
        self._row_group: ProcessGroup | None = self.ulysses_parallel_group
        self.ulysses_parallel_group: ProcessGroup | None = None

    def _build_module(self) -> torch.nn.Module:
        # With more than one, verl would replace forwards of classes, and a student in this process has the same ones.
        self.ulysses_sequence_parallel_size = 1
        try:
            module = super()._build_module()
        finally:
            self.ulysses_sequence_parallel_size = self._ranks_of_row
        config = module.config.get_text_config()
        for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
            if getattr(config, key, None) is not None:
                raise NotImplementedError(
                    f"teacher {self.model_config.path}: its config sets {key}, which changes logits after the output "
                    "projection; the chunked scorer can't reproduce that"
                )
        self._projection = module.get_output_embeddings()
        self.head = ScoringHead(self._projection, self.engine_config.logits_chunk_tokens)
        self._attention = SharedPromptAttention(module, flex=self.engine_config.attention == "flex")
        encode_distinct_images(module)
        self._rotary_axes = "mrope_section" in (getattr(config, "rope_parameters", None) or {})
        self._embedded_ids: torch.Tensor | None = None
        module.get_input_embeddings().register_forward_pre_hook(
            lambda _, ids: ids if self._embedded_ids is None else (self._embedded_ids,)
        )
        return module.requires_grad_(False).eval()

    def _build_optimizer(self, module: torch.nn.Module) -> None:
        return None

    def _build_lr_scheduler(self, optimizer: None) -> None:
        return None

    def forward_backward_batch(self, data: TensorDict, loss_function: None = None, forward_only: bool = True) -> dict:
        """Score a batch, with one pass over each distinct prompt of a micro-batch.

        Args:
            data: nested `input_ids` (batch, length), `position_ids` (batch, length) or (batch, 4, length),
                `response_mask` (batch, response length; 0 where the policy did not sample the token),
                `multi_modal_inputs`, and optionally the student's most likely tokens (`kl.IDS`, `kl.LOG_PROBS`).

        Returns:
            A dict as verl's engines return it. ["model_output"]["teacher_log_probs"] is nested (batch, response
            length), float32, nats, rows in the order of `data`. With the student's most likely tokens there is also
            ["model_output"]["teacher_kl"] of the same shape, KL(student || teacher) at each response token.

        Raises:
            ValueError: a row has other numbers of positions than of ids, log-probs are not finite, or the first call's
                log-probs are not those of a plain forward pass.
        """
        check_positions(data)
        hf_config = self.model_config.hf_config
        batch = _Batch(
            ids=data["input_ids"].unbind(),
            positions=data["position_ids"].unbind(),
            lengths=data["response_mask"].offsets().diff().tolist(),
            images=image_inputs(data),
            sampled=sampled_placeholders(data, hf_config),
            student=(data[IDS].unbind(), data[LOG_PROBS].unbind()) if IDS in data.keys() else None,
            alone=rows_with_images_in_response(data, hf_config),
        )
        groups = group_by_prompt(batch.ids, batch.positions, batch.lengths, batch.images, batch.alone)
        # As in verl, the limit is for one rank, and ranks that share a row add up.
        limit = self.engine_config.infer_max_token_len_per_gpu * self._ranks_of_row
        micro_batches = pack(groups, max(limit, *map(len, batch.ids)))
        count = torch.tensor(len(micro_batches), device=get_device_name())
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX, group=self.get_data_parallel_group())

        columns: list[torch.Tensor] = [torch.empty(0, 1)] * len(batch.ids)
        for number in range(int(count)):
            # A rank with fewer micro-batches repeats its last, because all ranks gather the weights together.
            groups = micro_batches[min(number, len(micro_batches) - 1)]
            members = [row for group in groups for row in group.rows]
            scored = self._score(groups, batch)
            for row, of_row in zip(members, scored.split([batch.lengths[row] for row in members]), strict=True):
                columns[row] = of_row
        scores = [of_row[:, 0] for of_row in columns]
        check_log_probs(data, scores)
        if self._unchecked:
            self._check_itself(data, batch, scores)
            self._unchecked = False
        if self._is_offload_param:
            self._free_gathered_weights()
        output = {"teacher_log_probs": torch.nested.as_nested_tensor(scores, layout=torch.jagged)}
        if batch.student is not None:
            kl = [of_row[:, 1] for of_row in columns]
            output["teacher_kl"] = torch.nested.as_nested_tensor(kl, layout=torch.jagged)
        return {"model_output": output, "loss": [], "metrics": {}}

    def _free_gathered_weights(self) -> None:
        """Free the weights that FSDP1 keeps for the next forward pass: the root's, or all without resharding.

        Otherwise they stay on the accelerator when the shards leave it. FSDP2's modules free theirs when they move.
        """
        if isinstance(self.module, FullyShardedDataParallel):
            for handle in self.module._all_handles:
                if handle.uses_sharded_strategy:
                    handle.reshard(True)

    def _score(self, groups: list[PromptGroup], batch: _Batch) -> torch.Tensor:
        """Score one micro-batch.

        Returns:
            (response tokens, 1) of log-probs, or (response tokens, 2) of log-probs and KL divergences, response by
            response.
        """
        device = get_device_id()
        members = [row for group in groups for row in group.rows]
        layout = Layout(groups, device, self._row_group)
        targets = torch.cat([batch.ids[row][group.prompt :] for group in groups for row in group.rows]).to(device)
        here, places = layout.predicted_here()
        student = None
        if batch.student is not None:
            top_ids, top_log_probs = (torch.cat([x[row] for row in members]) for x in batch.student)
            student = top_ids.to(device)[here].long(), top_log_probs.to(device)[here]
        scoring = self.head.scoring(places, targets[here], self.engine_config.temperature, student)
        with self._attention.attending(layout), scoring:
            scored = self._forward(
                concatenate(groups, batch.ids),
                concatenate(groups, batch.positions),
                # Images of a prompt come once, as its placeholders do.
                [batch.images[group.rows[0]] for group in groups],
                concatenate(groups, batch.sampled),
            ).squeeze(0)
        if self._row_group is None:
            return scored
        # Each rank has scored the tokens that its part of the row predicts.
        whole = torch.zeros(len(targets), scored.shape[1], dtype=scored.dtype, device=scored.device)
        whole[here] = scored
        torch.distributed.all_reduce(whole, group=self._row_group)
        return whole

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, images: list[dict], sampled: torch.Tensor
    ) -> torch.Tensor:
        """Run the model on one row without padding.

        Args:
            ids, sampled: (tokens,).
            positions: (tokens,) or (axes, tokens).
            images: the model's further inputs by name, in the order of their placeholders.

        Returns:
            The model's output `logits`.
        """
        device = get_device_id()
        inputs: dict[str, Any] = extract_multi_modal_inputs(images)
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        ids, positions = ids.to(device).unsqueeze(0), positions.to(device)
        if positions.dim() == 1 and self._rotary_axes:
            # A student that sees no images counts positions on one axis.
            positions = positions.expand(4, -1)
        inputs |= {"input_ids": ids, "attention_mask": None, "use_cache": False}
        inputs["position_ids"] = positions.unsqueeze(1 if positions.dim() == 2 else 0)
        dtype = self._autocast_dtype
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(get_device_name(), dtype=dtype)
        if bool(sampled.any()):
            # A model puts image features wherever it sees the placeholder's id, so it is shown another id. It still
            # embeds the placeholder's own row there, as the rollout engine did when it continued from that token.
            # (verl's own engines, and therefore the student's, fail on such a row.)
            hf_config = self.model_config.hf_config
            taken = set(family_of(hf_config).placeholder_ids(hf_config).values())
            other = next(token_id for token_id in range(len(taken) + 1) if token_id not in taken)
            inputs["input_ids"] = ids.masked_fill(sampled.to(device), other)
            self._embedded_ids = ids
        try:
            with torch.no_grad(), autocast:
                return self.module(**inputs).logits
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

    def _check_itself(self, data: TensorDict, batch: _Batch, scores: list[torch.Tensor]) -> None:
        """Compare the first scores of a row with those of a plain forward pass; see `self_check`.

        Each rank does so once, as all of them gather the weights together.
        """
        row = self_check.choose_row(data)
        prompt, count = len(batch.ids[row]) - batch.lengths[row], min(batch.lengths[row], self_check.TOKENS)
        # Images in a response need all of their placeholders. In other rows, no later token affects a log-prob.
        cut = slice(None) if row in batch.alone else slice(prompt + count)
        places = torch.arange(prompt - 1, prompt - 1 + count, device=get_device_id())
        with self._attention.plainly(), self._projecting_only(places):
            logits = self._forward(
                batch.ids[row][cut], batch.positions[row][..., cut], [batch.images[row]], batch.sampled[row][cut]
            )
        plain = (logits.flatten(0, -2).float() / self.engine_config.temperature).log_softmax(-1)
        targets = batch.ids[row][prompt : prompt + count].to(plain.device)
        self_check.compare(
            data,
            row,
            scores[row][:count].to(plain.device),
            plain.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
            dtype=self._autocast_dtype,
            model=self.model_config.path,
            attention=self._attention.replaced,
        )
