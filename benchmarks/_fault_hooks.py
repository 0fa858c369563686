# SPDX-License-Identifier: Apache-2.0
"""Imported by verl in each process of a run of faults.py: what the file `$FAULT_FOLDER/NAME` switches on."""

import os
import time
from pathlib import Path

from wrapt import register_post_import_hook

FOLDER = Path(os.environ["FAULT_FOLDER"])
CLOCK = "clock"
HOUR_S = 3600.0
SCORER = ("out_of_memory", "raises", "nan", "too_few")


def _break_scorer(scorer: object) -> None:
    score = scorer.Scorer.score

    def _score(self, *args, **kwargs):
        import torch

        broken = next((name for name in SCORER if (FOLDER / name).exists()), None)
        if broken == "out_of_memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if broken == "raises":
            raise RuntimeError("a bug of the model")
        scored = score(self, *args, **kwargs)
        if broken == "nan":
            scored[0] = torch.nan
        return scored[:-1] if broken == "too_few" else scored

    scorer.Scorer.score = _score


def _set_clock_back() -> None:
    now = time.time
    time.time = lambda: now() - (HOUR_S if (FOLDER / CLOCK).exists() else 0.0)


register_post_import_hook(_break_scorer, "verl_gndpo.teacher.scorer")
_set_clock_back()
