# SPDX-License-Identifier: Apache-2.0
"""The finding of a check, and what every check needs."""

from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import OmegaConf


@dataclass(frozen=True)
class Check:
    """One finding. Only an "error" keeps a run from starting."""

    name: str
    status: Literal["ok", "warning", "error"]
    detail: str
    remedy: str = ""


class DoctorError(ValueError):
    """A run can't start; the message lists every reason with what to do about it."""


def describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def select(config: Any, key: str, default: Any = None) -> Any:
    if config is None:
        return default
    value = OmegaConf.select(config, key)
    return default if value is None else value
