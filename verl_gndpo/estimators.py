# SPDX-License-Identifier: Apache-2.0
"""The advantage estimators that `algorithm.adv_estimator` can name. All arithmetic is in advantage.py."""

from collections.abc import Sequence
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch

from verl_gndpo import ESTIMATORS
from verl_gndpo.advantage import SignalState, compute_advantages
from verl_gndpo.config import SignalConfig, read_signal_config


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
        settings,
        groups=index,
        teachers=teacher,
        kl=kl,
        task_advantages=_task_advantages(settings, token_level_rewards, response_mask, index, config),
        state=state,
    )
    return advantages, advantages


def _task_advantages(
    settings: SignalConfig,
    token_level_rewards: torch.Tensor | None,
    response_mask: torch.Tensor,
    index: Sequence[str] | None,
    config: Any,
) -> torch.Tensor | None:
    """What verl's own estimator makes of the task reward; None where it is not mixed in."""
    task = settings.task_reward
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


def register(core_algos) -> None:
    """Add the estimators to `verl.trainer.ppo.core_algos`, given as the module."""
    for name in ESTIMATORS:
        core_algos.register_adv_est(name)(partial(compute_log_ratio_advantage, name))
