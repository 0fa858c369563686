# SPDX-License-Identifier: Apache-2.0
"""Prompts of a step that have failed: count them, say why, and end the run before it trains on too few."""

import logging
from collections import Counter
from typing import Any

import transfer_queue as tq

from verl_gndpo.verl_patches.replay_buffer import REASON, report_failures

logger = logging.getLogger(__name__)


class LostPromptsError(RuntimeError):
    """A step has lost more of its responses than `algorithm.gndpo.max_lost_share`."""


class LostPrompts:
    """Follows a replay buffer from step to step.

    verl's synchronous trainer goes on with the responses that a failed prompt has, and fills the batch with rows whose
    mask is 0. Its asynchronous ones throw the prompt away and generate another, for ever if all of them fail.
    """

    def __init__(self, replay_buffer: Any, *, prompts: int, responses: int, limit: float):
        """
        Args:
            replay_buffer: the trainer's. A custom sampler that chooses prompts in a way of its own is not followed.
            prompts: of a batch.
            responses: to a prompt.
            limit: `algorithm.gndpo.max_lost_share`.
        """
        self._prompts, self._responses, self._limit = prompts, responses, limit
        self._reasons: dict[str, str] = {}
        self._lost = self._expected = 0
        self.follows = report_failures(replay_buffer, self._count_selected, self._count_replaced)

    def take(self) -> dict[str, float]:
        """Return what was lost since the last call, as metrics.

        Returns:
            gndpo/lost_prompts: number of prompts of which a response or more failed.
            gndpo/lost_share: share of the responses that failed.
        """
        if not self.follows:
            return {}
        metrics = {
            "gndpo/lost_prompts": float(len(self._reasons)),
            "gndpo/lost_share": self._lost / self._expected if self._expected else 0.0,
        }
        self._reasons, self._lost, self._expected = {}, 0, 0
        return metrics

    def _count_selected(self, prompts: set[str], failed: set[str], responses: dict[str, dict]) -> None:
        # A key is "{prompt}_{session}_{turn}".
        sessions = Counter(prompt for prompt, _ in {tuple(key.split("_")[:2]) for key in responses})
        lost = sum(max(self._responses - sessions[prompt], 0) for prompt in failed)
        self._count(failed, lost, len(prompts) * self._responses, to_come=0)

    def _count_replaced(self, failed: set[str]) -> None:
        # All of their responses are thrown away.
        lost = len(failed) * self._responses
        self._count(failed, lost, lost, to_come=self._prompts * self._responses)

    def _count(self, failed: set[str], lost: int, expected: int, to_come: int) -> None:
        self._lost += lost
        self._expected += expected
        if not failed:
            return
        tags = tq.kv_list(partition_id="train")["train"]
        for prompt in sorted(failed):
            reason = str(tags.get(prompt, {}).get(REASON, "the log has the reason, at 'Error in _run_prompt'"))
            self._reasons[prompt] = reason
            logger.warning("prompt %s has failed: %s", prompt, reason)
        share = self._lost / (self._expected + to_come)
        if share > self._limit:
            reasons = Counter(self._reasons.values())
            first = next(iter(self._reasons.values()))
            raise LostPromptsError(
                f"{len(self._reasons)} prompts of this step have failed, and with them {share:.0%} of its responses; "
                f"algorithm.gndpo.max_lost_share={self._limit} allows no more. Nothing was trained on the rest. The "
                f"first reason, which {reasons[first]} of them have: {first}"
            )
