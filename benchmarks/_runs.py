# SPDX-License-Identifier: Apache-2.0
"""Tiny models and data for runs of a recipe on the CPU, which `tests.end_to_end.harness.Run` starts."""

from pathlib import Path

from examples.quickstart import diagrams
from tests.end_to_end import harness
from tests.tiny_models import build_tiny


def prepare(folder: Path, *, batch: int, n: int, **more: str) -> dict[str, str]:
    """Write a student, a teacher and data into a folder; return the environment of a run with them.

    Args:
        batch: prompts of a step.
        n: responses to a prompt.
        more: further variables.
    """
    build_tiny("qwen2_5_vl", folder / "student", seed=0)
    build_tiny("qwen2_5_vl", folder / "teacher", seed=1, layers=3)
    diagrams.write_dataset(folder / "data", train=256, test=8)
    return harness.settings(folder, folder / "data", BATCH=str(batch), N=str(n), **more)


def overrides(steps: int, checkpoints: Path, *more: str) -> list[str]:
    """Return the arguments of a run of so many steps, however often it reads the data for them."""
    return harness.overrides(steps, checkpoints, "trainer.total_epochs=1000", *more)
