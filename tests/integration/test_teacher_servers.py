# SPDX-License-Identifier: Apache-2.0
"""Teacher servers that die or hang while they are asked: verl's own with vLLM, and small ones for what takes many."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import ray
import torch
from verl.experimental.teacher_loop import MultiTeacherModelManager, teacher_model
from verl.experimental.teacher_loop.teacher_manager import AsyncTeacherLLMServerManager
from verl.experimental.teacher_loop.teacher_model import TeacherModelManager
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from tests import settings
from tests.helpers import verl_config
from tests.integration.helpers import hugging_face_log_probs
from tests.tiny_models import build_tiny
from verl_gndpo import verl_patches
from verl_gndpo.config import read_teacher_config
from verl_gndpo.teacher import server_client, server_start
from verl_gndpo.teacher.server import ServerTeacher, use_servers
from verl_gndpo.teacher.waiting import Patience, TeacherLostError
from verl_gndpo.verl_patches.server_start import limit_start_of_servers

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
VLLM = (
    "tensor_model_parallel_size=1 dtype=float32 enforce_eager=True max_model_len=64 max_num_batched_tokens=256 "
    "max_num_seqs=8 gpu_memory_utilization=0.05 free_cache_engine=False enable_sleep_mode=False"
)


class Teachers(NamedTuple):
    ours: ServerTeacher
    asks: AsyncTeacherLLMServerManager
    """What verl's agent loop asks."""

    manager: MultiTeacherModelManager

    def score(self, rows: list[tuple[str, list[int]]]) -> list[list[float] | Exception]:
        """Ask for rows (teacher, ids) at once. Return each row's log-probs of its tokens but the first, or its error.

        There is a limit, because a request that is lost would be waited for, for ever.
        """

        async def ask():
            requests = [self.asks.compute_teacher_logprobs_single(ids, routing_key=key) for key, ids in rows]
            return await asyncio.wait_for(asyncio.gather(*requests, return_exceptions=True), 400)

        answers = asyncio.run(ask())
        return [x if isinstance(x, BaseException) else x[1][:-1, 0].tolist() for x in answers]

    def restarts(self) -> int:
        return ray.get(self.ours._keeper.restarts.remote())

    def servers(self, key: str) -> list[str]:
        """Return the addresses that verl's load balancer has for a teacher."""
        return ray.get(self.manager.load_balancer_handle[key].get_all_servers.remote())

    def handles(self, key: str) -> list:
        """Return the actors behind these addresses."""
        balancer = self.manager.load_balancer_handle[key]
        found = {}
        while len(found) < len(self.servers(key)):
            address, handle = ray.get(balancer.acquire_server.remote(f"{time.monotonic()}"))
            found[address] = handle
        for address in found:
            balancer.release_server.remote(address)
        return list(found.values())


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        ray.init("local", num_cpus=64, num_gpus=5, include_dashboard=False, object_store_memory=200_000_000)
        yield
        ray.shutdown()


def start(gpus: int, *overrides: str) -> Teachers:
    config = verl_config("+teacher=server", f"teacher.n_gpus_per_node={gpus}", *overrides)
    config.data.max_prompt_length, config.data.max_response_length = 32, 16
    teacher = read_teacher_config(config)
    use_servers(config, teacher)
    pool = RayResourcePool([gpus], use_gpu=True, max_colocate_count=3)
    manager = MultiTeacherModelManager(config, pool)
    ours = ServerTeacher(teacher)
    return Teachers(ours, AsyncTeacherLLMServerManager(config, ours.clients(config, manager)), manager)


def process_of(handle) -> int:
    """Return the number of an actor's process."""
    return ray.get(handle.__ray_call__.remote(lambda _: os.getpid()))


@contextlib.contextmanager
def killing(seconds: float, *processes: int):
    """SIGKILL processes a while after the block has begun."""
    timer = threading.Timer(seconds, lambda: [os.kill(process, signal.SIGKILL) for process in processes])
    timer.start()
    yield
    timer.join()


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


# --- small servers ----------------------------------------------------------------------------------------------------


class SmallServer:
    """Answers as verl's servers do, with -1.0 times its id as each token's log-prob."""

    def __init__(self):
        self.state = "works"
        self.requests = 0

    async def launch(self):
        """Start the HTTP server, which only tells the health."""

        async def answer(reader, writer):
            await reader.readline()
            status = "503 Dead" if self.state == "dead" else "200 OK"
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def become(self, state):
        self.state = state

    async def count(self):
        return self.requests

    async def generate(self, request_id, prompt_ids, sampling_params, **_):
        self.requests += 1
        if self.state == "dead":
            raise RuntimeError("the engine is dead")
        while self.state == "hangs":
            await asyncio.sleep(0.1)
        if self.state == "slow":
            await asyncio.sleep(prompt_ids[0])
        if len(prompt_ids) > 5:
            raise ValueError(f"{len(prompt_ids)} tokens are too many")
        scores = [[-float(token)] for token in [*prompt_ids[1:], 0]]
        return SimpleNamespace(
            extra_fields={"prompt_ids": [[token] for token in prompt_ids], "prompt_logprobs": scores}
        )


