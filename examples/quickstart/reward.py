# SPDX-License-Identifier: Apache-2.0
r"""Grade the quickstart's answers, as verl's ``custom_reward_function``."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\boxed\{\s*([^{}]*?)\s*\}")


def compute_score(
    data_source: str, solution_str: object, ground_truth: object, extra_info: dict | None = None, **kwargs: object
) -> float:
    r"""Return 1.0 if the last ``\boxed{...}`` of the response holds the correct answer, else 0.0. Never raise.

    Args:
        data_source: name of the data set; not used.
        solution_str: the decoded response. Anything but text counts as a wrong answer.
        ground_truth: the correct answer, compared as text.
        extra_info, kwargs: accepted because verl passes them; not used.
    """
    if not isinstance(solution_str, str):
        return 0.0
    boxed = _BOXED.findall(solution_str)
    return 1.0 if boxed and boxed[-1] == str(ground_truth).strip() else 0.0
