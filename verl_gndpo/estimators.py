# SPDX-License-Identifier: Apache-2.0
"""The advantage estimators that `algorithm.adv_estimator` can name. All arithmetic is in signal.py."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from verl_gndpo import ESTIMATORS
from verl_gndpo.config import read_signal_config
from verl_gndpo.signal import advantages_by_group


def compute_log_ratio_advantage(
    estimator: str,
    *,
    response_mask: torch.Tensor,
    teacher_log_probs: torch.Tensor | None = None,
    old_log_probs: torch.Tensor | None = None,
    config: Any = None,
    teacher: Sequence[str] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's estimator interface over `signal.log_ratio_advantages`.

    Args:
        estimator: "gndpo" (batch-whitened) or "opd" (bounded only).
        response_mask: (batch, response_length).
        teacher_log_probs, old_log_probs: (batch, response_length), nats.
        config: verl's `algorithm` section; `config.gndpo` holds the settings.
        teacher: of each row, which teacher has scored it; None: the same for all.
        _: what verl hands every estimator and this signal does not use (token_level_rewards, index).

    Returns:
        (advantages, returns), both (batch, response_length) float32; the two are the same tensor.

    Raises:
        ValueError: no teacher log-probs, or what `signal.log_ratio_advantages` refuses.
    """
    if teacher_log_probs is None or old_log_probs is None:
        raise ValueError(
            f"adv_estimator={estimator} needs teacher_log_probs and old_log_probs, which verl-gndpo's trainers "
            "provide: run verl's v1 trainer (trainer.use_v1=True) with verl-gndpo installed; `verl-gndpo doctor` says "
            "what is missing"
        )
    settings = read_signal_config(config, estimator)
    groups = teacher if settings.scope == "teacher" else None
    advantages = advantages_by_group(
        groups,
        teacher_log_probs,
        old_log_probs,
        response_mask,
        clip=settings.clip,
        center=settings.center,
        scale=settings.scale,
        std_floor=settings.std_floor,
    )
    return advantages, advantages


def register(core_algos) -> None:
    """Add the estimators to `verl.trainer.ppo.core_algos`, given as the module."""
    for name in ESTIMATORS:
        core_algos.register_adv_est(name)(partial(compute_log_ratio_advantage, name))
