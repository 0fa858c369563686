# SPDX-License-Identifier: Apache-2.0
"""The advantage estimators that `algorithm.adv_estimator` can name. All arithmetic is in advantage.py."""

import sys
from collections.abc import Sequence
from functools import partial
from inspect import signature
from types import ModuleType
from typing import Any

import numpy as np
import torch

from verl_gndpo.advantage import SignalState, compute_advantages
from verl_gndpo.config import TaskReward, check_preset, read_signal_config
from verl_gndpo.presets import PRESETS


def compute_log_ratio_advantage(
    estimator: str,
    *,
    response_mask: torch.Tensor,
    teacher_log_probs: torch.Tensor | None = None,
    old_log_probs: torch.Tensor | None = None,
    token_level_rewards: torch.Tensor | None = None,
    index: Sequence[str] | None = None,
    config: Any = None,
    teacher: Sequence[str] | None = None,
    kl: torch.Tensor | None = None,
    state: SignalState | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's estimator interface over `advantage.compute_advantages`.

    Args:
        estimator: one of presets.py.
        response_mask: (batch, response_length).
        teacher_log_probs, old_log_probs: (batch, response_length), nats.
        token_level_rewards: (batch, response_length), for `task_reward.coef` above 0.
        index: prompt of each row.
        config: verl's `algorithm` section; `config.gndpo` holds the settings.
        teacher: of each row, which teacher has scored it; None: the same for all.
        kl: (batch, response_length), KL(student || teacher) at each position, nats, for baseline=kl.
        state: what scale=ema carries from step to step; updated.
        _: what verl hands every estimator and this signal does not use.

    Returns:
        (advantages, returns), both (batch, response_length) float32; the two are the same tensor.

    Raises:
        ValueError: no teacher log-probs, or what `advantage.compute_advantages` refuses.
    """
    if teacher_log_probs is None or old_log_probs is None:
        raise ValueError(
            f"adv_estimator={estimator} needs teacher_log_probs and old_log_probs, which verl-gndpo's trainers "
            "provide: run verl's v1 trainer (trainer.use_v1=True) with verl-gndpo installed; `verl-gndpo doctor` says "
            "what is missing"
        )
    settings = read_signal_config(config, estimator)
    advantages = compute_advantages(
        teacher_log_probs,
        old_log_probs,
        response_mask,
        settings.signal,
        groups=index,
        teachers=teacher,
        kl=kl,
        task_advantages=_task_advantages(settings.task_reward, token_level_rewards, response_mask, index, config),
        task_coef=settings.task_reward.coef,
        state=state,
    )
    return advantages, advantages


def _task_advantages(
    task: TaskReward,
    token_level_rewards: torch.Tensor | None,
    response_mask: torch.Tensor,
    index: Sequence[str] | None,
    config: Any,
) -> torch.Tensor | None:
    """What verl's own estimator makes of the task reward; None where it is not mixed in."""
    if not task.coef:
        return None
    if token_level_rewards is None or index is None:
        raise ValueError(
            "algorithm.gndpo.task_reward.coef is not 0 and the batch has no token_level_rewards or no index"
        )
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    estimator = get_adv_estimator_fn(task.estimator)
    # verl hands this setting of `algorithm` over by itself, to estimators that know it.
    normalises = "norm_adv_by_std_in_grpo"
    own = {normalises: (config or {}).get(normalises, True)} if normalises in signature(estimator).parameters else {}
    advantages, _ = estimator(
        token_level_rewards=token_level_rewards,
        response_mask=response_mask,
        index=np.array(index),
        config=config,
        **own,
    )
    return advantages


def register_preset(name: str, **stages: Any) -> None:
    """Make a combination of stages selectable as `algorithm.adv_estimator=<name>`.

    Args:
        name: of the estimator.
        stages: keys of `algorithm.gndpo`, such as `bound` and its parameters; a stage that is not given is "none".

    Raises:
        ValueError: the name is taken, or `config.ConfigError` where a stage or a parameter is refused.
    """
    core_algos = sys.modules.get("verl.trainer.ppo.core_algos")
    if name in PRESETS or (core_algos is not None and name in core_algos.ADV_ESTIMATOR_REGISTRY):
        raise ValueError(f"there is an advantage estimator called {name} already")
    preset = {"bound": "none", "baseline": "none", "scale": "none"} | stages
    check_preset(name, preset)
    PRESETS[name] = preset
    if core_algos is not None:
        _add(core_algos, name)


def register(core_algos: ModuleType) -> None:
    """Add the estimators to `verl.trainer.ppo.core_algos`, given as the module."""
    for name in PRESETS:
        _add(core_algos, name)


def _add(core_algos: ModuleType, name: str) -> None:
    core_algos.register_adv_est(name)(partial(compute_log_ratio_advantage, name))
