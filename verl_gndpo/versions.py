# SPDX-License-Identifier: Apache-2.0
"""Versions of verl: which ones were tested, and which one a module belongs to. Nothing else compares versions of verl.

Imports nothing of verl or torch, because every process of a run loads it.
"""

from pathlib import Path
from types import ModuleType
from typing import Literal

TESTED = ("0.9.0", "0.9.1")
"""Releases of verl on which the tests and a real loop pass. The last one is what the tests run on."""

TESTED_MAIN = "0.10.0.dev"
"""The version that verl's main branch calls itself; tested as of its commit 1dda039."""

REQUIREMENT = ">=0.9.0,<0.10"
"""What pyproject.toml asks for: older releases lack the v1 trainer as it is extended here."""

Verdict = Literal["tested", "untested", "too old"]


def judge(version: str) -> Verdict:
    """Return what is known about a version of verl."""
    if version in TESTED or version == TESTED_MAIN:
        return "tested"
    return "too old" if _key(version) < _key(TESTED[0]) else "untested"


def version_of(module: ModuleType) -> str:
    """Return the version of the verl that a module belongs to.

    A checkout on the path can hide the installed verl, whose version is all that importlib.metadata tells.
    """
    files = (folder / "version" / "version" for folder in Path(module.__file__ or "").parents)
    return next(file for file in files if file.is_file()).read_text().strip()


def _key(version: str) -> tuple[int, ...]:
    """Return the release numbers of a version. A development version counts as the release that it leads to."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