class Idle:
    """The worker that verl starts beside a server."""


class SmallReplica(RolloutReplica):
    """Registered in verl as an inference engine is."""

    def get_ray_class_with_init_args(self):
        return RayClassWithInitArgs(cls=ray.remote(Idle))

    async def launch_servers(self):
        path = Path(self.model_config.path)
        if not path.exists():
            raise OSError(f"there is no {path}")
        self.servers = [ray.remote(SmallServer).options(name=f"small_{self.replica_rank}{self.name_suffix}").remote()]
        if path.read_text() == "hangs":
            await self.servers[0].become.remote("hangs")
            await self.servers[0].generate.remote("", [0], {})
        self._server_handle = self.servers[0]
        self._server_address = await self.servers[0].launch.remote()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model"
    path.write_text("")
    return path


SMALL = (
    *("+teacher.server.name=small", "+teacher.server.tensor_model_parallel_size=1"),
    *("teacher.timeout_s=6", "teacher.max_restarts=5"),
)


@pytest.fixture(scope="module")
def engine():
    """Register the small servers in verl."""
    RolloutReplicaRegistry.register("small", lambda: SmallReplica)
    # Ray's processes can't import this module.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def small(engine, weights):
    """A teacher with two servers. `max_restarts` suffices for all tests but the last one."""
    return start(2, f"teacher.model.path={weights}", *SMALL)


def test_a_server_that_does_not_start_is_told_of_and_ends_the_run(engine, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(server_start, "FIRST_LINE_S", 1.0)
    monkeypatch.setattr(verl_patches.server_start, "start_limit", lambda _: 5.0)
    original = TeacherModelManager._initialize_llm_servers
    monkeypatch.setattr(TeacherModelManager, "_initialize_llm_servers", original)
    (tmp_path / "model").write_text("hangs")
    path = f"{tmp_path / 'model'}"
    limit_start_of_servers(teacher_model, settings.teacher_config(path))
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(
            TimeoutError, match=f"servers 0 of teacher default had not loaded {path} within the limit of 5 s"
        ),
    ):
        start(1, f"teacher.model.path={path}", *SMALL)
    assert f"servers 0 of teacher default have not loaded {path} after 4 s (limit: 5)" in caplog.text


def rows_of(key: str, count: int) -> tuple[list[tuple[str, list[int]]], list[list[float]]]:
    """Make rows and the log-probs that small servers have for them."""
    rows = [(key, [1, number, number + 1]) for number in range(count)]
    return rows, [[-float(token) for token in ids[1:]] for _, ids in rows]


def key_of(teachers: Teachers) -> str:
    (key,) = teachers.manager.load_balancer_handle
    return key


def test_the_error_of_a_row_is_the_rows_own(small):
    key = key_of(small)
    good, expected = rows_of(key, 4)
    *scores, error = small.score([*good, (key, [1] * 6)])
    assert scores == expected
    assert isinstance(error, ValueError) and "6 tokens are too many" in str(error)
    assert small.restarts() == 0


def test_a_server_whose_engine_is_dead_is_replaced_once_however_many_requests_it_had(small):
    key = key_of(small)
    before = small.servers(key)
    broken, _ = small.handles(key)
    ray.get(broken.become.remote("dead"))
    rows, expected = rows_of(key, 32)
    assert small.score(rows) == expected
    wait_for(lambda: len(small.servers(key)) == 2)
    now = small.servers(key)
    assert small.restarts() == 1
    assert len({*before, *now}) == 3
    # Requests went on while it was replaced, and now they go to both again.
    assert small.score(rows) == expected
    assert all(ray.get([handle.count.remote() for handle in small.handles(key)]))


def test_a_teacher_may_lose_all_of_its_servers(small):
    """Both die after they have got their requests."""
    key = key_of(small)
    handles = small.handles(key)
    ray.get([handle.become.remote("hangs") for handle in handles])
    before = small.restarts()
    rows, expected = rows_of(key, 8)
    with killing(2.0, *(process_of(handle) for handle in handles)):
        assert small.score(rows) == expected
    wait_for(lambda: len(small.servers(key)) == 2)
    assert small.restarts() == before + 2


