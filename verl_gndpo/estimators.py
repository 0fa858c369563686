# SPDX-License-Identifier: Apache-2.0
"""The advantage estimators that `algorithm.adv_estimator` can name. All arithmetic is in advantage.py."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from types import ModuleType
from typing import Any

import numpy as np
import torch

from verl_gndpo.advantage import SignalState, Trace, compute_advantages
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
    on_trace: Callable[[Trace], Any] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute advantages through verl's estimator interface; see `advantage.compute_advantages`.

    Args:
        estimator: one of presets.py.
        response_mask: (batch, response_length).
        teacher_log_probs, old_log_probs: (batch, response_length), nats.
        token_level_rewards: (batch, response_length), for `task_reward.coef` above 0.
        index: prompt of each row.
        config: verl's `algorithm` section; `config.gndpo` holds the settings.
        teacher: teacher of each row; None: one for all.
        kl: (batch, response_length), KL(student || teacher) at each position, nats, for baseline=kl.
        state: the average that scale=ema carries from step to step; it is updated.
        on_trace: called once, with the stages of all valid tokens.
        _: further arguments that verl gives every estimator.

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
        on_trace=on_trace,
    )
    return advantages, advantages


def _task_advantages(
    task: TaskReward,
    token_level_rewards: torch.Tensor | None,
    response_mask: torch.Tensor,
    index: Sequence[str] | None,
    config: Any,
) -> torch.Tensor | None:
    """Return the task reward's advantages by verl's own estimator; None if it is not mixed in."""
    if not task.coef:
        return None
    if token_level_rewards is None or index is None:
        raise ValueError(
            "algorithm.gndpo.task_reward.coef is not 0 and the batch has no token_level_rewards or no index"
        )
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    estimator = get_adv_estimator_fn(task.estimator)
    # verl passes this setting of `algorithm` as an argument of its own to estimators that take it.
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
        name: value of `algorithm.adv_estimator`.
        stages: keys of `algorithm.gndpo`, such as `bound` and its parameters. A stage defaults to "none".

    Raises:
        ValueError: the name is taken.
        ConfigError: a stage or a parameter is unknown or out of range.
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
