# SPDX-License-Identifier: Apache-2.0
"""How long to wait for a teacher, when to say so, and what its loss is called."""

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

    def __init__(self, timeout_s: float | None):
        """
        Args:
            timeout_s: `teacher.timeout_s`.
        """
        self._timeout_s = timeout_s
        self._longest: float | None = None

    def has_taken(self, seconds: float) -> None:
        """Take note of a wait that has ended with an answer."""
        self._longest = max(seconds, self._longest or 0.0)

    @property
    def limit(self) -> float:
        """Return the limit of the next wait, in seconds."""
        if self._timeout_s is not None:
            return self._timeout_s
        if self._longest is None:
            return FIRST_LIMIT_S
        return max(LIMIT_FACTOR * self._longest, LEAST_LIMIT_S)


def first_line(error: BaseException) -> str:
    """Return type and message of an exception in one line.

    Of one that Ray has brought from another process, return those of the original.
    """
    error = getattr(error, "cause", None) or error
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
