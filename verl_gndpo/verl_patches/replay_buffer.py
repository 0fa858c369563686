# SPDX-License-Identifier: Apache-2.0
"""What the trainer needs of its replay buffer, the object that waits for finished rollouts.

A custom sampler (`trainer.v1.sampler.custom_sampler`) may wait in a way of its own. It is then left as it is.
"""

from collections.abc import Callable
from typing import Any

from verl_gndpo.verl_patches.patch import patches

POLL_INTERVAL_S = 0.2


@patches("poll_interval")
def poll_often(replay_buffer: Any) -> bool:
    """Make a replay buffer look for finished rollouts at least every POLL_INTERVAL_S."""
    if getattr(replay_buffer, "poll_interval", 0) <= POLL_INTERVAL_S:
        return False
    replay_buffer.poll_interval = POLL_INTERVAL_S
    return True


@patches("replay_buffer_events")
def call_back(replay_buffer: Any, waiting: Callable[[], None], discarding: Callable[[set[str]], None]) -> bool:
    """Make a replay buffer report two events.

    Args:
        replay_buffer: the trainer's.
        waiting: called before each wait for training rollouts.
        discarding: called with the names of prompts before their rows are thrown away.

    Returns:
        False if it is a custom sampler that waits or throws rows away in another way; it is then left as it is.
    """
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    for name in ("_wait_for_next_poll", "_clear_groups"):
        if getattr(type(replay_buffer), name, None) is not getattr(ReplayBuffer, name):
            return False
    wait, clear = replay_buffer._wait_for_next_poll, replay_buffer._clear_groups

    def _wait_for_next_poll(partition: str, last_debug_time: float) -> float:
        if partition == "train":
            waiting()
        return wait(partition, last_debug_time)

    def _clear_groups(partition: str, prompts: set[str]) -> None:
        discarding(prompts)
        clear(partition, prompts)

    replay_buffer._wait_for_next_poll = _wait_for_next_poll
    replay_buffer._clear_groups = _clear_groups
    return True
