# SPDX-License-Identifier: Apache-2.0
"""Keeps what the signal carries from step to step in the folder of a step's checkpoint."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from verl_gndpo.advantage import SignalState

FILE = "gndpo_signal_state.json"


def step_folder(trainer: Any, step: int) -> Path:
    """Return the folder of a step's checkpoint, as verl names it.

    Args:
        trainer: verl's section `trainer`.
        step: the global step.
    """
    return Path(trainer.default_local_dir) / f"global_step_{step}"


def save_state(folder: str | Path, state: SignalState) -> None:
    """Write the state completely or not at all.

    Args:
        folder: of the step's checkpoint; made if missing.
        state: what to write.
    """
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    temporary.write_text(json.dumps(asdict(state)))
    temporary.replace(path)


def load_state(folder: str | Path) -> SignalState | None:
    """Read the state; return None if the checkpoint has none.

    Raises:
        ValueError: the file is not one that `save_state` writes; the message names it.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        return SignalState(**{name: float(value) for name, value in json.loads(path.read_text()).items()})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no state of the signal: {error}; without it the average starts anew") from error
