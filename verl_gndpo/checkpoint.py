# SPDX-License-Identifier: Apache-2.0
"""What the signal carries from step to step, in the folder of a step's checkpoint."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from verl_gndpo.advantage import SignalState

FILE = "gndpo_signal_state.json"


def save_state(folder: str | Path, state: SignalState) -> None:
    """Write it, whole or not at all.

    Args:
        folder: of the step, `global_step_<n>`; made if missing.
    """
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    temporary.write_text(json.dumps(asdict(state)))
    temporary.replace(path)


def load_state(folder: str | Path) -> SignalState | None:
    """Read it; None where the checkpoint has none.

    Raises:
        ValueError: the file is not what `save_state` writes; names it.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        return SignalState(**{name: float(value) for name, value in json.loads(path.read_text()).items()})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no state of the signal: {error}; without it the average starts anew") from error
