# SPDX-License-Identifier: Apache-2.0
"""verl's reward manager, for data sets in which rows may lack an answer."""

from typing import Any

import numpy as np
from verl import DataProto
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager

from verl_gndpo.rewards import is_missing

NO_SOURCE = "unknown"
"""The data source of rows without one, as verl's validation calls it."""


class RewardManager(NaiveRewardManager):
    """Gives rows without an answer the reward 0 and no accuracy. verl's naive manager handles all others.

    A row has no answer if `reward_model` or its `ground_truth` is missing or empty.
    """

    async def run_single(self, data: DataProto) -> dict:
        """Return the reward of one response, as verl's managers return it."""
        columns = data.non_tensor_batch
        answer = columns["reward_model"][-1] if "reward_model" in columns else None
        if is_missing((answer or {}).get("ground_truth")):
            return {"reward_score": 0.0, "reward_extra_info": {}}
        if "data_source" not in columns:
            columns["data_source"] = np.array([NO_SOURCE] * len(data), dtype=object)
        return await super().run_single(data)


def use_reward_manager(config: Any) -> None:
    """Have a run use `RewardManager` where its config leaves the choice to verl.

    Args:
        config: verl's whole config, changed in place.
    """
    manager = config.reward.reward_manager
    if manager.source == "register" and manager.name == "naive":
        manager.source, manager.name = "importlib", "RewardManager"
        manager.module.path = "pkg://verl_gndpo.rewards.manager"
