# SPDX-License-Identifier: Apache-2.0
"""The teacher's engine: verl's FSDP engine without optimizer, gradients and full logits.

It computes the log-probs of response tokens with a `Scorer`, on weights that verl's engine loads, shards and offloads.
"""

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
from verl_gndpo.teacher.architecture import try_teacher, why_weights_are_refused
from verl_gndpo.teacher.packing import concatenable, group_by_prompt, plan
from verl_gndpo.teacher.rows import (
    check_log_probs,
    check_number,
    check_positions,
    image_inputs,
    rows_with_images_in_response,
    sampled_placeholders,
)
from verl_gndpo.teacher.scorer import Rows, Scorer
from verl_gndpo.teacher.scoring import UNCHANGED
from verl_gndpo.teacher.sequence_parallel import check_sequence_parallel
from verl_gndpo.teacher.trial import NotTriedError, TrialError, Verdict
from verl_gndpo.verl_patches.sharding import SHARDED_ALONE


@dataclass
class TeacherEngineConfig(FSDPEngineConfig):
    """verl's FSDP settings and the teacher's own; see `verl_gndpo.config.TeacherConfig`."""

    logits_chunk_tokens: int = 256
    temperature: float = 1.0
    self_check: bool = True
    attention: str = "sdpa"
    sharing: str = "auto"


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
        verdict = self._try_architecture()
        # With more than one, verl would replace forwards of classes, and a student in this process has the same ones.
        self.ulysses_sequence_parallel_size = 1
        try:
            module = super()._build_module()
        finally:
            self.ulysses_sequence_parallel_size = self._ranks_of_row
        self._scorer = Scorer(
            module,
            chunk_tokens=self.engine_config.logits_chunk_tokens,
            temperature=self.engine_config.temperature,
            sharing=verdict.sharing,
            change=verdict.change,
            flex=self.engine_config.attention == "flex",
            concatenate_inputs=extract_multi_modal_inputs,
        )
        self._side_by_side = verdict.side_by_side
        if not verdict.tower_always_runs:
            self._shard_decoder_layers_only(module)
        return module

    def _shard_decoder_layers_only(self, module: Any) -> None:
        """Have FSDP gather all but the decoder's layers with the root of the model, which all ranks run.

        Otherwise a rank whose rows have images would wait for ever for one without.
        """
        towers = family_of(module).find_towers(module).values()
        inside = {id(part) for tower in towers for part in tower.modules()}
        lists = [
            part
            for part in module.get_decoder().modules()
            if isinstance(part, torch.nn.ModuleList) and id(part) not in inside
        ]
        layers = sorted({type(layer).__name__ for layer in max(lists, key=len)})
        setattr(module, SHARDED_ALONE, layers)
        self.engine_config.wrap_policy["transformer_layer_cls_to_wrap"] = layers

    def _try_architecture(self) -> Verdict:
        """Decide how to score, on the first rank, and say so.

        Raises:
            ValueError: the model can't be scored, or not by ranks that share rows.
        """
        outcome: list[Any] = [None]
        if torch.distributed.get_rank() == 0:
            outcome = [self._verdict()]
        torch.distributed.broadcast_object_list(outcome)
        verdict = outcome[0]
        if isinstance(verdict, str):
            raise ValueError(f"teacher {self.model_config.path}: {verdict}")
        if self._ranks_of_row > 1 and verdict.sharing != "attention":
            raise ValueError(
                f"teacher {self.model_config.path}: teacher.ulysses_sequence_parallel_size={self._ranks_of_row} needs "
                f"prompts that are shared through attention, but {verdict}. Set it to 1"
            )
        return verdict

    def _verdict(self) -> Verdict | str:
        """Return how to score the model, or why that is impossible."""
        config, path = self.model_config.hf_config, self.model_config.path
        options = {"sharing": self.engine_config.sharing, "trust_remote_code": self.model_config.trust_remote_code}
        local = self.model_config.local_path
        refused = why_weights_are_refused(config)
        if refused is not None:
            return refused
        try:
            try:
                verdict = try_teacher(config, local, **options)
            except NotTriedError:
                raise
            except TrialError as error:
                # A run without images does without them.
                verdict = try_teacher(config, local, images=False, **options)
                print(f"teacher {path}: rows with images can't be scored: {error}")
        except NotTriedError as error:
            sharing = "attention" if self.engine_config.sharing == "auto" else self.engine_config.sharing
            print(f"teacher {path}: sharing={sharing}, which was not tried before: {error}")
            return Verdict(sharing, True, UNCHANGED)
        except TrialError as error:
            return str(error)
        print(f"teacher {path}: {verdict}")
        return verdict

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
        rows = Rows(
            ids=data["input_ids"].unbind(),
            positions=data["position_ids"].unbind(),
            lengths=data["response_mask"].offsets().diff().tolist(),
            images=image_inputs(data),
            sampled=sampled_placeholders(data, hf_config),
            student=(data[IDS].unbind(), data[LOG_PROBS].unbind()) if IDS in data.keys() else None,
        )
        # A group brings its images once, as its prompt does, so a row with images in its response is one of its own.
        alone = rows_with_images_in_response(data, hf_config)
        groups = group_by_prompt(rows.ids, rows.positions, rows.lengths, rows.images, alone)
        # As in verl, the limit is for one rank, and ranks that share a row add up.
        limit = self.engine_config.infer_max_token_len_per_gpu * self._ranks_of_row
        limit = max(limit, *map(len, rows.ids)) if self._side_by_side else 1
        passes = [
            step
            for together in concatenable(groups, rows.images)
            for step in plan(together, self._scorer.sharing, limit, alone)
        ]
        count = torch.tensor(len(passes), device=get_device_name())
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX, group=self.get_data_parallel_group())

        columns: list[torch.Tensor] = [torch.empty(0, 1)] * len(rows.ids)
        for number in range(int(count)):
            # A rank with fewer passes repeats its last, because all ranks gather the weights together.
            step = passes[min(number, len(passes) - 1)]
            scored = self._scorer.score(
                self.module,
                step,
                rows,
                device=get_device_id(),
                dtype=self._autocast_dtype,
                process_group=self._row_group,
            )
            lengths = [rows.lengths[row] for row in step.rows]
            check_number(data, step.rows, lengths, len(scored))
            for row, of_row in zip(step.rows, scored.split(lengths), strict=True):
                columns[row] = of_row
        self._scorer.forget()
        scores = [of_row[:, 0] for of_row in columns]
        check_log_probs(data, scores)
        if self._unchecked:
            self._check_itself(data, rows, alone, scores)
            self._unchecked = False
        if self._is_offload_param or self.engine_config.reshard_after_forward:
            self._free_gathered_weights()
        output = {"teacher_log_probs": torch.nested.as_nested_tensor(scores, layout=torch.jagged)}
        if rows.student is not None:
            kl = [of_row[:, 1] for of_row in columns]
            output["teacher_kl"] = torch.nested.as_nested_tensor(kl, layout=torch.jagged)
        return {"model_output": output, "loss": [], "metrics": {}}

    def _free_gathered_weights(self) -> None:
        """Free the weights that FSDP1 keeps for the next forward pass: the root's, or all without resharding.

        Otherwise they stay on the accelerator when the shards leave it, or until the next call. FSDP2's modules free
        theirs when they move.
        """
        if isinstance(self.module, FullyShardedDataParallel):
            for handle in self.module._all_handles:
                if handle.uses_sharded_strategy:
                    handle.reshard(True)

    def _check_itself(self, data: TensorDict, rows: Rows, alone: set[int], scores: list[torch.Tensor]) -> None:
        """Compare the first scores of a row with those of a plain forward pass; see `self_check`.

        Each rank does so once, as all of them gather the weights together.
        """
        row = self_check.choose_row(data)
        count = min(rows.lengths[row], self_check.TOKENS)
        # Images in a response need all of their placeholders. In other rows, no later token affects a log-prob.
        plain = self._scorer.score_plainly(
            self.module,
            row,
            rows,
            count,
            whole=row in alone,
            device=get_device_id(),
            dtype=self._autocast_dtype,
        )
        self_check.compare(
            data,
            row,
            scores[row][:count].to(plain.device),
            plain,
            dtype=self._autocast_dtype,
            model=self.model_config.path,
            attention=self._scorer.model_attention,
        )
