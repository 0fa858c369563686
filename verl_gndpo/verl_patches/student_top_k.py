# SPDX-License-Identifier: Apache-2.0
"""Makes the FSDP engines return the student's most likely tokens beside its log-probs, for batches that ask for them.

`algorithm.gndpo.baseline=kl` needs them. For it, the trainer names this module in `model.external_lib`, so that the
actor's process imports it, and asks by the batch's entry REQUEST: the number of tokens. (verl's own hook for top-k
distillation, `distillation_use_topk`, takes one number per token from its function.)
"""

from types import ModuleType
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from verl_gndpo.kl import IDS, LOG_PROBS, REQUEST, top_log_probs
from verl_gndpo.verl_patches.patch import apply, patches

CHUNK_TOKENS = 256
"""Response tokens whose float32 log-probs over the whole vocabulary exist at the same time."""


@patches("student_top_k")
def return_top_k(transformer_impl: ModuleType) -> bool:
    """Make the FSDP engines of this process answer REQUEST."""
    engine_class = transformer_impl.FSDPEngineWithLMHead
    prepare_model_outputs = engine_class.prepare_model_outputs

    def prepare_with_top_k(
        self: Any, output: Any, output_args: dict, micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        """Run stock verl's method, and add the most likely tokens if the batch asks for them."""
        k = tu.get_non_tensor_data(data=micro_batch, key=REQUEST, default=None)
        top = {} if k is None else _top_k(output.logits, output_args, micro_batch, k)
        return prepare_model_outputs(self, output, output_args, micro_batch, logits_processor_func) | top

    engine_class.prepare_model_outputs = prepare_with_top_k
    return True


@torch.no_grad()
def _top_k(logits: torch.Tensor, output_args: dict, micro_batch: TensorDict, k: int) -> dict[str, torch.Tensor]:
    """Return the k most likely ids at each response token, and their log-probs with the mass of all other ids.

    Returns:
        IDS, nested (batch, response length, k), int32, and LOG_PROBS, nested (batch, response length, k + 1), float32,
        nats.
    """
    lengths = micro_batch["input_ids"].offsets().diff()
    responses = micro_batch["response_mask"].offsets().diff().tolist()
    packed = "temperature_rmpad" in output_args
    # Where each row begins in the flattened logits: verl packs rows, or pads them at their ends.
    width = logits.shape[1]
    begins = micro_batch["input_ids"].offsets()[:-1] if packed else torch.arange(len(lengths)) * width
    logits = logits.flatten(0, 1)
    temperature = output_args["temperature_rmpad"] if packed else output_args["temperature"].repeat_interleave(width)
    ids, log_probs = [], []
    for begin, length, response in zip(begins.tolist(), lengths.tolist(), responses, strict=True):
        # Each place predicts the token after it.
        places = slice(begin + length - 1 - response, begin + length - 1)
        chunks = zip(logits[places].split(CHUNK_TOKENS), temperature[places].split(CHUNK_TOKENS), strict=True)
        parts = [top_log_probs(part.float() / divisor.unsqueeze(-1), k) for part, divisor in chunks]
        row_ids, row_log_probs = zip(*parts, strict=True)
        ids.append(torch.cat(row_ids).int())
        log_probs.append(torch.cat(row_log_probs))
    return {
        name: torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        for name, rows in ((IDS, ids), (LOG_PROBS, log_probs))
    }


apply("student_top_k")
