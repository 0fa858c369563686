# SPDX-License-Identifier: Apache-2.0
"""Prompts that fail or never end, in verl's own replay buffers and TransferQueue; agent loops of verl that fail."""

import asyncio
import logging
import os
import signal
import threading
import time

import pytest
import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from verl_gndpo.observe import stalled_rollouts
from verl_gndpo.observe.lost_prompts import LostPrompts, LostPromptsError
from verl_gndpo.observe.stalled_rollouts import StalledRollouts, StalledRolloutsError
from verl_gndpo.verl_patches.replay_buffer import REASON


def put_prompt(uid: str, sessions: int, reason: str | None = None) -> None:
    """Put a prompt into the queue, with the responses that it has, as verl's agent loop does."""
    tag = {"is_prompt": True, "global_steps": 1, "status": "finished" if reason is None else "failure"}
    tq.kv_put(key=uid, partition_id="train", tag=tag | ({} if reason is None else {REASON: reason}))
    if sessions:
        keys = [f"{uid}_{session}_0" for session in range(sessions)]
        fields = TensorDict({"responses": torch.zeros(sessions, 1)}, batch_size=sessions)
        tags = [{"status": "success", "seq_len": 3}] * sessions
        tq.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=tags)


def make_buffer(kind: type[ReplayBuffer]) -> ReplayBuffer:
    refilled = []

    def refill(count: int) -> None:
        refilled.append(count)
        for number in range(count):
            put_prompt(f"new{len(refilled)}x{number}", 2)

    buffer = kind(
        trainer_mode="sync",
        trainer_config=OmegaConf.create({}),
        max_off_policy_threshold=None,
        max_off_policy_strategy="drop",
        sampler_kwargs=OmegaConf.create({}),
        poll_interval=0.01,
        refill_fn=refill,
    )
    buffer.refilled = refilled
    return buffer


@pytest.fixture(autouse=True)
def empty_queue(queue):
    yield
    for partition, items in (tq.kv_list() or {}).items():
        if items:
            tq.kv_clear(keys=list(items), partition_id=partition)


def test_a_batch_with_failed_prompts_is_counted_once(caplog):
    buffer = make_buffer(ReplayBuffer)
    lost = LostPrompts(buffer, prompts=4, responses=2, limit=0.5)
    for uid, sessions, reason in (
        ("a", 2, None),
        ("b", 1, "images: OSError: truncated"),
        ("c", 0, "reward: X"),
        ("d", 2, None),
    ):
        put_prompt(uid, sessions, reason)
    with caplog.at_level(logging.WARNING):
        batch, _ = buffer.sample(global_steps=1, partition_id="train", batch_size=4)
    assert len(batch) == 5
    assert lost.take() == {"gndpo/lost_prompts": 2, "gndpo/lost_share": 3 / 8}
    assert lost.take() == {"gndpo/lost_prompts": 0, "gndpo/lost_share": 0}
    assert "prompt b has failed: images: OSError: truncated" in caplog.text


@pytest.mark.parametrize(("limit", "raises"), [(0.0, True), (0.24, True), (0.25, False), (1.0, False)])
def test_the_limit_is_the_largest_share_that_may_be_lost(limit, raises):
    buffer = make_buffer(ReplayBuffer)
    lost = LostPrompts(buffer, prompts=2, responses=2, limit=limit)
    put_prompt("a", 2)
    put_prompt("b", 1, "teacher: RuntimeError: gone")
    if raises:
        with pytest.raises(LostPromptsError, match=r"1 prompts .* 25% .*max_lost_share=.*teacher: RuntimeError: gone"):
            buffer.sample(global_steps=1, partition_id="train", batch_size=2)
    else:
        buffer.sample(global_steps=1, partition_id="train", batch_size=2)
        assert lost.take()["gndpo/lost_share"] == 0.25


def test_a_batch_of_which_nothing_is_left_ends_with_the_reason():
    buffer = make_buffer(ReplayBuffer)
    LostPrompts(buffer, prompts=2, responses=2, limit=0.5)
    put_prompt("a", 0, "rollout engine: EngineDeadError: killed")
    put_prompt("b", 0, "rollout engine: EngineDeadError: killed")
    with pytest.raises(LostPromptsError, match="which 2 of them have: rollout engine: EngineDeadError: killed"):
        buffer.sample(global_steps=1, partition_id="train", batch_size=2)


def test_prompts_that_an_asynchronous_trainer_generates_anew_are_counted():
    buffer = make_buffer(ReplayBufferAsync)
    lost = LostPrompts(buffer, prompts=2, responses=2, limit=0.5)
    put_prompt("a", 2)
    put_prompt("b", 1, "reward: ValueError: x")
    batch, _ = buffer.sample(global_steps=1, partition_id="train", batch_size=2)
    assert buffer.refilled == [1] and len(batch) == 4
    # Of three prompts that were generated, one has failed.
    assert lost.take() == {"gndpo/lost_prompts": 1, "gndpo/lost_share": pytest.approx(1 / 3)}


def test_an_asynchronous_trainer_does_not_generate_for_ever():
    buffer = make_buffer(ReplayBufferAsync)
    LostPrompts(buffer, prompts=2, responses=2, limit=0.5)
    buffer.refill_fn = lambda count: [put_prompt(f"again{time}", 0, "reward: ValueError: x") for time in range(count)]
    put_prompt("a", 0, "reward: ValueError: x")
    put_prompt("b", 0, "reward: ValueError: x")
    with pytest.raises(LostPromptsError, match="reward: ValueError: x"):
        buffer.sample(global_steps=1, partition_id="train", batch_size=2)


