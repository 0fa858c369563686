# SPDX-License-Identifier: Apache-2.0
"""The finding that a check returns, and what all checks use."""

from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import OmegaConf

Status = Literal["ok", "warning", "error"]


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

    def __str__(self) -> str:
        """Return the finding in one line, without its status."""
        return f"{self.name}: {self.detail}{f' -> {self.remedy}' if self.remedy else ''}"


class DoctorError(ValueError):
    """A run can't start; the message lists every reason, each with its remedy."""


def describe_error(error: Exception) -> str:
    """Return type and message of an exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def select(config: Any, key: str, default: Any = None) -> Any:
    """Return the value of a dotted key; `default` if it is missing or null, or if there is no config."""
    if config is None:
        return default
    value = OmegaConf.select(config, key)
    return default if value is None else value
