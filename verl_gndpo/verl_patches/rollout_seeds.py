# SPDX-License-Identifier: Apache-2.0
"""Seeds of sampled responses. verl has one seed for all of them, and only with `full_determinism`."""

import functools
import hashlib
from types import ModuleType
from typing import Any

from omegaconf import OmegaConf

from verl_gndpo.verl_patches.patch import patches


@patches("rollout_seeds")
def seed_each_response(agent_loop: ModuleType) -> bool:
    """Make the agent loop's worker sample each response with a seed of its own, if `rollout_seed` is set."""
    worker_class = agent_loop.AgentLoopWorker
    original = worker_class._run_agent_loop

    @functools.wraps(original)
    async def _run_agent_loop(self: Any, sampling_params: Any, trajectory: Any, **kwargs: Any) -> Any:
        """Run stock verl's method."""
        seed = OmegaConf.select(self.config, "algorithm.gndpo.rollout_seed")
        if seed is not None:
            sampling_params = {**sampling_params, "seed": response_seed(seed, trajectory, kwargs.get("session_id", 0))}
        return await original(self, sampling_params, trajectory, **kwargs)

    worker_class._run_agent_loop = _run_agent_loop
    return True


def response_seed(seed: int, trajectory: dict[str, Any], number: int) -> int:
    """Return a response's seed, which depends on nothing but these.

    Args:
        seed: of the run.
        trajectory: of verl's agent loop: the step, the index of the data's row, and whether it is validation.
        number: of the response among those to its prompt.

    Returns:
        From 0 to 2^31 - 1.
    """
    parts = (seed, trajectory["step"], trajectory["sample_index"], trajectory["validate"], number)
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1
