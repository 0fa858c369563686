# SPDX-License-Identifier: Apache-2.0
"""Test the verdicts on the outputs of model_outputs.py, and that none is accepted wrongly."""

import pytest

from tests.unit.model_outputs import CHOICE_OUTPUTS, FREE_OUTPUTS, TRAP_OUTPUTS
from verl_gndpo.rewards import compute_score


@pytest.mark.parametrize(
    ("kind", "truth", "choices", "response", "right"), CHOICE_OUTPUTS + FREE_OUTPUTS + TRAP_OUTPUTS
)
def test_verdict(kind, truth, choices, response, right):
    info = {"answer_type": kind, "choices": choices}
    assert compute_score("any", response, truth, info)["acc"] == float(right)


def test_there_are_enough_outputs_of_both_kinds():
    outputs = CHOICE_OUTPUTS + FREE_OUTPUTS + TRAP_OUTPUTS
    assert len({row[3] for row in outputs}) >= 150
    assert sum(not row[4] for row in outputs) >= 50
