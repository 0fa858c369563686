# SPDX-License-Identifier: Apache-2.0
"""The KL divergence from the student's most likely tokens: what must hold of it for any two distributions."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_gndpo.kl import kl_divergence, top_log_probs
from verl_gndpo.teacher.scoring import ScoringHead, token_log_probs

VOCABULARY = 13
LOGITS = st.lists(st.floats(-12, 12), min_size=VOCABULARY, max_size=VOCABULARY)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.logaddexp.reduce(logits)


def from_top_k(student, teacher, k):
    """Student's and teacher's logits (vocabulary,) through the functions of a run."""
    ids, log_probs = top_log_probs(torch.tensor(student)[None], k)
    # The identity for a projection: what is hidden are the logits.
    _, of_teacher = token_log_probs(
        torch.tensor(teacher)[None], torch.tensor([0]), torch.eye(len(teacher)), None, 1.0, 4, ids
    )
    return kl_divergence(log_probs, of_teacher).item()


@given(LOGITS, LOGITS)
@settings(max_examples=200, deadline=None)
def test_it_grows_with_k_to_the_exact_divergence(student, teacher):
    p, q = log_softmax(student), log_softmax(teacher)
    exact = float((np.exp(p) * (p - q)).sum())
    values = [from_top_k(student, teacher, k) for k in range(1, VOCABULARY + 3)]
    assert values[0] >= 0
    assert all(later >= earlier - 1e-5 for earlier, later in itertools.pairwise(values))
    assert max(values) <= exact + 1e-5
    assert values[VOCABULARY - 1 :] == pytest.approx([exact] * 3, abs=1e-5)


@given(LOGITS, LOGITS, st.integers(1, VOCABULARY))
@settings(max_examples=100, deadline=None)
def test_it_is_the_divergence_of_the_merged_distributions(student, teacher, k):
    p, q = np.exp(log_softmax(student)), np.exp(log_softmax(teacher))
    # As torch chooses them, in float32 and among equals.
    top = torch.tensor(student).float().log_softmax(-1).topk(k).indices.numpy()
    rest = np.setdiff1d(np.arange(VOCABULARY), top)
    p, q = (np.append(x[top], x[rest].sum()) if len(rest) else x[top] for x in (p, q))
    assert from_top_k(student, teacher, k) == pytest.approx((p * np.log(p / q)).sum(), abs=1e-5)


@pytest.mark.parametrize(("student_ids", "teacher_ids"), [(16, 13), (13, 16)])
def test_vocabularies_padded_to_different_sizes(student_ids, teacher_ids):
    """Ids that one of the two lacks count to the others."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(0, 2, student_ids).tolist(), rng.normal(0, 2, teacher_ids).tolist()
    p, q = np.exp(log_softmax(student)), np.exp(log_softmax(teacher))
    common = min(student_ids, teacher_ids)
    for k in (3, common - 1):
        top = [i for i in np.argsort(-p)[:k] if i < common]
        a, b = (np.append(x[top], 1 - x[top].sum()) for x in (p, q))
        assert from_top_k(student, teacher, k) == pytest.approx((a * np.log(a / b)).sum(), abs=1e-4)
    # Where the teacher gives the others no probability at all, it is large and finite.
    assert np.isfinite(from_top_k(student, teacher, student_ids))


def test_equal_distributions_have_none():
    student = torch.randn(50, 400, generator=torch.Generator().manual_seed(0)) * 4
    for k in (1, 20, 400):
        _, log_probs = top_log_probs(student, k)
        assert kl_divergence(log_probs, log_probs).abs().max() == 0


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_head_returns_it_beside_the_log_probs(chunk):
    torch.manual_seed(0)
    lm_head, hidden, rows = torch.nn.Linear(4, 11), torch.randn(1, 9, 4), torch.tensor([8, 0, 3, 3])
    student = torch.randn(4, 11)
    top, ids = top_log_probs(student, 11), torch.tensor([1, 10, 0, 5])
    with torch.no_grad():
        q = (lm_head(hidden)[0, rows].double() / 0.7).log_softmax(-1)
        head = ScoringHead(lm_head, chunk)
        with head.scoring(rows, ids, 0.7, top):
            lm_head(hidden)
        scored = head.take().double()
    p = student.double().log_softmax(-1)
    expected = torch.stack([q.gather(-1, ids[:, None])[:, 0], (p.exp() * (p - q)).sum(-1)], -1)
    torch.testing.assert_close(scored, expected, atol=1e-5, rtol=0)


def test_masses_that_a_subtraction_in_float32_would_lose_are_kept():
    """The teacher leaves 1e-9 to all but the student's two tokens, to which the student gives a hundredth."""
    student, teacher = np.log([0.495, 0.495, 0.01]).tolist(), np.log([0.5, 0.5 - 1e-9, 1e-9]).tolist()
    p, q = np.exp(student), np.exp(teacher)
    assert from_top_k(student, teacher, 2) == pytest.approx((p * np.log(p / q)).sum(), abs=1e-5)
