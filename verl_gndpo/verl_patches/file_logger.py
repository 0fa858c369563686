# SPDX-License-Identifier: Apache-2.0
"""verl's file logger, which begins its file anew in each run and names no file in its errors."""

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from verl_gndpo.verl_patches.patch import patches


class MetricsError(OSError):
    """The metrics of a step could not be written."""


@patches("file_logger")
def go_on_with_log(tracking: ModuleType, log: str | None, step: int) -> bool:
    """Make the next file logger keep the lines of the steps before, and name its file when it can't write.

    Args:
        tracking: verl's module.
        log: file of the run's file logger; None if it has none.
        step: the step that is resumed; 0: none, and the file begins anew.

    Returns:
        False if the run has no such file.
    """
    if log is None:
        return False
    path, earlier = Path(log), Path(f"{log}.earlier")

    class FileLogger(tracking.FileLogger):  # type: ignore[name-defined]
        """verl's, with its file's earlier lines."""

        def __init__(self, *args: Any, **kwargs: Any):
            kept = _lines_until(path, step)
            if kept:
                # Until the lines are in the new file, they are in this one.
                os.replace(path, earlier)
            super().__init__(*args, **kwargs)
            if kept:
                self.fp.write(kept)
                earlier.unlink()

        def log(self, data: Any, step: int) -> None:
            """Write a line."""
            try:
                super().log(data, step)
            except OSError as error:
                raise MetricsError(
                    f"the metrics of step {step} could not be written to {self.filepath}: {error}. Free space, and "
                    "start again with trainer.resume_mode=auto"
                ) from error

    tracking.FileLogger = FileLogger  # type: ignore[attr-defined]
    return True


def _lines_until(path: Path, step: int) -> bytes:
    """Return the lines of a log up to a step. What is no line of the logger is left out."""
    if step == 0 or not path.is_file():
        return b""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            is_earlier = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            continue
        if is_earlier and line.endswith(b"\n"):
            kept.append(line)
    return b"".join(kept)
