# SPDX-License-Identifier: Apache-2.0
"""Log-probs from the output projection, against full log-softmaxes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_gndpo.teacher.scoring import ScoringHead, token_log_probs


@given(st.integers(1, 30), st.lists(st.integers(0, 29), max_size=40), st.integers(1, 7), st.booleans())
@settings(max_examples=100, deadline=None)
def test_blocks_of_logits_equal_all_logits(length, rows, chunk, bias):
    """For any rows in any order and any chunk, the log-probs are those of a full log-softmax."""
    torch.manual_seed(0)
    rows = torch.tensor(rows, dtype=torch.int64) % length
    ids = torch.randint(0, 11, (len(rows),))
    hidden = torch.randn(1, length, 4)
    lm_head = torch.nn.Linear(4, 11, bias=bias)
    with torch.no_grad():
        expected = (lm_head(hidden)[0].double() / 0.7).log_softmax(-1)[rows, ids]
        head = ScoringHead(lm_head, chunk)
        with head.scoring(rows, ids, 0.7):
            lm_head(hidden)
        scored = head.take()
    torch.testing.assert_close(scored[:, 0].double(), expected, atol=1e-6, rtol=1e-6)
    # Outside of the context it is an ordinary projection again.
    assert lm_head(hidden).shape == (1, length, 11)


@pytest.mark.parametrize("columns", [1, 3, 999, 1000])
def test_log_probs_of_bfloat16_logits_are_computed_in_float32(columns):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8).bfloat16(), torch.randn(1000, 8).bfloat16()
    ids = torch.tensor([0, 1, 500, 998, 999])
    expected = torch.nn.functional.linear(hidden, weight).double().log_softmax(-1)[range(5), ids]
    scored = token_log_probs(hidden, ids, weight, None, 1.0, columns)
    assert scored.dtype == torch.float32
    torch.testing.assert_close(scored.double(), expected, atol=1e-5, rtol=0)


def test_logits_may_be_larger_than_exp_can_hold():
    """The block that holds the largest must not matter."""
    hidden, weight = torch.eye(2), torch.tensor([[300.0, -300.0], [0.0, 0.0], [-300.0, 300.0]])
    for columns in (1, 2, 3):
        scored = token_log_probs(hidden, torch.tensor([0, 0]), weight, None, 1.0, columns)
        assert scored.tolist() == [0.0, -600.0]
