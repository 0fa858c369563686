# SPDX-License-Identifier: Apache-2.0
"""What the trainer needs of its replay buffer, the object that waits for finished rollouts.

A custom sampler (`trainer.v1.sampler.custom_sampler`) may wait in a way of its own. It is then left as it is.
"""

import functools
from collections.abc import Callable
from types import ModuleType
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


def _has_methods_of_verl(replay_buffer: Any, *names: str) -> bool:
    """Return True unless the class of a custom sampler has one of these methods of its own."""
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    return all(getattr(type(replay_buffer), name, None) is getattr(ReplayBuffer, name) for name in names)


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
    if not _has_methods_of_verl(replay_buffer, "_wait_for_next_poll", "_clear_groups"):
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


@patches("replay_buffer_waits")
def watch_waits(replay_buffer: Any, waiting: Callable[[str], None]) -> bool:
    """Make a replay buffer report each wait for rollouts, of training or validation.

    Args:
        replay_buffer: the trainer's.
        waiting: called with the partition before each wait. What it raises ends the run.

    Returns:
        False if it is a custom sampler that waits in another way; it is then left as it is.
    """
    if not _has_methods_of_verl(replay_buffer, "_wait_for_next_poll"):
        return False
    wait = replay_buffer._wait_for_next_poll

    def _wait_for_next_poll(partition: str, last_debug_time: float) -> float:
        waiting(partition)
        return wait(partition, last_debug_time)

    replay_buffer._wait_for_next_poll = _wait_for_next_poll
    return True


@patches("failed_prompts")
def report_failures(
    replay_buffer: Any,
    selected: Callable[[set[str], set[str], dict[str, dict]], None],
    replaced: Callable[[set[str]], None],
) -> bool:
    """Make a replay buffer report the training prompts that have failed, while TransferQueue still has their tags.

    Args:
        replay_buffer: the trainer's.
        selected: called with the prompts that a step is made of, those of them that have failed, and the tags of all
            responses by key.
        replaced: called with failed prompts that are thrown away and generated anew.

    Returns:
        False if it is a custom sampler that chooses prompts in another way; it is then left as it is.
    """
    if not _has_methods_of_verl(replay_buffer, "_select_prompt_uids", "_evict_terminal_groups"):
        return False
    select, evict = replay_buffer._select_prompt_uids, replay_buffer._evict_terminal_groups

    def _select_prompt_uids(partition_id: str, *args: Any, **kwargs: Any) -> Any:
        chosen = select(partition_id, *args, **kwargs)
        if partition_id == "train":
            prompts, responses, _ = chosen
            selected(set(prompts), set(prompts) & replay_buffer.failure_keys[partition_id], responses)
        return chosen

    def _evict_terminal_groups(global_steps: int, partition_id: str, eviction_reasons: Any) -> Any:
        failed = eviction_reasons[2]
        if partition_id == "train" and failed:
            replaced(set(failed))
        return evict(global_steps, partition_id, eviction_reasons)

    replay_buffer._select_prompt_uids = _select_prompt_uids
    replay_buffer._evict_terminal_groups = _evict_terminal_groups
    return True


REASON = "gndpo_failure"
"""Tag of a prompt with the reason why one of its responses failed."""


@patches("failure_reasons")
def keep_reasons(agent_loop: ModuleType) -> bool:
    """Make the agent loop's worker store why a response failed, in the tag that says that its prompt has failed."""
    worker_class = agent_loop.AgentLoopWorker
    original = worker_class._run_agent_loop

    @functools.wraps(original)
    async def _run_agent_loop(self: Any, sampling_params: Any, trajectory: Any, **kwargs: Any) -> Any:
        """Run stock verl's method."""
        try:
            return await original(self, sampling_params, trajectory, **kwargs)
        except Exception as error:
            # Only verl's newer trainers, which give each session a number, have TransferQueue.
            if "session_id" in kwargs:
                import transfer_queue as tq

                partition = "val" if trajectory["validate"] else "train"
                await tq.async_kv_put(key=kwargs["uid"], partition_id=partition, tag={REASON: describe_failure(error)})
            raise

    worker_class._run_agent_loop = _run_agent_loop
    return True


STAGES = {
    "_compute_teacher_logprobs": "teacher",
    "_compute_score": "reward",
    "process_vision_info": "images",
    "_compute_multi_modal_inputs": "images",
    "apply_chat_template": "prompt",
    "generate": "rollout engine",
}
"""By function of verl's agent loop, what has failed if an exception passed through it."""


def describe_failure(error: BaseException) -> str:
    """Return what has failed and why, in one line, such as "reward: ValueError: no number"."""
    stage, frame = "agent loop", error.__traceback__
    while frame is not None:
        name = frame.tb_frame.f_code.co_name
        if name in STAGES:
            stage = STAGES[name]
            break
        frame = frame.tb_next
    # Ray wraps the exception of another process, with that process's traceback as its text.
    error = getattr(error, "cause", None) or error
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{stage}: {type(error).__name__}: {lines[-1].strip()[:300] if lines else 'no message'}"
