# SPDX-License-Identifier: Apache-2.0
"""The student's engine: verl's FSDP engine with another layout of micro-batches and another output projection.

A micro-batch is one row of tokens, in which a prompt and its images stand once before all of its responses (`packing`
of the teacher). Logits are made for response tokens only, some at a time (`projection`). Everything else is verl's:
optimizer, checkpoints, offload, weight sync, LoRA, gradient checkpointing and losses.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.model import extract_multi_modal_inputs
from verl.workers.config import FSDPEngineConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine.utils import postprocess_batch_func

from verl_gndpo.config import ConfigError
from verl_gndpo.kl import IDS, LOG_PROBS, REQUEST
from verl_gndpo.student.architecture import why_prompts_are_not_shared
from verl_gndpo.student.micro_batches import MicroBatch, numbered, plan_micro_batches, split_into
from verl_gndpo.student.projection import Request, ResponseHead
from verl_gndpo.student.run import MODEL_TYPE
from verl_gndpo.teacher.attention import SharedPromptAttention
from verl_gndpo.teacher.distinct_images import encode_distinct_images
from verl_gndpo.teacher.packing import Layout, PromptGroup, concatenate, group_by_prompt
from verl_gndpo.teacher.rows import image_inputs, rows_with_images_in_response


@dataclass
class StudentEngineConfig(FSDPEngineConfig):
    """verl's FSDP settings and the student's own; see `verl_gndpo.config.StudentSection`."""

    logits_chunk_tokens: int = 256
    attention: str = "sdpa"


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp", "fsdp2"], device=["cuda", "npu", "cpu"])
class StudentEngine(FSDPEngineWithLMHead):
    """Runs each prompt and image of a micro-batch once, in log-prob passes and in updates.

    A model that can't share prompts runs as in verl's engine, and the log says why.
    """

    _attention: SharedPromptAttention | None = None
    """None if the model can't share prompts."""

    _groups: Sequence[PromptGroup] = ()
    """Of the micro-batch that runs."""

    _layout: Layout
    _inputs: dict[str, Any]
    """Of the model, for the micro-batch that runs."""

    use_remove_padding: bool

    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any):
        # The registry is asked for this engine; the base class builds a language model.
        model_config.model_type = "language_model"
        if engine_config.ulysses_sequence_parallel_size > 1:
            raise ConfigError(
                "student.share_prompts=True does not support Ulysses sequence parallelism, and "
                f"ulysses_sequence_parallel_size is {engine_config.ulysses_sequence_parallel_size}",
                "actor_rollout_ref.actor.ulysses_sequence_parallel_size=1",
            )
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def _build_module(self) -> torch.nn.Module:
        outcome: list[str | None] = [self._why_prompts_are_not_shared() if self.rank == 0 else None]
        torch.distributed.broadcast_object_list(outcome)
        (reason,) = outcome
        if reason is not None:
            if self.rank == 0:
                print(f"student {self.model_config.path}: each response runs with its own prompt: {reason}")
            return super()._build_module()
        # verl's padding removal replaces the attention by its own; here rows are packed without padding, too.
        packed, self.use_remove_padding = self.use_remove_padding, False
        try:
            module = super()._build_module()
        finally:
            self.use_remove_padding = packed
        self._head = ResponseHead(module.get_output_embeddings(), self.engine_config.logits_chunk_tokens)
        self._attention = SharedPromptAttention(module, flex=self.engine_config.attention == "flex")
        encode_distinct_images(module)
        if self.rank == 0:
            print(f"student {self.model_config.path}: responses share their prompt through attention")
        return module

    def _why_prompts_are_not_shared(self) -> str | None:
        """Return why this model runs as in verl's engine; None if it shares prompts."""
        config = self.model_config
        return why_prompts_are_not_shared(
            config.hf_config, config.local_path, trust_remote_code=config.trust_remote_code
        )

    def _build_lora_module(self, module: Any) -> Any:
        projection = module.get_output_embeddings()
        module = super()._build_lora_module(module)
        if self._attention is not None and module.get_output_embeddings() is not projection:
            raise ConfigError(
                "student.share_prompts=True does not support LoRA adapters, or a copy, of the output projection; "
                "actor_rollout_ref.model.target_modules names it"
            )
        return module

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable | None, forward_only: bool = False
    ) -> dict[str, Any]:
        """Run a mini-batch, prompt by prompt; arguments and result are those of verl's engine.

        Log-probs, and entropies if they are asked for, are those of response tokens. At the places of prompts they are
        0, where nothing of verl reads them.
        """
        if self._attention is None:
            return super().forward_backward_batch(data, loss_function, forward_only)
        group = self.get_data_parallel_group()
        tokens = data["loss_mask"].sum().to(get_device_id())
        torch.distributed.all_reduce(tokens, group=group)
        tu.assign_non_tensor(data, batch_num_tokens=tokens.item(), dp_size=self.get_data_parallel_size(), sp_size=1)
        batches = self._micro_batches(data)
        outputs = []
        for number, batch in enumerate(batches):
            rows, self._groups = numbered(batch)
            micro_batch = tu.index_select_tensor_dict(data, rows)
            self._layout = Layout(self._groups, get_device_id())
            last = number == len(batches) - 1
            synchronized = nullcontext() if forward_only else self._gradient_sync_context(is_last_micro_batch=last)
            no_grad = torch.no_grad() if forward_only else nullcontext()
            # Until the backward pass is over, in which gradient checkpointing runs the attention again.
            with no_grad, synchronized, self._attention.attending(self._layout):
                loss, output = self.forward_step(micro_batch, loss_function=loss_function, forward_only=forward_only)
                if not forward_only:
                    (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                    if not tu.get_non_tensor_data(data, "return_model_output", default=False):
                        output.pop("model_output", None)
            outputs.append(output)
        # verl restores the order of rows of dynamic micro-batches only, and these are, whatever limited them.
        tu.assign_non_tensor(data, use_dynamic_bsz=True)
        return postprocess_batch_func(outputs, [numbered(batch)[0] for batch in batches], data)

    def _micro_batches(self, data: TensorDict) -> list[MicroBatch]:
        """Return this rank's micro-batches, as many as every other rank's."""
        images = image_inputs(data)
        groups = group_by_prompt(
            data["input_ids"].unbind(),
            data["position_ids"].unbind(),
            _response_lengths(data),
            images,
            rows_with_images_in_response(data, self.model_config.hf_config),
        )
        if tu.get_non_tensor_data(data, "use_dynamic_bsz", default=True):
            batches = plan_micro_batches(groups, images, max_tokens=data["max_token_len_per_gpu"])
        else:
            batches = plan_micro_batches(groups, images, max_rows=data["micro_batch_size_per_gpu"])
        count = torch.tensor(len(batches), device=get_device_name())
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX, group=self.get_data_parallel_group())
        return split_into(batches, int(count))

    def forward_step(
        self, micro_batch: TensorDict, loss_function: Callable | None, forward_only: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        if self._attention is None:
            return super().forward_step(micro_batch, loss_function, forward_only)
        # From the host's copy of the batch, because values on an accelerator would have to be waited for.
        self._inputs = self._model_inputs(micro_batch)
        with self._head.answering(self._request(micro_batch)):
            return super().forward_step(micro_batch, loss_function, forward_only)

    def _request(self, micro_batch: TensorDict) -> Request:
        """Return what the output projection computes for a micro-batch."""
        flags = ("calculate_entropy", "calculate_sum_pi_squared", "distillation_use_topk")
        entropy, squares, top_k_distillation = (tu.get_non_tensor_data(micro_batch, name, False) for name in flags)
        if top_k_distillation:
            raise ConfigError(
                "student.share_prompts=True does not support verl's distillation on the teacher's top-k tokens, which "
                "needs all logits",
                "student.share_prompts=False",
            )
        lengths = self._lengths()
        temperature = micro_batch["temperature"]
        if isinstance(temperature, torch.Tensor):
            temperature = temperature.float().repeat_interleave(torch.tensor(lengths, device=temperature.device))
        rows = zip(micro_batch["input_ids"].unbind(), lengths, strict=True)
        return Request(
            rows=self._layout.predicting,
            ids=torch.cat([ids[len(ids) - length :] for ids, length in rows]).to(get_device_id()),
            temperature=temperature,
            entropy=bool(entropy),
            sum_pi_squared=bool(squares),
            top_k=tu.get_non_tensor_data(micro_batch, REQUEST, None),
        )

    def _lengths(self) -> list[int]:
        """Return the lengths of the responses of the micro-batch that runs, in tokens."""
        return [length for group in self._groups for length in group.responses]

    def _model_inputs(self, micro_batch: TensorDict) -> dict[str, Any]:
        """Return the inputs of the model for a micro-batch."""
        images = image_inputs(micro_batch)
        ids, positions = (concatenate(self._groups, micro_batch[n].unbind()) for n in ("input_ids", "position_ids"))
        return {
            "input_ids": ids.unsqueeze(0).to(get_device_id()),
            "attention_mask": None,
            "position_ids": positions.unsqueeze(-2).to(get_device_id()),
            # Images of a prompt come once, as its placeholders do.
            **extract_multi_modal_inputs([images[group.rows[0]] for group in self._groups]),
        }

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        if self._attention is None:
            return super().prepare_model_inputs(micro_batch)
        return self._inputs, {}

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        if self._attention is None:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        scores = output.logits
        offsets, lengths = micro_batch["input_ids"].offsets(), self._lengths()
        ends = list(itertools.accumulate(group.prompt + n for group in self._groups for n in group.responses))
        # As in verl, the score of a token stands at the place that predicts it.
        runs = [torch.arange(end - length - 1, end - 1) for end, length in zip(ends, lengths, strict=True)]
        whole = scores.new_zeros(ends[-1], scores.shape[1]).index_copy(0, torch.cat(runs).to(scores.device), scores)
        result = {
            name: torch.nested.nested_tensor_from_jagged(column, offsets)
            for name, column in zip(self._head.columns, whole.unbind(1), strict=True)
        }
        top = self._head.take_top()
        if top is not None:
            for name, of_tokens in ((IDS, top[0].int()), (LOG_PROBS, top[1])):
                result[name] = torch.nested.as_nested_tensor(list(of_tokens.split(lengths)), layout=torch.jagged)
        return result


def _response_lengths(data: TensorDict) -> list[int]:
    """Return the lengths of the responses, in tokens."""
    return data["response_mask"].offsets().diff().tolist()
