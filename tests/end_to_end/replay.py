# SPDX-License-Identifier: Apache-2.0
"""Repeat the updates of a run with verl's own FSDP engine, from the batches that the run's estimator saw."""

from functools import partial
from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.tensordict_utils import nested_tensor_from_tensor_list
from verl.workers.utils.losses import ppo_loss

from tests.helpers import verl_config
from tests.integration.helpers import nested, one_rank, start_actor


def replay(path: Path, steps: list[list[dict]], *overrides: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Train a checkpoint with its vision tower frozen, one update per batch.

    Args:
        path: of the student before the first step.
        steps: the rows of each step's batch (`Run.captured`).
        overrides: of the run, for the loss and the optimizer.

    Returns:
        The metrics of each update, and the weights after the last one.
    """
    limits = ["use_dynamic_bsz=True", "ppo_max_token_len_per_gpu=8192"]
    actor = verl_config(
        "+recipe=gndpo", *(f"actor_rollout_ref.actor.{limit}" for limit in limits), *overrides
    ).actor_rollout_ref.actor
    config = omega_conf_to_dataclass(actor)
    with one_rank():
        engine = start_actor(path, packed=False, optimizer=config.optim).engine
        engine.module.model.visual.requires_grad_(False)
        metrics = []
        for rows in steps:
            with engine.train_mode():
                output = engine.train_batch(_batch(rows), partial(ppo_loss, config=config))
            loss = output["metrics"]["actor/pg_loss"].aggregate()
            metrics.append({"actor/grad_norm": output["metrics"]["grad_norm"], "actor/pg_loss": loss})
        weights = {name: value.full_tensor().clone() for name, value in engine.module.state_dict().items()}
    return metrics, weights


def _batch(rows: list[dict]) -> TensorDict:
    lengths = [len(row["response_mask"]) for row in rows]
    ids = [row["input_ids"] for row in rows]
    data = {name: nested(row[name] for row in rows) for name in ("old_log_probs", "advantages", "response_mask")}
    data |= {"input_ids": nested(ids), "loss_mask": data["response_mask"]}
    data["prompts"] = nested(x[: len(x) - n] for x, n in zip(ids, lengths, strict=True))
    data["responses"] = nested(x[len(x) - n :] for x, n in zip(ids, lengths, strict=True))
    data["position_ids"] = nested_tensor_from_tensor_list([row["position_ids"] for row in rows], ragged_idx=2)
    data["multi_modal_inputs"] = NonTensorStack(*(row["multi_modal_inputs"] for row in rows))
    batch = TensorDict(data, batch_size=len(rows))
    tu.assign_non_tensor(
        batch, temperature=1.0, global_batch_size=len(rows), use_remove_padding=False, max_token_len_per_gpu=8192
    )
    return batch
