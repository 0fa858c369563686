# SPDX-License-Identifier: Apache-2.0
r"""The checker of the quickstart's answers, in the form of verl's ``custom_reward_function``."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\boxed\{\s*([^{}]*?)\s*\}")


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> float:
    r"""Return 1.0 where the last ``\boxed{...}`` of the response holds the right answer, else 0.0.

    Args:
        data_source: name of the data set; not used.
        solution_str: the decoded response. Anything that is no text counts as a wrong answer.
        ground_truth: the right answer, compared as text.
        extra_info, kwargs: accepted because verl passes them; not used.

    Raises nothing, whatever the model has written.
    """
    if not isinstance(solution_str, str):
        return 0.0
    boxed = _BOXED.findall(solution_str)
    return 1.0 if boxed and boxed[-1] == str(ground_truth).strip() else 0.0
