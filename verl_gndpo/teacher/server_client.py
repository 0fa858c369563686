# SPDX-License-Identifier: Apache-2.0
"""What verl's agent loop asks for a teacher's log-probs: clients of servers that have a keeper (`server_keeper.py`)."""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig
from ray.exceptions import RayActorError
from verl.workers.rollout.llm_server import LLMServerClient

from verl_gndpo.teacher.server_keeper import actor_id
from verl_gndpo.teacher.waiting import FIRST_LINE_S, Patience, first_line

logger = logging.getLogger(__name__)


class _SilentError(Exception):
    """A server has not answered anything within the limit."""


@dataclass
class _Server:
    """A server as one process knows it."""

    identity: str
    """`actor_id` of the actor that takes its requests."""

    name: str
    """For messages."""

    requests: int = 0
    """Of this process, which it has not answered."""

    since: float = 0.0
    """When it was asked or has answered last, the latter if requests were waiting then; by time.monotonic."""

    next_line: float = FIRST_LINE_S
    """After how many seconds the log says that it is silent."""

    @property
    def silence(self) -> float:
        """Return how long it has been silent, in seconds."""
        return time.monotonic() - self.since

    def begin_silence(self) -> None:
        self.since, self.next_line = time.monotonic(), FIRST_LINE_S


class KeptServerClient(LLMServerClient):
    """A client of verl that sends a request again when its server is lost.

    A server is also lost when it is silent for longer than the limit. Any answer to this process begins a new silence,
    because requests wait for each other.
    """

    def __init__(self, config: DictConfig, balancer: Any, key: str, keeper: Any, timeout_s: float | None):
        """
        Args:
            config: verl's whole config.
            balancer: verl's load balancer of the teacher's servers.
            key: of the teacher.
            keeper: a handle of the actor `ServerKeeper`.
            timeout_s: `teacher.timeout_s`.
        """
        super().__init__(config=config, load_balancer_handle=balancer)
        self._key, self._keeper = key, keeper
        self._patience = Patience(timeout_s)
        self._servers: dict[str, _Server] = {}
        self._asked: dict[str, _Server] = {}
        self._reports: dict[tuple[str, bool], asyncio.Future] = {}

    async def generate(self, request_id: str, **request: Any) -> Any:
        """Return a server's answer to a request.

        Args:
            request_id: no other request that waits may have it.
            request: as in verl's client.

        Raises:
            TeacherLostError: servers were lost more often than `teacher.max_restarts`.
            What a server that works raises.
        """
        while True:
            asking = asyncio.ensure_future(super().generate(request_id, **request))
            try:
                return await self._wait(asking, request_id)
            except Exception as error:
                failure = error
            finally:
                asking.cancel()
                server = self._asked.pop(request_id, None)
                if server is not None:
                    server.requests -= 1
            # Without a server, it is the load balancer that has failed.
            if server is None or not await self._report(server, failure):
                raise failure

    async def _acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
        address, handle = await super()._acquire_server(request_id, **extra)
        identity = actor_id(handle)
        name = f"server {address} of teacher {self._key}"
        server = self._asked[request_id] = self._servers.setdefault(identity, _Server(identity, name))
        if server.requests == 0:
            server.begin_silence()
        server.requests += 1
        return address, handle

    async def _wait(self, asking: asyncio.Future, request_id: str) -> Any:
        """Return the answer to a request, and say in the log that its server is silent.

        Raises:
            _SilentError: the server was silent for longer than the limit.
        """
        while not asking.done():
            limit = until = self._patience.limit
            server, silence = self._asked.get(request_id), 0.0
            if server is not None:
                silence = server.silence
                if silence > limit:
                    raise _SilentError(f"no answer within the limit of {limit:.0f} s (teacher.timeout_s)")
                if silence >= server.next_line:
                    logger.warning(
                        "waiting for the teacher: %s has answered none of the %d requests of this process for %.0f s "
                        "(limit: %.0f)",
                        server.name,
                        server.requests,
                        silence,
                        limit,
                    )
                    server.next_line = max(2 * server.next_line, silence)
                until = min(server.next_line, limit)
            else:
                until = min(FIRST_LINE_S, limit)
            await asyncio.wait({asking}, timeout=max(until - silence, 0.01))
        answer = asking.result()
        server = self._asked[request_id]
        self._patience.has_taken(server.silence)
        server.begin_silence()
        return answer

    async def _report(self, server: _Server, failure: Exception) -> bool:
        """Return True once the request is to be sent again, False if it has failed although its server works."""
        is_lost = isinstance(failure, (_SilentError, RayActorError))
        reason = str(failure) if isinstance(failure, _SilentError) else first_line(failure)
        # All requests of a lost server fail at once.
        name = (server.identity, is_lost)
        if name not in self._reports:
            report = self._keeper.report.remote(self._key, server.identity, reason, is_lost)
            self._reports[name] = asyncio.ensure_future(_result(report))
            self._reports[name].add_done_callback(lambda _: self._reports.pop(name))
        return await asyncio.shield(self._reports[name])


async def _result(reference: Any) -> Any:
    return await reference
