# SPDX-License-Identifier: Apache-2.0
"""Keeps what verl does not in the folder of a step's checkpoint: the state of the signal, and which run it is from."""

import contextlib
import importlib.metadata
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from verl_gndpo.advantage import Signal, SignalState
from verl_gndpo.config import teacher_paths

FILE = "gndpo_signal_state.json"
RUN_FILE = "gndpo_run.json"
"""Says of which run a checkpoint is: models, data, signal, log and versions."""


DISK_IS_FULL = re.compile(r"No space left on device|Disk quota exceeded|unexpected pos \d+ vs \d+|iostream error")
"""What the system says when nothing more can be written, and what torch makes of that."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


@contextlib.contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Say that the disk is full where torch only says `unexpected pos 1518272 vs 1518160`.

    Args:
        folder: of the step's checkpoint, which is being written.

    Raises:
        CheckpointError: instead of such an exception. Any other one is raised as it is.
    """
    try:
        yield
    except Exception as error:
        said = DISK_IS_FULL.search(str(error))
        if said is None:
            raise
        parent = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(parent).free / 1e9
        complete = folder.parent / "latest_checkpointed_iteration.txt"
        last = f"global_step_{complete.read_text().strip()}" if complete.exists() else "none"
        raise CheckpointError(
            f"{folder} could not be written, most likely because its disk is full or a quota is used up ({free:.2f} GB "
            f"free here now; {said[0]!r}). Free space or set trainer.max_actor_ckpt_to_keep=1, delete that "
            f"folder, and start again with trainer.resume_mode=auto. The last complete checkpoint: {last}"
        ) from error


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
    _write(Path(folder) / FILE, asdict(state))


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


def save_run(folder: str | Path, run: Mapping[str, Any]) -> None:
    """Write what `describe_run` returns, completely or not at all.

    Args:
        folder: of the step's checkpoint; made if missing.
    """
    _write(Path(folder) / RUN_FILE, run)


def load_run(folder: str | Path) -> dict[str, Any] | None:
    """Return what `save_run` wrote; None if the checkpoint has none, or it is damaged."""
    try:
        run = json.loads((Path(folder) / RUN_FILE).read_text())
    except (OSError, ValueError):
        return None
    return run if isinstance(run, dict) else None


def describe_run(config: Any, signal: Signal) -> dict[str, Any]:
    """Return what the description of a model that was trained in a run has to say of it.

    Args:
        config: verl's whole config.
        signal: `algorithm.gndpo`, resolved.
    """
    stages = asdict(signal) | {"parameters": dict(signal.parameters)}
    return {
        "base": config.actor_rollout_ref.model.path,
        "lora_adapter": _lora_adapter_of(config.actor_rollout_ref.model),
        "teachers": list(dict.fromkeys(model.path for model in teacher_paths(config).values())),
        "train_files": _as_list(config.data.train_files),
        "val_files": _as_list(config.data.val_files),
        "estimator": config.algorithm.adv_estimator,
        "signal": {name: value for name, value in stages.items() if value not in ({}, math.inf)},
        "policy_loss": config.actor_rollout_ref.actor.policy_loss.loss_mode,
        "log": _log_of(config.trainer),
        "versions": {
            name: importlib.metadata.version(name) for name in ("verl", "verl-gndpo", "transformers", "torch")
        },
    }


def _lora_adapter_of(model: Any) -> str | None:
    """Return the adapter that a run continues, which alone says how it is scaled."""
    path = model.get("lora_adapter_path")
    return os.path.abspath(path) if path and os.path.exists(path) else path


def _log_of(trainer: Any) -> str | None:
    """Return the file to which verl's file logger writes in this process; None if the run does not use it."""
    if "file" not in _as_list(trainer.logger):
        return None
    folder = os.path.join(os.path.expanduser(os.environ.get("VERL_FILE_LOGGER_ROOT", ".")), trainer.project_name)
    named = os.path.join(folder, f"{trainer.experiment_name}.jsonl")
    return os.path.abspath(os.environ.get("VERL_FILE_LOGGER_PATH", named))


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)
