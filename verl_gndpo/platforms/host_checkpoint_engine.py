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

from safetensors import safe_open
from safetensors.torch import save_file
from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry

SHARED_MEMORY = "/dev/shm"
WAIT_S = 600


@CheckpointEngineRegistry.register("host_file")
class HostFileCheckpointEngine(CheckpointEngine):
    """Actor rank 0 writes all weights to one file; each rollout worker reads them from it."""

    def __init__(self, bucket_size: int, is_master: bool = False):
        self.is_master = is_master
        self.path: str | None = None

    def prepare(self) -> str | None:
        if not self.is_master:
            return None
        folder = SHARED_MEMORY if os.path.isdir(SHARED_MEMORY) else tempfile.gettempdir()
        return os.path.join(folder, f"verl_gndpo_{uuid.uuid4().hex}.safetensors")

    @classmethod
    def build_topology(cls, actor_wg_world_size, rollout_world_size, metadata):
        path = metadata[0]
        return {"path": [path] * actor_wg_world_size}, {"path": [path] * rollout_world_size}

    def init_process_group(self, path: str):
        self.path = path

    def finalize(self):
        if self.is_master and self.path is not None and os.path.exists(self.path):
            os.remove(self.path)
        self.path = None

    async def send_weights(self, weights, global_steps=None):
        # Every rank walks the generator, since gathering a sharded weight takes all of them.
        tensors = {name: weight.detach().cpu().clone() for name, weight in weights}
        if self.is_master:
            save_file(tensors, self.path + ".tmp")
            os.replace(self.path + ".tmp", self.path)
        return {}

    async def receive_weights(self, global_steps=None):
        deadline = time.monotonic() + WAIT_S
        while not os.path.exists(self.path):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no weights at {self.path} after {WAIT_S} s; see the actor's log")
            await asyncio.sleep(0.05)
        with safe_open(self.path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
