# SPDX-License-Identifier: Apache-2.0
"""Helpers that all levels of tests share."""

from dataclasses import replace

from hydra import compose, initialize_config_module
from omegaconf import DictConfig


def verl_config(*overrides: str) -> DictConfig:
    """Return verl's own `ppo_trainer` config with overrides, as `python -m verl.trainer.main_ppo` would compose it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=["actor_rollout_ref.rollout.name=vllm", *overrides])


def trace_of(teacher, old, mask, signal, advantages=None, **inputs):
    """Return the `Trace` of a batch, with these advantages, (batch, response_length), in place of its own if given."""
    from verl_gndpo.advantage import compute_advantages

    traces = []
    compute_advantages(teacher, old, mask, signal, on_trace=traces.append, **inputs)
    (trace,) = traces
    return trace if advantages is None else replace(trace, advantages=advantages[mask != 0].float().numpy())