@pytest.mark.parametrize("validate", [False, True])
def test_the_worker_stores_why_a_response_has_failed(validate):
    """An agent that verl does not know: the assertion of its own method."""
    partition = "val" if validate else "train"
    tq.kv_put(key="p", partition_id=partition, tag={"is_prompt": True, "global_steps": 1, "status": "running"})
    trajectory = {"step": 1, "sample_index": 0, "rollout_n": 0, "validate": validate}
    worker = object.__new__(AgentLoopWorker)
    worker.config = OmegaConf.create({})
    run = worker._run_agent_loop({}, trajectory, agent_name="nobody", trace=False, uid="p", session_id=0)
    with pytest.raises(AssertionError, match="nobody"):
        asyncio.run(run)
    tag = tq.kv_list(partition_id=partition)[partition]["p"]
    assert tag["status"] == "running" and tag["is_prompt"]
    assert tag[REASON].startswith("agent loop: AssertionError: Agent loop nobody not registered")


def start_prompt(uid: str, partition: str = "train") -> None:
    tq.kv_put(key=uid, partition_id=partition, tag={"is_prompt": True, "global_steps": 1, "status": "running"})


@ray.remote(num_cpus=0)
class Worker:
    def process(self) -> int:
        return os.getpid()


@pytest.mark.parametrize("partition", ["train", "val"])
@pytest.mark.parametrize("kind", [ReplayBuffer, ReplayBufferAsync])
def test_a_wait_without_a_response_is_told_of_and_ends(queue, monkeypatch, caplog, kind, partition):
    monkeypatch.setattr(stalled_rollouts, "FIRST_LINE_S", 0.3)
    monkeypatch.setattr(stalled_rollouts, "ANSWER_S", 0.2)
    buffer = make_buffer(kind)
    StalledRollouts(buffer, limit=1.0, workers=dict)
    start_prompt("a", partition)
    begin = time.monotonic()
    message = r"no response was finished within 1 s \(algorithm\.gndpo\.rollout_timeout_s\): 1 of 1 prompts are not"
    with caplog.at_level(logging.WARNING), pytest.raises(StalledRolloutsError, match=message):
        buffer.sample(global_steps=1, partition_id=partition, batch_size=1)
    assert 1.0 < time.monotonic() - begin < 5
    assert caplog.text.count("no response was finished for 0 s (limit: 1)") >= 1
    assert "all workers answer" in caplog.text


def test_a_worker_that_hangs_or_is_dead_is_named(queue):
    workers = {f"reward worker {number}": Worker.remote() for number in range(3)}
    processes = [ray.get(worker.process.remote()) for worker in workers.values()]
    assert stalled_rollouts.find_silent(workers) == []
    os.kill(processes[0], signal.SIGSTOP)
    os.kill(processes[1], signal.SIGKILL)
    try:
        assert stalled_rollouts.find_silent(workers, 5.0) == ["reward worker 0", "reward worker 1 (dead)"]
    finally:
        os.kill(processes[0], signal.SIGKILL)


def test_responses_that_come_one_by_one_may_take_longer_than_the_limit(queue):
    buffer = make_buffer(ReplayBuffer)
    StalledRollouts(buffer, limit=1.0, workers=dict)
    uids = ["a", "b", "c", "d"]
    for uid in uids:
        start_prompt(uid)
    timers = [threading.Timer(0.6 * number, put_prompt, (uid, 1)) for number, uid in enumerate(uids, 1)]
    for timer in timers:
        timer.start()
    begin = time.monotonic()
    buffer.sample(global_steps=1, partition_id="train", batch_size=4)
    assert time.monotonic() - begin > 2.0


def test_what_happens_between_two_waits_does_not_count(queue):
    """In each step, the first look at the prompts finds nothing, as in the step before."""
    buffer = make_buffer(ReplayBuffer)
    StalledRollouts(buffer, limit=1.0, workers=dict)
    for uid in ("a", "b", "c"):
        start_prompt(uid)
        threading.Timer(0.1, put_prompt, (uid, 0)).start()
        with pytest.raises(RuntimeError, match="no materializable trajectories"):
            buffer.sample(global_steps=1, partition_id="train", batch_size=1)
        tq.kv_clear(keys=[uid], partition_id="train")
        time.sleep(0.7)


def test_the_limit_follows_the_longest_wait_of_the_run(queue, monkeypatch):
    monkeypatch.setattr(stalled_rollouts, "FIRST_LIMIT_S", 3.0)
    monkeypatch.setattr(stalled_rollouts, "LEAST_LIMIT_S", 0.1)
    monkeypatch.setattr(stalled_rollouts, "LIMIT_FACTOR", 2.0)
    buffer = make_buffer(ReplayBuffer)
    StalledRollouts(buffer, limit=None, workers=dict)
    for uid in ("a", "b"):
        start_prompt(uid)
    threading.Timer(0.5, put_prompt, ("a", 1)).start()
    begin = time.monotonic()
    with pytest.raises(StalledRolloutsError, match="within 1 s"):
        buffer.sample(global_steps=1, partition_id="train", batch_size=2)
    assert 1.4 < time.monotonic() - begin < 2.5
