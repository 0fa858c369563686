# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engine without anything that a teacher does not need: no optimizer, no gradients, no full logits."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed.fsdp import FullyShardedDataParallel
from verl.utils.device import get_device_id, get_device_name
from verl.utils.model import extract_multi_modal_inputs
from verl.workers.config import FSDPEngineConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_gndpo.kl import IDS, LOG_PROBS
from verl_gndpo.teacher.attention import (
    Family,
    Layout,
    attending,
    attending_plainly,
    check_sequence_parallel,
    find_families,
    pack,
    share_prompts,
)
from verl_gndpo.teacher.rows import (
    check_log_probs,
    check_positions,
    holds_images_in_response,
    image_inputs,
    name_of,
    placeholder_ids,
    sampled_placeholders,
)
from verl_gndpo.teacher.scoring import ScoringHead, encode_distinct_images

SELF_CHECK_TOKENS = 8

# In nats, by dtype. In float32 two ways to add up the same numbers differ by some 1e-5, so each token is held to 1e-3.
# bfloat16 has 8 bits: logits of 16 to 32 are multiples of 1/8, so that rounding them once moves a log-prob by up to
# 1/16, and the layers before add as much again: 28 layers of random weights differ by up to 0.5 at single tokens, and
# by up to 0.18 in the mean of 8, which is therefore what counts there. A wrong mask, position or image moves it by
# far more. float16 has three bits more.
SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


@dataclass
class TeacherEngineConfig(FSDPEngineConfig):
    """verl's FSDP settings plus the teacher's own; see `verl_gndpo.config.TeacherConfig`."""

    logits_chunk_tokens: int = 256
    temperature: float = 1.0
    self_check: bool = True
    attention: str = "sdpa"


@dataclass(frozen=True)
class _Rows:
    """A batch as the engine reads it; all by row."""

    ids: tuple[torch.Tensor, ...]
    positions: tuple[torch.Tensor, ...]
    lengths: list[int]
    """Of the responses, in tokens."""

    images: list[dict]
    sampled: list[torch.Tensor]
    """(length,), where the policy sampled a placeholder of an image."""

    student: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]] | None
    """(response length, k) and (response length, k + 1): the student's most likely ids, and their log-probs with the
    mass of the others. None: no KL divergence is wanted."""