def test_a_silent_server_is_told_of_and_replaced_and_a_slow_one_is_not(small, caplog, monkeypatch):
    monkeypatch.setattr(server_client, "FIRST_LINE_S", 1.0)
    key = key_of(small)
    one, other = small.handles(key)
    before = small.restarts()
    ray.get([one.become.remote("slow"), other.become.remote("slow")])
    # Each of them answers every second or two, and the last time after more than the limit.
    rows = [(key, [seconds, 3]) for seconds in (*range(1, 9), *range(1, 9))]
    assert small.score(rows) == [[-3.0]] * 16
    assert small.restarts() == before
    ray.get([one.become.remote("works"), other.become.remote("hangs")])
    rows, expected = rows_of(key, 8)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert small.score(rows) == expected
    assert small.restarts() == before + 1
    lines = [line for line in caplog.messages if "has answered none of the 4 requests" in line]
    # After 1, 2 and 4 s.
    assert 2 <= len(lines) <= 3 and all("(limit: 6)" in line for line in lines)


def test_servers_that_are_lost_too_often_end_the_run_with_the_last_reason(small, weights):
    """This has to be the last test with these servers."""
    key = key_of(small)
    wait_for(lambda: len(small.servers(key)) == 2)
    assert small.restarts() == 4
    weights.unlink()
    one, other = small.handles(key)
    os.kill(process_of(one), signal.SIGKILL)
    rows, expected = rows_of(key, 8)
    assert small.score(rows) == expected
    wait_for(lambda: has_failed(small))
    error = rf"teacher was lost: server .*has not started: OSError: there is no {weights}\. .*teacher\.max_restarts=5"
    with pytest.raises(TeacherLostError, match=error):
        small.ours.score(None)
    os.kill(process_of(other), signal.SIGKILL)
    (answer,) = small.score([(key, [1, 2])])
    assert isinstance(answer, TeacherLostError)


def has_failed(teachers: Teachers) -> bool:
    try:
        teachers.restarts()
    except TeacherLostError:
        return True
    return False


# --- vLLM -------------------------------------------------------------------------------------------------------------

ROWS = [(key, [ids + shift for ids in range(5, 17)]) for key in "ab" for shift in (0, 40, 80)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return {key: build_tiny("qwen3_vl", tmp_path_factory.mktemp(key), seed=seed) for seed, key in enumerate("ab")}


@pytest.fixture(scope="module")
def expected(paths):
    """Return the log-probs of `ROWS`, but of each row's first token, under each row's own teacher."""
    scores = []
    for key, ids in ROWS:
        row = {"ids": torch.tensor(ids), "inputs": {}, "response": torch.tensor(ids[1:])}
        scores += hugging_face_log_probs(paths[key], [row], 1.0, without_placeholders=True)
    return scores


@pytest.fixture(scope="module")
def vllm(paths):
    """Two teachers with a server each."""
    models = [f"+teacher.models.{key}.path={path}" for key, path in paths.items()]
    return start(2, *models, *(f"+teacher.server.{setting}" for setting in VLLM.split()))


def assert_scored(scores: list, expected: list) -> None:
    for row, (ours, theirs) in enumerate(zip(scores, expected, strict=True)):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-3, rtol=0, err_msg=f"row {row}")


def engine_of(server: int) -> int:
    """Return the process of the engine that belongs to a server's."""
    family = psutil.Process(server).children(recursive=True)
    (engine,) = [child.pid for child in family if "EngineCore" in " ".join(child.cmdline())]
    return engine


def test_servers_that_are_killed_while_they_score_are_replaced_and_score_the_same(vllm, expected):
    """Of one teacher the engine is killed, of the other the HTTP server, which leaves an engine behind."""
    assert_scored(vllm.score(ROWS), expected)
    one, other = (process_of(vllm.handles(key)[0]) for key in "ab")
    engines = [engine_of(one), engine_of(other)]
    for engine in engines:
        os.kill(engine, signal.SIGSTOP)
    with killing(2.0, engines[0], other):
        assert_scored(vllm.score(ROWS), expected)
    assert vllm.restarts() == 2
    assert not any(psutil.pid_exists(process) for process in (one, other, *engines))


def test_a_server_whose_engine_hangs_is_replaced_and_scores_the_same(vllm, expected, monkeypatch):
    monkeypatch.setattr(vllm.asks.teacher_client["a"], "_patience", Patience(60))
    server = process_of(vllm.handles("a")[0])
    engine = engine_of(server)
    os.kill(engine, signal.SIGSTOP)
    assert_scored(vllm.score(ROWS), expected)
    assert vllm.restarts() == 3
    assert not any(psutil.pid_exists(process) for process in (server, engine))


def test_a_teacher_that_is_lost_too_often_ends_with_an_error_that_says_so(vllm, expected):
    """This has to be the last test with these servers. The other teacher still scores."""
    os.kill(engine_of(process_of(vllm.handles("a")[0])), signal.SIGKILL)
    scores = vllm.score(ROWS)
    for error in scores[:3]:
        assert isinstance(error, TeacherLostError)
        assert "of teacher a: EngineDeadError" in str(error.cause) and "teacher.max_restarts=3" in str(error.cause)
    assert_scored(scores[3:], expected[3:])
