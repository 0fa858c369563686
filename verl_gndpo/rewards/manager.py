# SPDX-License-Identifier: Apache-2.0
"""verl's reward manager, for rows without an answer and for chat templates that begin the response."""

from typing import Any

import numpy as np
from verl import DataProto
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager

from verl_gndpo.rewards import is_missing
from verl_gndpo.rewards.extract import response_prefix

NO_SOURCE = "unknown"
"""The data source of rows without one, as verl's validation calls it."""

# Enough of a prompt's end for a tag and the line breaks after it.
TAIL_TOKENS = 16


class RewardManager(NaiveRewardManager):
    """Gives rows without an answer the reward 0 and no accuracy. verl's naive manager handles all others.

    A row has no answer if `reward_model` or its `ground_truth` is missing or empty. If a prompt ends with `<think>`,
    `extra_info.response_prefix` tells the reward function.
    """

    async def run_single(self, data: DataProto) -> dict:
        """Return the reward of one response, as verl's managers return it."""
        columns = data.non_tensor_batch
        answer = columns["reward_model"][-1] if "reward_model" in columns else None
        if is_missing((answer or {}).get("ground_truth")):
            return {"reward_score": 0.0, "reward_extra_info": {}}
        if "data_source" not in columns:
            columns["data_source"] = np.array([NO_SOURCE] * len(data), dtype=object)
        prefix = await self.loop.run_in_executor(None, self._response_prefix, data)
        if prefix:
            last = columns["extra_info"][-1] if "extra_info" in columns else {}
            infos = np.empty(len(data), dtype=object)
            infos[-1] = {**(last or {}), "response_prefix": prefix}
            columns["extra_info"] = infos
        return await super().run_single(data)

    def _response_prefix(self, data: DataProto) -> str:
        if "prompts" not in data.batch.keys():
            return ""
        tail = self.tokenizer.decode(data.batch["prompts"][-1][-TAIL_TOKENS:], skip_special_tokens=False)
        return response_prefix(tail)


def use_reward_manager(config: Any) -> None:
    """Have a run use `RewardManager` where its config leaves the choice to verl.

    Args:
        config: verl's whole config, changed in place.
    """
    manager = config.reward.reward_manager
    if manager.source == "register" and manager.name == "naive":
        manager.source, manager.name = "importlib", "RewardManager"
        manager.module.path = "pkg://verl_gndpo.rewards.manager"
