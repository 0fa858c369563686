# SPDX-License-Identifier: Apache-2.0
"""Scores and gradients of response tokens, block by block, against autograd through full logits in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_gndpo.student import projection
from verl_gndpo.student.projection import Blocks, Request, ResponseHead, token_scores


def oracle(hidden, weight, bias, ids, temperature):
    """Return log-probs, entropies and sums of squared probabilities, (tokens, 3), by plain autograd."""
    log_probs = (torch.nn.functional.linear(hidden, weight, bias) / temperature).log_softmax(-1)
    probs = log_probs.exp()
    chosen = log_probs.gather(-1, ids[:, None]).squeeze(-1)
    return torch.stack([chosen, -(probs * log_probs).sum(-1), probs.square().sum(-1)], 1)


@given(
    tokens=st.integers(0, 9),
    blocks=st.tuples(st.integers(1, 4), st.integers(1, 14)),
    bias=st.booleans(),
    of_each=st.booleans(),
    entropy=st.booleans(),
    masked=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_values_and_gradients_are_those_of_full_logits(tokens, blocks, bias, of_each, entropy, masked):
    generator = torch.Generator().manual_seed(tokens)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs = [draw(tokens, 5), draw(13, 5), *([draw(13)] if bias else [])]
    ids = torch.randint(0, 13, (tokens,), generator=generator)
    temperature = 0.5 + torch.rand(tokens, 1, generator=generator, dtype=torch.float64) if of_each else 0.7
    # The sums of squares have no gradient.
    weights = torch.cat([draw(tokens, 2), torch.zeros(tokens, 1, dtype=torch.float64)], 1)
    weights[:, 1] *= entropy
    if masked:
        weights[::2] = 0

    exact = [x.clone().requires_grad_() for x in inputs]
    expected = oracle(exact[0], exact[1], exact[2] if bias else None, ids, temperature)
    (expected * weights).sum().backward()
    ours = [x.float().requires_grad_() for x in inputs]
    inverse = (1 / temperature).float().squeeze(1) if of_each else torch.full((tokens,), 1 / 0.7)
    scores = projection._TokenScores.apply(
        ours[0], ours[1], ours[2] if bias else None, ids, inverse, Blocks(*blocks), entropy, True
    )
    wanted = [0, 1, 2] if entropy else [0, 2]
    torch.testing.assert_close(scores.double(), expected[:, wanted].detach(), atol=1e-5, rtol=1e-5)
    (scores * weights[:, wanted].float()).sum().backward()
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, atol=1e-5, rtol=1e-4)


def test_logits_may_be_larger_than_exp_can_hold():
    weight = torch.tensor([[300.0, -300.0], [0.0, 0.0], [-300.0, 300.0]])
    for columns in (1, 2, 3):
        scores = projection._TokenScores.apply(
            torch.eye(2), weight, None, torch.tensor([0, 0]), None, Blocks(2, columns), True, True
        )
        assert scores.tolist() == [[0.0, 0.0, 1.0], [-600.0, 0.0, 1.0]]


def test_gradients_of_16_bit_weights_are_summed_in_float32():
    """Summed in bfloat16, equal parts of 600 tokens stop to count after 256 of them."""
    torch.manual_seed(0)
    hidden, weight = torch.ones(600, 4).bfloat16(), (0.01 * torch.randn(50, 4)).bfloat16().requires_grad_()
    ids = torch.zeros(600, dtype=torch.int64)
    token_scores(hidden, weight, None, ids, chunk_tokens=1).sum().backward()
    exact = weight.detach().double().requires_grad_()
    oracle(hidden.double(), exact, None, ids, 1.0)[:, 0].sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=0.01, atol=0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tokens", [1, 300, 100_000])
def test_a_block_never_holds_more_logits_than_allowed(tokens, device):
    blocks = Blocks.fit(tokens, 151_936, 256, torch.device(device))
    assert blocks.tokens * blocks.columns <= 256 * 151_936
    assert blocks.columns >= 512


def test_no_pass_makes_all_logits(monkeypatch):
    """Each block is smaller than the budget, in both passes."""
    sizes = []
    stock = projection.float32_logits
    monkeypatch.setattr(projection, "float32_logits", lambda *x: sizes.append(stock(*x).numel()) or stock(*x))
    monkeypatch.setattr(projection, "CPU_LOGITS", 2000)
    monkeypatch.setattr(projection, "LEAST_COLUMNS", 16)
    hidden, weight = torch.randn(300, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    token_scores(hidden, weight, None, torch.zeros(300, dtype=torch.int64), chunk_tokens=256).sum().backward()
    assert max(sizes) <= 2000 and sum(sizes) == 2 * 300 * 1000


def test_the_head_answers_for_the_rows_that_it_is_asked_for():
    torch.manual_seed(0)
    lm_head = torch.nn.Linear(4, 11)
    head = ResponseHead(lm_head, chunk_tokens=2)
    hidden = torch.randn(1, 6, 4)
    rows, ids = torch.tensor([4, 1, 1]), torch.tensor([0, 10, 3])
    with head.answering(Request(rows, ids, 0.7, entropy=True, top_k=3)):
        scores = lm_head(hidden)
    with torch.no_grad():
        expected = oracle(hidden[0, rows].double(), lm_head.weight.double(), lm_head.bias.double(), ids, 0.7)
        log_probs = (torch.nn.functional.linear(hidden[0, rows], lm_head.weight, lm_head.bias) / 0.7).log_softmax(-1)
    torch.testing.assert_close(scores.double(), expected[:, :2], atol=1e-5, rtol=0)
    top_ids, top = head.take_top()
    assert torch.equal(top_ids, log_probs.topk(3).indices)
    torch.testing.assert_close(top[:, :3], log_probs.topk(3).values)
    assert lm_head(hidden).shape == (1, 6, 11)
