# SPDX-License-Identifier: Apache-2.0
"""Seeds of responses in verl's own agent-loop worker."""

import asyncio
import itertools

import pytest
from omegaconf import OmegaConf
from verl.experimental.agent_loop import agent_loop

from verl_gndpo.verl_patches.rollout_seeds import response_seed


@pytest.fixture
def sampled(monkeypatch):
    """A function that returns the sampling parameters with which the worker runs an agent loop."""

    def run(config: dict, given: dict, number: int, **trajectory) -> dict:
        seen = {}

        class Loop:
            async def run(self, sampling_params, **kwargs):
                seen.update(sampling_params)

        async def keep(self, output, validate, **kwargs):
            return output

        monkeypatch.setattr(agent_loop.hydra.utils, "instantiate", lambda **_: Loop())
        monkeypatch.setitem(agent_loop._agent_loop_registry, "seen", {})
        monkeypatch.setattr(agent_loop.AgentLoopWorker, "_agent_loop_postprocess", keep)
        worker = object.__new__(agent_loop.AgentLoopWorker)
        worker.config = OmegaConf.create({"algorithm": config, "data": {}})
        for name in ("llm_client", "tokenizer", "processor", "hf_model_type", "dataset_cls"):
            setattr(worker, name, None)
        worker.tools = []
        defaults = {"step": 1, "sample_index": 0, "rollout_n": 0, "validate": False}
        asyncio.run(
            worker._run_agent_loop(given, defaults | trajectory, agent_name="seen", trace=False, session_id=number)
        )
        return seen

    return run


def test_each_response_has_a_seed_of_its_own_which_is_always_the_same(sampled):
    config, given = {"gndpo": {"rollout_seed": 3}}, {"temperature": 1.0}
    cases = itertools.product((1, 2), (0, 7), (False, True), (0, 1))
    seeds = [
        sampled(config, given, number, step=step, sample_index=index, validate=validate)["seed"]
        for step, index, validate, number in cases
    ]
    assert len(set(seeds)) == 16 and all(0 <= seed < 2**31 for seed in seeds)
    # Of another process, and from an earlier version: it must not change.
    assert seeds[0] == response_seed(3, {"step": 1, "sample_index": 0, "validate": False}, 0) == 228965174
    assert given == {"temperature": 1.0}


@pytest.mark.parametrize("config", [{}, {"gndpo": {}}, {"gndpo": {"rollout_seed": None}}])
def test_without_the_setting_verl_samples_as_before(sampled, config):
    assert sampled(config, {"temperature": 1.0}, 0) == {"temperature": 1.0}
