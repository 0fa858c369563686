# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that verl's own FSDP engine writes, of tiny models with changed weights, on gloo ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import multiprocessing
from verl.utils import tensordict_utils as tu

from tests.integration import helpers

LORA = {"lora_rank": 4, "lora_alpha": 32, "target_modules": "all-linear"}
LOG_PROBS = "log_probs.pt"


@dataclass(frozen=True)
class Job:
    """A checkpoint to write."""

    model: Path
    """The model that training starts from."""

    folder: Path
    """The folder global_step_N. It is made, and LOG_PROBS beside it if there are rows."""

    strategy: str = "fsdp2"
    lora: bool = False
    rows: Sequence[dict] = ()
    """Rows of `helpers.make_rows`, whose responses the trained model scores."""


def write_checkpoints(jobs: list[Job], ranks: int) -> None:
    """Write checkpoints one after another, each by all ranks."""
    multiprocessing.spawn(_write, (ranks, helpers.free_port(), jobs), nprocs=ranks)


def _write(rank: int, ranks: int, port: int, jobs: list[Job]) -> None:
    helpers.set_rank(rank, ranks, port)
    torch.set_num_threads(1)
    for job in jobs:
        settings = LORA if job.lora else {}
        worker = helpers.start_actor(job.model, False, strategy=job.strategy, load_tokenizer=True, **settings)
        torch.manual_seed(rank)
        with torch.no_grad():
            for weight in worker.engine.module.parameters():
                if weight.requires_grad:
                    # Only FSDP2's weights are distributed tensors. Of FSDP1's, each rank holds its own part, too.
                    own = weight.to_local() if hasattr(weight, "to_local") else weight
                    own.add_(torch.randn(own.shape) * 0.02)
        if job.rows:
            scores = _score(worker, list(job.rows))
            if rank == 0:
                torch.save(scores, job.folder.parent / LOG_PROBS)
        # The worker's own method would first move the weights to the accelerator that is missing here.
        worker.engine.checkpoint_manager.save_checkpoint(str(job.folder / "actor"), global_step=1)


def _score(worker, rows: list[dict]) -> list[torch.Tensor]:
    """Return each row's log-probs of its response, by the actor's own forward pass."""
    batch = helpers.as_batch(rows)
    batch["loss_mask"] = batch["response_mask"]
    tu.assign_non_tensor(batch, temperature=1.0, calculate_entropy=False, compute_loss=False)
    whole = worker.infer_batch(batch)["log_probs"].unbind()
    return [scores[-len(row["response"]) - 1 : -1] for scores, row in zip(whole, rows, strict=True)]