@EngineRegistry.register(model_type="teacher", backend=["fsdp", "fsdp2"], device=["cuda", "npu", "cpu"])
class TeacherEngine(FSDPEngineWithLMHead):
    """Scores response tokens under a frozen model.

    `forward_only` stays off in its config: verl's forward-only engines offload every parameter whatever `param_offload`
    says, and upload them again for each micro-batch. Here the weights go up once a call and down after it, or stay.
    """

    _ranks_of_row = 1
    """Ranks that share a row of tokens (Ulysses sequence parallelism)."""

    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config):
        # The registry is asked for a "teacher"; the base class builds a language model.
        model_config.model_type = "language_model"
        check_sequence_parallel(model_config.hf_config, engine_config.ulysses_sequence_parallel_size)
        # verl wants its own packing for ranks that share a row; see `_init_device_mesh`.
        self._ranks_of_row, engine_config.ulysses_sequence_parallel_size = (
            engine_config.ulysses_sequence_parallel_size,
            1,
        )
        self._unchecked = engine_config.self_check
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def _init_device_mesh(self):
        ranks = torch.distributed.get_world_size()
        if ranks % self._ranks_of_row:
            raise ValueError(f"ulysses_sequence_parallel_size={self._ranks_of_row} does not divide {ranks} ranks")
        self.engine_config.ulysses_sequence_parallel_size = self._ranks_of_row
        super()._init_device_mesh()
        # verl's contexts make this group known to its own attention, which must not exchange anything here.
        self._row_group, self.ulysses_parallel_group = self.ulysses_parallel_group, None

    def _build_module(self):
        # With more than one, verl would replace forwards of classes: those of a student in this process, too.
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
        self._plain_attention = share_prompts(module)
        encode_distinct_images(module)
        self._rotary_axes = "mrope_section" in (getattr(config, "rope_parameters", None) or {})
        self._embedded_ids: torch.Tensor | None = None
        module.get_input_embeddings().register_forward_pre_hook(
            lambda _, ids: ids if self._embedded_ids is None else (self._embedded_ids,)
        )
        return module.requires_grad_(False).eval()

    def _build_optimizer(self, module):
        return None

    def _build_lr_scheduler(self, optimizer):
        return None

    def forward_backward_batch(self, data: TensorDict, loss_function=None, forward_only=True) -> dict:
        """Score a batch, each distinct prompt of a micro-batch once.

        Args:
            data: nested `input_ids` (batch, length), `position_ids` (batch, length) or (batch, 4, length),
                `response_mask` (batch, response length: 0 where the policy did not sample the token),
                `multi_modal_inputs`, and possibly the student's most likely tokens (`top_k.IDS`, `top_k.LOG_PROBS`).

        Returns:
            As verl's engines do; ["model_output"]["teacher_log_probs"] is nested (batch, response length), float32,
            nats, in the order of `data`. With the student's most likely tokens, so is ["teacher_kl"], the KL divergence
            of student and teacher at each response token.

        Raises:
            ValueError: other numbers of positions than of ids, or log-probs that are not finite, or on the first call
                not those of a plain forward pass.
        """
        check_positions(data)
        hf_config = self.model_config.hf_config
        rows = _Rows(
            ids=data["input_ids"].unbind(),
            positions=data["position_ids"].unbind(),
            lengths=data["response_mask"].offsets().diff().tolist(),
            images=image_inputs(data),
            sampled=sampled_placeholders(data, hf_config),
            student=(data[IDS].unbind(), data[LOG_PROBS].unbind()) if IDS in data.keys() else None,
        )
        alone = {row for row, holds in enumerate(holds_images_in_response(data, hf_config)) if holds}
        families = find_families(rows.ids, rows.positions, rows.lengths, rows.images, alone)
        # As in verl, the limit is a rank's, and the ranks that share a row have that together.
        limit = self.engine_config.infer_max_token_len_per_gpu * self._ranks_of_row
        micro_batches = pack(families, max(limit, *map(len, rows.ids)))
        count = torch.tensor(len(micro_batches), device=get_device_name())
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX, group=self.get_data_parallel_group())

        columns: list[torch.Tensor] = [torch.empty(0, 1)] * len(rows.ids)
        for number in range(int(count)):
            # A rank that has fewer repeats its last: every rank has to take part in gathering the weights.
            families = micro_batches[min(number, len(micro_batches) - 1)]
            members = [row for family in families for row in family.rows]
            scored = self._score(families, rows)
            for row, of_row in zip(members, scored.split([rows.lengths[row] for row in members]), strict=True):
                columns[row] = of_row
        scores = [of_row[:, 0] for of_row in columns]
        check_log_probs(data, scores)
        if self._unchecked:
            self._check_itself(data, rows, scores, alone)
            self._unchecked = False
        if self._is_offload_param:
            self._free_gathered_weights()
        output = {"teacher_log_probs": torch.nested.as_nested_tensor(scores, layout=torch.jagged)}
        if rows.student is not None:
            kl = [of_row[:, 1] for of_row in columns]
            output["teacher_kl"] = torch.nested.as_nested_tensor(kl, layout=torch.jagged)
        return {"model_output": output, "loss": [], "metrics": {}}

    def _free_gathered_weights(self) -> None:
        """Let FSDP1 free what it keeps for the next forward pass: the root's weights, or all without resharding.

        They would stay on the accelerator when the shards leave it. (FSDP2's modules free theirs when they move.)
        """
        if isinstance(self.module, FullyShardedDataParallel):
            for handle in self.module._all_handles:
                if handle.uses_sharded_strategy:
                    handle.reshard(True)

    def _score(self, families: list[Family], rows: _Rows) -> torch.Tensor:
        """Of the response tokens of one micro-batch, response by response: (tokens, 1) of log-probs, or (tokens, 2) of
        log-probs and KL divergences."""
        # Images of a prompt come once, as its placeholders do.
        images = [rows.images[family.rows[0]] for family in families]
        layout = Layout(families, get_device_id(), self._row_group, self.engine_config.attention == "flex")

        def packed(values) -> torch.Tensor:
            """(..., length) of each sequence to (..., tokens of the micro-batch)."""
            parts = []
            for family in families:
                parts.append(values[family.rows[0]][..., : family.prompt])
                parts += [values[member][..., family.prompt :] for member in family.rows]
            return torch.cat(parts, -1)

        targets = torch.cat([rows.ids[member][family.prompt :] for family in families for member in family.rows])
        targets = targets.to(get_device_id())
        here, places = layout.predicted_here()
        student = None
        if rows.student is not None:
            members = [member for family in families for member in family.rows]
            top_ids, top_log_probs = (torch.cat([x[member] for member in members]) for x in rows.student)
            student = top_ids.to(get_device_id())[here].long(), top_log_probs.to(get_device_id())[here]
        scoring = self.head.scoring(places, targets[here], self.engine_config.temperature, student)
        with attending(layout), scoring:
            scored = self._forward(packed(rows.ids), packed(rows.positions), images, packed(rows.sampled)).squeeze(0)
        layers = self.module.config.get_text_config().num_hidden_layers
        if layout.calls != layers:
            raise NotImplementedError(
                f"teacher {self.model_config.path}: {layout.calls} of its {layers} layers use the attention that "
                "transformers was told to use, so responses to one prompt would see each other"
            )
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
            images: the model's further inputs by name, in the order of the placeholders.

        Returns:
            What the model calls its logits.
        """
        device = get_device_id()
        inputs: dict[str, Any] = extract_multi_modal_inputs(images)
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        ids, positions = ids.to(device).unsqueeze(0), positions.to(device)
        if positions.dim() == 1 and self._rotary_axes:
            # As a student that sees no images counts them.
            positions = positions.expand(4, -1)
        inputs |= {"input_ids": ids, "attention_mask": None, "use_cache": False}
        inputs["position_ids"] = positions.unsqueeze(1 if positions.dim() == 2 else 0)
        dtype = self._autocast_dtype
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(get_device_name(), dtype=dtype)
        if bool(sampled.any()):
            # A model puts image features wherever it sees the placeholder's id, so it is shown another one. What it
            # embeds there is still the placeholder's own row: as the rollout engine, which knows where its images are,
            # did when it continued from that token. (verl's own engines, so the student's, fail on such a row.)
            taken = set(placeholder_ids(self.model_config.hf_config).values())
            other = next(token_id for token_id in range(len(taken) + 1) if token_id not in taken)
            inputs["input_ids"] = ids.masked_fill(sampled.to(device), other)
            self._embedded_ids = ids
        try:
            with torch.no_grad(), autocast:
                return self.module(**inputs).logits
        finally:
            self._embedded_ids = None

    @contextmanager
    def _projecting_only(self, places: torch.Tensor):
        """Within this context the model returns the logits of these places of its row, and of no others."""
        hook = self._projection.register_forward_pre_hook(lambda _, hidden: (hidden[0].flatten(0, -2)[places],))
        try:
            yield
        finally:
            hook.remove()

    def _check_itself(self, data: TensorDict, rows: _Rows, scores: list[torch.Tensor], alone: set[int]) -> None:
        """Compare the first scores of a row with those of a plain forward pass: transformers' own attention, the row
        alone, on one rank, and a log-softmax over all logits of these places.

        Each rank does so once, as all have to gather the weights. The row has the shortest prompt; rows that verl added
        as padding, of which no token was sampled, only if there is nothing else.

        Raises:
            ValueError: they differ by more than rounding explains.
        """
        masks = [bool(mask.any()) for mask in data["response_mask"].unbind()]
        row = min(range(len(scores)), key=lambda row: (not masks[row], len(rows.ids[row]) - rows.lengths[row]))
        prompt, count = len(rows.ids[row]) - rows.lengths[row], min(rows.lengths[row], SELF_CHECK_TOKENS)
        # Images in a response need all of their placeholders; what comes after a token has no say in its log-prob.
        cut = slice(None) if row in alone else slice(prompt + count)
        places = torch.arange(prompt - 1, prompt - 1 + count, device=get_device_id())
        with attending_plainly(self.module, self._plain_attention), self._projecting_only(places):
            logits = self._forward(
                rows.ids[row][cut], rows.positions[row][..., cut], [rows.images[row]], rows.sampled[row][cut]
            )
        plain = (logits.flatten(0, -2).float() / self.engine_config.temperature).log_softmax(-1)
        targets = rows.ids[row][prompt : prompt + count].to(plain.device)
        expected = plain.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        difference = (scores[row][:count].to(plain.device) - expected).abs()

        largest = difference.amax() if count else difference.new_zeros(())
        summary = torch.stack([largest, difference.new_tensor(count)])
        summaries = [torch.empty_like(summary) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(summaries, summary)
        if self.rank == 0:
            differences, counts = torch.stack(summaries).unbind(1)
            print(
                f"teacher {self.model_config.path}: {int(counts.sum())} log-probs of the first batch differ by at most "
                f"{differences.max():.2g} nats from a plain forward pass ({self._plain_attention} attention)"
            )
        dtype = self._autocast_dtype
        tolerance, each = SELF_CHECK_TOLERANCE[dtype], dtype == torch.float32
        measured = largest if each or not count else difference.mean()
        if not measured <= tolerance:
            token = int(difference.nan_to_num(float("inf")).argmax())
            raise ValueError(
                f"{name_of(data, row)}: the teacher's self-check failed. Token {token} of the response (id "
                f"{int(targets[token])}) has the log-prob {scores[row][token].item():.6f} in the packed batch and "
                f"{expected[token].item():.6f} in a plain forward pass of its row. In {str(dtype).split('.')[-1]} "
                f"{'a token' if each else f'the mean over {count} tokens'} may differ by {tolerance} nats, and here it "
                f"is {measured.item():.3g}: the model does more with its inputs or in its attention than this teacher "
                "reproduces, and its scores would be wrong. teacher.self_check=False runs without this check"
            )
