# SPDX-License-Identifier: Apache-2.0
"""How long to wait for a teacher, when to say so, and what its loss is called."""

from verl_gndpo.config import TeacherConfig

FIRST_LINE_S = 30.0
"""After how long a wait is told. Each further line comes after twice the time of the one before."""

FIRST_LIMIT_S = 1800.0
"""Limit of the first scoring, which may compile kernels and compares scores, and of loading the weights."""

LEAST_LIMIT_S = 600.0
LIMIT_FACTOR = 10.0
"""A later one may take this many times what the longest has taken, and at least LEAST_LIMIT_S."""


class TeacherLostError(RuntimeError):
    """The teacher died, or did not answer within its limit, more often than `teacher.max_restarts`."""


class Patience:
    """The limit of a wait for an answer, which follows from how long earlier answers have taken."""

    def __init__(
        self,
        given: float | None,
        *,
        first: float = FIRST_LIMIT_S,
        least: float = LEAST_LIMIT_S,
        factor: float = LIMIT_FACTOR,
    ):
        """
        Args:
            given: a limit that does not change, in seconds; None: the limit follows.
            first: limit before the first answer, in seconds.
            least: of the later limits, in seconds.
            factor: how many times the longest wait a later one may take.
        """
        self._given, self._first, self._least, self._factor = given, first, least, factor
        self.longest: float | None = None
        """The longest wait that has ended with an answer, in seconds; None before the first."""

    def has_taken(self, seconds: float) -> None:
        """Take note of a wait that has ended with an answer."""
        self.longest = max(seconds, self.longest or 0.0)

    @property
    def limit(self) -> float:
        """Return the limit of the next wait, in seconds."""
        if self._given is not None:
            return self._given
        if self.longest is None:
            return self._first
        return max(self._factor * self.longest, self._least)


def start_limit(teacher: TeacherConfig) -> float:
    """Return how long workers or servers may take to start and load their weights, in seconds."""
    return max(FIRST_LIMIT_S, teacher.timeout_s or 0, teacher.nccl_timeout)


def first_line(error: BaseException) -> str:
    """Return type and message of an exception in one line.

    Of one that Ray has brought from another process, return those of the original.
    """
    error = getattr(error, "cause", None) or error
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
