# SPDX-License-Identifier: Apache-2.0
"""Keeps what verl does not in the folder of a step's checkpoint: the state of the signal, and which run it is from.

Also keeps checkpoints that verl would lose, and says what became of one that can't be written.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from verl_gndpo.advantage import Signal, SignalState
from verl_gndpo.config import teacher_paths
from verl_gndpo.export.folders import TRACKER

logger = logging.getLogger(__name__)

FILE = "gndpo_signal_state.json"
RUN_FILE = "gndpo_run.json"
"""Says of which run a checkpoint is: models, data, signal, log and versions."""

DATA_STATE = "data.pt"
"""verl's state of the data loader, the last file of a step's folder."""

DISK_IS_FULL = re.compile(r"No space left on device|Disk quota exceeded|unexpected pos \d+ vs \d+|iostream error")
"""What the system says when nothing more can be written, and what torch makes of that."""

READ_ONLY = re.compile(r"Read-only file system")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


@contextlib.contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Say that the disk is full where torch only says `unexpected pos 1518272 vs 1518160`, or that it is read-only.

    Args:
        folder: of the step's checkpoint, which is being written.

    Raises:
        CheckpointError: instead of such an exception. Any other one is raised as it is.
    """
    try:
        yield
    except Exception as error:
        said, reason = DISK_IS_FULL.search(str(error)), "its disk is full or a quota is used up"
        if said is None:
            said, reason = READ_ONLY.search(str(error)), "its disk has become read-only"
        if said is None:
            raise
        parent = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(parent).free / 1e9
        complete = _last_complete(folder.parent)
        raise CheckpointError(
            f"{folder} could not be written, most likely because {reason} ({free:.2f} GB free here now; {said[0]!r}). "
            "Free space or set trainer.max_actor_ckpt_to_keep=1, delete that folder, and start again with "
            "trainer.resume_mode=auto. The last complete checkpoint: "
            + ("none" if complete is None else f"global_step_{complete}")
        ) from error


def step_folder(trainer: Any, step: int) -> Path:
    """Return the folder of a step's checkpoint, as verl names it.

    Args:
        trainer: verl's section `trainer`.
        step: the global step.
    """
    return Path(trainer.default_local_dir) / f"global_step_{step}"


@contextlib.contextmanager
def keep_previous(trainer: Any, previous: Path | None) -> Iterator[None]:
    """Keep the previous checkpoint until the new one is complete, also with `max_actor_ckpt_to_keep=1`.

    verl then deletes its weights when the new weights are written, before it writes the state of the data and the
    tracker, which still names the previous one. A run that ends between the two could not be resumed.

    Args:
        trainer: verl's section `trainer`.
        previous: folder of the checkpoint that this process wrote before; None if there is none.
    """
    if trainer.get("max_actor_ckpt_to_keep") != 1:
        yield
        return
    trainer.max_actor_ckpt_to_keep = 2
    try:
        yield
    finally:
        trainer.max_actor_ckpt_to_keep = 1
    if previous is not None:
        # What verl deletes: the rest is small, and names the run.
        shutil.rmtree(previous / "actor", ignore_errors=True)


def mend_tracker(folder: Path) -> None:
    """Make verl's tracker name the last complete checkpoint, if it is empty or names one that is gone.

    verl overwrites the file in place, so that a process that is killed, or a full disk, may leave it empty.

    Args:
        folder: `trainer.default_local_dir`.
    """
    tracker, complete = folder / TRACKER, _last_complete(folder)
    if complete is None or not tracker.exists() or (named := tracker.read_text().strip()) == str(complete):
        return
    logger.warning(
        "%s %s; the last complete checkpoint is global_step_%d, which is resumed",
        tracker,
        f"names global_step_{named}, which is not there" if named else "is empty",
        complete,
    )
    _replace(tracker, str(complete))


def _last_complete(folder: Path) -> int | None:
    """Return the step that verl's tracker names, or else the last one that was written to its end; None without any."""
    tracker = folder / TRACKER
    if not tracker.exists():
        return None
    named = tracker.read_text().strip()
    if named.isdigit() and (folder / f"global_step_{named}" / "actor").is_dir():
        return int(named)
    steps = {int(number): path for path in folder.glob("global_step_*") if (number := path.name[12:]).isdigit()}
    written = [step for step, path in steps.items() if (path / "actor").is_dir() and _is_whole(path / DATA_STATE)]
    return max(written, default=None)


def _is_whole(path: Path) -> bool:
    """Return True if a file of torch.save is there to its end."""
    return path.is_file() and zipfile.is_zipfile(path)


FINGERPRINT_BYTES = 1 << 16


def fingerprint(files: Any) -> dict[str, str]:
    """Return what tells a data file from another one of the same name: its size and a digest of its end.

    The end of a parquet file is the description of all of its parts.

    Args:
        files: one path or several. Those that are not on this machine are skipped.
    """
    found = {}
    for name in _as_list(files):
        path = Path(os.path.expanduser(name))
        if path.is_file():
            size = path.stat().st_size
            with path.open("rb") as file:
                file.seek(max(size - FINGERPRINT_BYTES, 0))
                found[name] = f"{size} {hashlib.sha256(file.read()).hexdigest()[:16]}"
    return found


def warn_of_other_data(folder: Path, data: Mapping[str, str]) -> None:
    """Warn if a checkpoint was made with other training data, because verl then goes on at the same row number.

    Args:
        folder: of the step's checkpoint.
        data: `fingerprint` of the training files of this run.
    """
    before = (load_run(folder) or {}).get("data") or {}
    changed = [name for name, found in data.items() if before.get(name, found) != found]
    changed += [name for name in before if name not in data]
    if changed:
        logger.warning(
            "%s was made with other training data: %s has changed since or is not read now. The run goes on at the "
            "same row number, so that some rows come again and others never. Restore the file, or start anew",
            folder,
            ", ".join(changed),
        )


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


def describe_run(config: Any, signal: Signal, data: Mapping[str, str]) -> dict[str, Any]:
    """Return what the description of a model that was trained in a run has to say of it.

    Args:
        config: verl's whole config.
        signal: `algorithm.gndpo`, resolved.
        data: `fingerprint` of the training files when the run began.
    """
    stages = asdict(signal) | {"parameters": dict(signal.parameters)}
    return {
        "base": config.actor_rollout_ref.model.path,
        "lora_adapter": _lora_adapter_of(config.actor_rollout_ref.model),
        "teachers": list(dict.fromkeys(model.path for model in teacher_paths(config).values())),
        "train_files": _as_list(config.data.train_files),
        "val_files": _as_list(config.data.val_files),
        "data": dict(data),
        "estimator": config.algorithm.adv_estimator,
        "signal": {name: value for name, value in stages.items() if value not in ({}, math.inf)},
        "policy_loss": config.actor_rollout_ref.actor.policy_loss.loss_mode,
        "log": log_of(config.trainer),
        "versions": {
            name: importlib.metadata.version(name) for name in ("verl", "verl-gndpo", "transformers", "torch")
        },
    }


def _lora_adapter_of(model: Any) -> str | None:
    """Return the adapter that a run continues, which alone says how it is scaled."""
    path = model.get("lora_adapter_path")
    return os.path.abspath(path) if path and os.path.exists(path) else path


def log_of(trainer: Any) -> str | None:
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
    _replace(path, json.dumps(content))


def _replace(path: Path, content: str) -> None:
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    temporary.write_text(content)
    temporary.replace(path)
