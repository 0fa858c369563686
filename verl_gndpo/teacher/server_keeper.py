# SPDX-License-Identifier: Apache-2.0
"""Replaces verl's teacher servers when they are lost (`teacher.backend=server`).

A server has no state but its weights, so that a new one answers what the lost one was asked. The clients in
`server_client.py` report servers that fail or do not answer. The keeper decides whether such a server is lost, ends
what is left of it, starts another one of the same kind on the same GPUs, and exchanges the two in verl's load balancer.
"""

import asyncio
import contextlib
import logging
import time
import urllib.error
import urllib.request
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl_gndpo.config import TeacherConfig
from verl_gndpo.teacher.server_start import limited_start
from verl_gndpo.teacher.waiting import TeacherLostError, first_line, start_limit

logger = logging.getLogger(__name__)

ANSWER_LIMIT_S = 60.0
"""A server of which a request has failed is lost unless it says within this time that it works."""

GRACE_S = 10.0
"""How long to wait for processes that are ended, or that may not answer."""

Process = tuple[str, int, int]
"""Ray's id of a node, the number of a process on it, and when it was started, in the kernel's ticks."""


@dataclass(frozen=True)
class Server:
    """What is known of a server without the libraries of its inference engine."""

    key: str
    """Of its teacher, in verl's section `distillation`."""

    rank: int
    """Of its replica among those of the teacher."""

    address: str
    """Of its HTTP server. verl's load balancer calls it by this name."""

    actors: list[Any]
    """All that verl has started for it. The first one takes its requests."""

    processes: list[Process]
    """Of the actors, and those that they have started."""

    def __str__(self) -> str:
        return f"server {self.address} of teacher {self.key}"


def actor_id(handle: Any) -> str:
    """Return Ray's id of an actor. No other one gets it, unlike an address."""
    return handle._actor_id.hex()


def keep_servers(manager: Any, teacher: TeacherConfig) -> Any:
    """Start the keeper of all servers of a run.

    Args:
        manager: verl's `MultiTeacherModelManager`, whose servers are ready.
        teacher: a resolved `teacher` section with `backend=server`.

    Returns:
        A handle of the actor `ServerKeeper`.
    """
    replicas = {key: one.rollout_replicas for key, one in manager.teacher_model_managers.items()}
    servers = [_describe(key, replica) for key, found in replicas.items() for replica in found]
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    keeper = ray.remote(ServerKeeper).options(num_cpus=0, scheduling_strategy=here)
    return keeper.remote(servers, [ray.put(replicas)], manager.load_balancer_handle, teacher)


