# SPDX-License-Identifier: Apache-2.0
"""Read the weights of all ranks, and put the pieces of each tensor together."""

import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard

from verl_gndpo.export.folders import Checkpoint, ExportError


def read_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, whole and in the type that it was saved in.

    verl's merger can do the same only in bfloat16. Like the merger, this handles FSDP and HSDP: a tensor is cut along
    one dimension over the last dimension of the device mesh, and copied over the others.

    Raises:
        ExportError: a file can't be read, ranks disagree, or a tensor is cut in another way.
    """
    # It warns that tensors can't communicate, which they need not.
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    ranks = [_load(checkpoint.shard(rank)) for rank in range(checkpoint.world_size)]
    for rank, state in enumerate(ranks):
        if state.keys() != ranks[0].keys():
            name = min(state.keys() ^ ranks[0].keys())
            raise ExportError(
                f"{checkpoint.shard(rank)} and the file of rank 0 are of different models, first at {name} -> export "
                "another checkpoint"
            )
    # Pieces are freed as soon as their tensor is whole.
    return {name: _join(name, [state.pop(name) for state in ranks], checkpoint) for name in list(ranks[0])}


def _load(path: Path) -> dict[str, Any]:
    """Read a rank's file, mapped into memory."""
    try:
        # Only tensors are unpickled, so that a checkpoint from elsewhere can't run code.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # What torch raises for damaged archives.
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ExportError(
            f"{path} is incomplete or damaged: {reason} -> copy it again, or export another checkpoint"
        ) from error


def _join(name: str, pieces: list[Any], checkpoint: Checkpoint) -> torch.Tensor:
    """Return a whole tensor.

    Args:
        name: for messages.
        pieces: what each rank holds of it.
        checkpoint: for messages.
    """
    first = pieces[0]
    if not isinstance(first, DTensor):
        # A buffer, or any tensor of a single rank: every rank has all of it.
        for rank, piece in enumerate(pieces):
            if isinstance(piece, DTensor) or piece.shape != first.shape or not torch.equal(piece, first):
                raise ExportError(f"rank {rank} of {checkpoint.actor} has another {name} than rank 0")
        return first.clone()
    cut = [(axis, placement.dim) for axis, placement in enumerate(first.placements) if isinstance(placement, Shard)]
    mesh = first.device_mesh.mesh
    if len(cut) > 1 or any(placement.is_partial() for placement in first.placements):
        raise ExportError(
            f"{name} of {checkpoint.actor} is cut as {first.placements}, and export reads what FSDP and HSDP write"
        )
    if not cut:
        return first.to_local().clone()
    (axis, dimension) = cut[0]
    # The ranks that hold one whole copy: those along the mesh's axis that cuts, from the first one on.
    holders = mesh.movedim(axis, -1).reshape(-1, mesh.shape[axis])[0].tolist()
    whole = torch.cat([pieces[rank].to_local() for rank in holders], dim=dimension)
    if whole.shape != first.shape:
        raise ExportError(
            f"the pieces of {name} in {checkpoint.actor} make {tuple(whole.shape)} instead of {tuple(first.shape)} -> "
            "export another checkpoint"
        )
    return whole
