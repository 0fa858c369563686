# SPDX-License-Identifier: Apache-2.0
"""Helpers that all levels of tests share."""

from hydra import compose, initialize_config_module
from omegaconf import DictConfig


def verl_config(*overrides: str) -> DictConfig:
    """Return verl's own `ppo_trainer` config with overrides, as `python -m verl.trainer.main_ppo` would compose it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=["actor_rollout_ref.rollout.name=vllm", *overrides])
