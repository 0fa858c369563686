# SPDX-License-Identifier: Apache-2.0
"""What is published: signals by name, and the recipe in which GNDPO's own signal was used.

Each signal gives stages of `algorithm.gndpo`, and is an `algorithm.adv_estimator`, too.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # GNDPO, arXiv 2606.09091.
    "gndpo": {"bound": "clamp", "limit": 5.0, "baseline": "batch", "scale": "batch"},
    # On-policy distillation as Thinking Machines describes it, raw, and with the bound of GNDPO's own baseline.
    "opd_raw": {"bound": "none", "baseline": "none", "scale": "none"},
    "opd": {"bound": "clamp", "limit": 5.0, "baseline": "none", "scale": "none"},
    # PowerOPD, arXiv 2606.17199, with the exponent of its released code; tanh is one of its rivals.
    "power_opd": {"bound": "power", "power_alpha": 5.0, "baseline": "none", "scale": "none"},
    "tanh_opd": {"bound": "tanh", "baseline": "none", "scale": "none"},
    # This project's: docs/study.md says how they were found and what they are worth.
    "gap_opd": {"bound": "gap", "negative_limit": 0.4, "baseline": "none", "scale": "none"},
    "odds_opd": {"bound": "odds", "negative_limit": 0.4, "baseline": "none", "scale": "none"},
    "log_odds_opd": {"bound": "log_odds", "limit": 5.0, "baseline": "none", "scale": "none"},
    # TV-OPD, arXiv 2609.08341.
    "tv_opd": {"bound": "sign", "baseline": "none", "scale": "none"},
    # TOP-D, arXiv 2607.04751, with each token's own reward: without its mean over the tokens that follow.
    "top_d": {"bound": "proximal", "proximal_alpha": 0.5, "baseline": "group", "scale": "group"},
    # arXiv 2607.07050.
    "soft_clamp_opd": {"bound": "soft_clamp", "soft_clamp_factor": 3.0, "baseline": "none", "scale": "none"},
    # Uni-OPD, arXiv 2605.03677.
    "uni_opd": {"bound": "mask", "limit": 5.0, "baseline": "none", "scale": "none"},
    # vOPD, arXiv 2605.07865.
    "v_opd": {"bound": "none", "baseline": "kl", "scale": "none"},
}

RECIPE: dict[str, Any] = {
    "algorithm.adv_estimator": "gndpo",
    "algorithm.use_kl_in_reward": False,
    # The student's log-probs are those of the training engine, and no token is weighted or dropped.
    "algorithm.rollout_correction.bypass_mode": False,
    "algorithm.rollout_correction.rollout_is": None,
    "algorithm.rollout_correction.rollout_rs": None,
    "actor_rollout_ref.actor.policy_loss.loss_mode": "gspo",
    "actor_rollout_ref.actor.loss_agg_mode": "seq-mean-token-mean",
    "actor_rollout_ref.actor.clip_ratio_low": 0.2,
    "actor_rollout_ref.actor.clip_ratio_high": 0.2,
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.entropy_coeff": 0,
    # One update per batch, and new weights for every batch.
    "actor_rollout_ref.actor.ppo_epochs": 1,
    "actor_rollout_ref.actor.ppo_mini_batch_size": "${data.train_batch_size}",
    "trainer.v1.separate_async.parameter_sync_step": 1,
    "actor_rollout_ref.rollout.temperature": 1.0,
}
"""Settings of verl in the published runs of GNDPO, by their full keys: `+recipe=gndpo`.

They define the update of a batch. Sizes, learning rate and the frozen vision tower are those of the run's models and
data: examples/run_qwen2_5vl_gndpo.sh sets them.
"""
