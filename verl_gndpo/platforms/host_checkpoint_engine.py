# SPDX-License-Identifier: Apache-2.0
"""Weight transfer through a file in shared memory, for `trainer_mode=separate_async` without an accelerator.

verl's own checkpoint engines for separate rollout workers need NCCL, HCCL, RDMA or a Mooncake store. verl imports this
module when told to:

    actor_rollout_ref.rollout.checkpoint_engine.backend=host_file
    actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=verl_gndpo.platforms.host_checkpoint_engine

Actor and rollout must share a machine.
"""

import asyncio
import os
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterable

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry

from verl_gndpo.platforms import HOST_BACKEND

SHARED_MEMORY = "/dev/shm"
WAIT_S = 600


@CheckpointEngineRegistry.register(HOST_BACKEND)
class HostFileCheckpointEngine(CheckpointEngine):
    """Actor rank 0 writes all weights to one file; each rollout worker reads them from it."""

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.is_master = is_master
        self.path = ""

    def prepare(self) -> str | None:
        """Return a path for the weights on the master; verl hands all ranks' answers to `build_topology`."""
        if not self.is_master:
            return None
        folder = SHARED_MEMORY if os.path.isdir(SHARED_MEMORY) else tempfile.gettempdir()
        return os.path.join(folder, f"verl_gndpo_{uuid.uuid4().hex}.safetensors")

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[str]
    ) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """Return the arguments of `init_process_group` for each rank of the actor and of the rollout."""
        path = metadata[0]
        return {"path": [path] * actor_wg_world_size}, {"path": [path] * rollout_world_size}

    def init_process_group(self, path: str) -> None:
        """Agree on the file; no process group is needed."""
        self.path = path

    def finalize(self) -> None:
        """Remove the file."""
        if self.is_master and os.path.exists(self.path):
            os.remove(self.path)
        self.path = ""

    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> dict[str, float]:
        """Write the weights, if this is the master. Return no metrics."""
        # Every rank walks the generator, since gathering a sharded weight takes all of them.
        tensors = {name: weight.detach().cpu().clone() for name, weight in weights}
        if self.is_master:
            save_file(tensors, self.path + ".tmp")
            os.replace(self.path + ".tmp", self.path)
        return {}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Yield the names and weights in the file, once it is complete.

        Raises:
            TimeoutError: there is no such file after WAIT_S.
        """
        deadline = time.monotonic() + WAIT_S
        while not os.path.exists(self.path):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no weights at {self.path} after {WAIT_S} s; see the actor's log")
            await asyncio.sleep(0.05)
        with safe_open(self.path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
