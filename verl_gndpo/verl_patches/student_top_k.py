# SPDX-License-Identifier: Apache-2.0
"""Has the FSDP engines of this process return the student's most likely tokens beside its log-probs, when asked.

The trainer mixin has the actor's process import it, through verl's own `model.external_lib`, for
`algorithm.gndpo.baseline=kl`, and asks by the batch's entry REQUEST: the number of tokens. (verl's own hook for top-k
distillation, `distillation_use_topk`, takes one number a token from its function.)
"""

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_gndpo.kl import IDS, LOG_PROBS, REQUEST, top_log_probs

CHUNK_TOKENS = 256
"""Response tokens whose float32 log-probs over the whole vocabulary exist at the same time."""

_prepare_model_outputs = FSDPEngineWithLMHead.prepare_model_outputs


def _prepare_model_outputs_with_top_k(self, output, output_args, micro_batch: TensorDict, logits_processor_func):
    asked = tu.get_non_tensor_data(data=micro_batch, key=REQUEST, default=None)
    top = {} if asked is None else _top_k(output.logits, output_args, micro_batch, asked)
    return _prepare_model_outputs(self, output, output_args, micro_batch, logits_processor_func) | top


@torch.no_grad()
def _top_k(logits: torch.Tensor, output_args: dict, micro_batch: TensorDict, k: int) -> dict[str, torch.Tensor]:
    """Of each response token the k most likely ids, nested (batch, response length, k), int32, and their log-probs with
    the mass of the others, nested (batch, response length, k + 1), float32, nats."""
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


FSDPEngineWithLMHead.prepare_model_outputs = _prepare_model_outputs_with_top_k