class ServerKeeper:
    """A Ray actor, whose methods run side by side in one thread."""

    def __init__(
        self, servers: list[Server], replicas: list[ray.ObjectRef], balancers: dict[str, Any], teacher: TeacherConfig
    ):
        """
        Args:
            servers: all that run.
            replicas: one reference to all of verl's replicas, a list for each teacher's key. They are not read before
                one is replaced, because that imports the inference engine.
            balancers: verl's load balancers by teacher's key.
            teacher: a resolved `teacher` section with `backend=server`.
        """
        self._servers = {actor_id(server.actors[0]): server for server in servers}
        (self._replicas,) = replicas
        self._balancers, self._teacher = balancers, teacher
        self._lost: defaultdict[str, set[str]] = defaultdict(set)
        self._replacements: defaultdict[str, set[asyncio.Task]] = defaultdict(set)
        self._restarts = 0
        self._failure = ""

    async def restarts(self) -> int:
        """Return how often servers were replaced in this run.

        Raises:
            TeacherLostError: one was lost, and `teacher.max_restarts` does not allow another.
        """
        if self._failure:
            raise TeacherLostError(self._failure)
        return self._restarts

    async def report(self, key: str, identity: str, reason: str, is_lost: bool) -> bool:
        """Decide what becomes of a request that has failed, and replace its server if that is lost.

        Args:
            key: of the teacher.
            identity: `actor_id` of the actor that was asked.
            reason: what has happened to the request.
            is_lost: True if the server is lost for certain. Otherwise it is asked whether it works.

        Returns:
            False if the request has failed although its server works. True, once the teacher has a server, if the
            request is to be sent again.

        Raises:
            TeacherLostError: as `restarts`.
        """
        server = self._servers.get(identity)
        if server is not None and not is_lost and await asyncio.to_thread(_works, server.address):
            return False
        # Other clients may have reported it before, or while it was asked.
        if server is not None and self._servers.pop(identity, None) is not None:
            self._lost[key].add(server.address)
            task = asyncio.create_task(self._replace(server, reason))
            self._replacements[key].add(task)
            task.add_done_callback(self._replacements[key].discard)
        await self.restarts()
        while not any(other.key == key for other in self._servers.values()):
            await asyncio.wait(self._replacements[key], return_when=asyncio.FIRST_COMPLETED)
            await self.restarts()
        await self._forget_lost(key)
        return True

    async def _forget_lost(self, key: str) -> None:
        """Take the lost servers of a teacher that has others out of its balancer, which must never be empty."""
        lost = self._lost.pop(key, None)
        if lost:
            await self._balancers[key].remove_servers.remote(sorted(lost))

    async def _replace(self, lost: Server, reason: str) -> None:
        """Put a new server in the place of a lost one."""
        begin = time.monotonic()
        server = None
        while server is None:
            if self._restarts >= self._teacher.max_restarts:
                self._failure = (
                    f"the teacher was lost: {lost}: {reason}. Servers have been replaced {self._restarts} times, which "
                    f"is what teacher.max_restarts={self._teacher.max_restarts} allows. The last checkpoint can be "
                    "resumed."
                )
                await asyncio.to_thread(_kill, lost.actors, lost.processes)
                return
            self._restarts += 1
            logger.warning(
                "the teacher was lost and is replaced (%d of %d times): %s: %s",
                self._restarts,
                self._teacher.max_restarts,
                lost,
                reason,
            )
            await asyncio.to_thread(_kill, lost.actors, lost.processes)
            try:
                # verl starts workers with calls that block.
                server = await asyncio.to_thread(self._start, lost.key, lost.rank)
            # Whatever an engine raises when it starts.
            except Exception as error:
                reason = f"a new one has not started: {first_line(error)}"
        # It may have got the port of a lost one.
        self._lost[lost.key].discard(server.address)
        await self._balancers[lost.key].add_servers.remote({server.address: server.actors[0]})
        self._servers[actor_id(server.actors[0])] = server
        await self._forget_lost(lost.key)
        logger.warning("%s has taken the place of %s after %.0f s", server, lost, time.monotonic() - begin)

    def _start(self, key: str, rank: int) -> Server:
        """Start a replica like the one that had this rank, and wait until its server is ready.

        Raises:
            TimeoutError: it was not ready within the limit.
            What the engine raises.
        """
        old = ray.get(self._replicas)[key][rank]
        replica = type(old)(
            replica_rank=rank,
            config=old.config,
            model_config=old.model_config,
            gpus_per_node=old.gpus_per_node,
            is_teacher_model=True,
            # Ray may still know the names of the lost actors.
            name_suffix=f"{old.name_suffix.removeprefix('_')}_{self._restarts}",
        )
        try:
            with limited_start(key, replica.model_config.path, lambda: [replica], start_limit(self._teacher)):
                asyncio.run(replica.init_colocated(old.resource_pool))
        except BaseException:
            actors = [*replica.servers, *replica.workers]
            _kill(actors, _processes(actors, GRACE_S))
            raise
        return _describe(key, replica)


def _describe(key: str, replica: Any) -> Server:
    """Describe verl's `RolloutReplica` whose server is ready."""
    actors = [*replica.servers, *replica.workers]
    return Server(key, replica.replica_rank, replica.server_address, actors, _processes(actors, ANSWER_LIMIT_S))


def _processes(actors: list[Any], limit: float) -> list[Process]:
    """Return the processes of those actors that answer within a limit, and of what they have started."""
    asked = [actor.__ray_call__.remote(_own_processes) for actor in actors]
    answers = ray.wait(asked, num_returns=len(asked), timeout=limit)[0] if asked else []
    found: list[Process] = []
    for answer in answers:
        with contextlib.suppress(ray.exceptions.RayError):
            found += ray.get(answer)
    return found


def _own_processes(_: Any) -> list[Process]:
    node, this = ray.get_runtime_context().get_node_id(), psutil.Process()
    return [(node, process.pid, _start_of(process.pid)) for process in (this, *this.children(recursive=True))]


def _start_of(process: int) -> int:
    """Return when a process was started; no two that had the same number agree in this. 0 if there is none."""
    try:
        # The name, in brackets, may hold spaces.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0


def _kill(actors: list[Any], processes: list[Process]) -> None:
    """End actors and processes, also those that were stopped and can't be told to, and wait for it."""
    for actor in actors:
        ray.kill(actor, no_restart=True)
    by_node = defaultdict(list)
    for node, number, start in processes:
        by_node[node].append((number, start))
    killed = []
    for node, found in by_node.items():
        on_node = NodeAffinitySchedulingStrategy(node, soft=False)
        killed.append(_kill_processes.options(num_cpus=0, scheduling_strategy=on_node).remote(found))
    if killed:
        # A node may be gone, too.
        ray.wait(killed, num_returns=len(killed), timeout=3 * GRACE_S)


@ray.remote
def _kill_processes(processes: list[tuple[int, int]]) -> None:
    found = []
    for number, start in processes:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(number)
            if _start_of(number) == start:
                found += [process, *process.children(recursive=True)]
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.kill()
    # What they have held of an accelerator's memory is free after that.
    psutil.wait_procs(found, timeout=GRACE_S)


def _works(address: str) -> bool:
    """Ask a server's HTTP server for its health, which vLLM and SGLang answer at the same place."""
    # Without the proxy that the environment may name.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(f"http://{address}/health", timeout=ANSWER_LIMIT_S).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False
    return True
