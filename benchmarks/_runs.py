# SPDX-License-Identifier: Apache-2.0
"""Tiny models and data for runs of a recipe on the CPU, which `tests.end_to_end.harness.Run` starts."""

from pathlib import Path

from examples.quickstart import diagrams
from tests.end_to_end.harness import REPO
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
    models = {"STUDENT": str(folder / "student"), "TEACHER": str(folder / "teacher")}
    return models | {"DATA_DIR": str(folder / "data"), "BATCH": str(batch), "N": str(n), "LR": "1e-3"} | more


def overrides(steps: int, checkpoints: Path, *more: str) -> list[str]:
    """Return the arguments of a run of so many steps with a rule-based reward."""
    return [
        f"trainer.total_training_steps={steps}",
        "trainer.total_epochs=1000",
        f"trainer.default_local_dir={checkpoints}",
        "trainer.val_before_train=False",
        f"reward.custom_reward_function.path={REPO / 'examples' / 'quickstart' / 'reward.py'}",
        "reward.custom_reward_function.name=compute_score",
        *more,
    ]
