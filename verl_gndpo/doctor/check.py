# SPDX-License-Identifier: Apache-2.0
"""The finding that a check returns, and what all checks use."""

from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import OmegaConf

Status = Literal["ok", "warning", "error"]

REASON_CHARS = 300
"""Limit of an exception's message in a finding. A path may turn out to be megabytes of text."""
FINDING_CHARS = 4000
"""Limit of a finding, which may quote a name from the data."""


@dataclass(frozen=True)
class Check:
    """One finding. Only an error keeps a run from starting."""

    name: str
    """The subject, such as "plugin" or "data"."""

    status: Status

    detail: str
    """What was found, and where."""

    remedy: str = ""
    """What to do about it; "" if there is nothing to do."""

    def __post_init__(self) -> None:
        """Make texts that quote files of any content fit for a terminal."""
        for name in ("name", "detail", "remedy"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def __str__(self) -> str:
        """Return the finding in one line, without its status."""
        return f"{self.name}: {self.detail}{f' -> {self.remedy}' if self.remedy else ''}"


class DoctorError(ValueError):
    """A run can't start; the message lists every reason, each with its remedy."""


def printable(text: str) -> str:
    """Return a text in one line of bounded length, without the characters that control a terminal or can't be written.

    Line breaks become spaces, and other such characters their escapes.
    """
    if len(text) > FINDING_CHARS:
        text = f"{text[: FINDING_CHARS // 2]} [...] {text[-FINDING_CHARS // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text)


def describe_error(error: BaseException) -> str:
    """Return type and message of an exception, the message in one line and cut to `REASON_CHARS`."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:REASON_CHARS]}{'...' * (len(message) > REASON_CHARS)}"


def select(config: Any, key: str, default: Any = None) -> Any:
    """Return the value of a dotted key; `default` if it is missing or null, or if there is no config."""
    if config is None:
        return default
    value = OmegaConf.select(config, key)
    return default if value is None else value
