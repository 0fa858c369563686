# SPDX-License-Identifier: Apache-2.0
"""The algorithm against a numpy float64 oracle, and against everything that has gone wrong in whitening elsewhere."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from verl_gndpo.advantage import BLOCK_TOKENS, compute_advantages
from verl_gndpo.config import read_signal_config
from verl_gndpo.estimators import compute_log_ratio_advantage


def published_formula(teacher, old, mask, clip=5.0, center=True, scale=True):
    """REFERENCE: A = (k - mu) * rsqrt(var + 1e-8) * m, k = clip(log pi_T - log pi_old, -5, 5), var with n/(n-1)."""
    teacher, old = np.asarray(teacher, np.float64), np.asarray(old, np.float64)
    valid = np.asarray(mask) != 0
    k = np.zeros(valid.shape)
    k[valid] = teacher[valid] - old[valid]
    if clip is not None:
        k = np.clip(k, -clip, clip)
    n = valid.sum()
    mu = k[valid].mean()
    var = ((k[valid] - mu) ** 2).mean() * n / (n - 1) if n > 1 else 0.0
    a = k - (mu if center else 0.0)
    if scale and n > 1:
        a = a / np.sqrt(var + 1e-8)
    return np.where(valid, a, 0.0)


def whiten(teacher, old, mask, clip=5.0, center=True, scale=True):
    """Run the stages that correspond to the arguments of `published_formula`."""
    bound = {"bound": "none"} if clip is None else {"bound": "clamp", "limit": clip}
    stages = {"baseline": "batch" if center else "none", "scale": "batch" if scale else "none"}
    return compute_advantages(teacher, old, mask, read_signal_config({"gndpo": bound | stages}, "gndpo").signal)


def batch(rows=6, length=40, seed=0, spread=2.0):
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, length, generator=g) * 4
    teacher = old + torch.randn(rows, length, generator=g) * spread
    lengths = torch.randint(1, length + 1, (rows,), generator=g)
    return teacher, old, (torch.arange(length) < lengths[:, None]).long()


def close(actual, expected):
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=1e-6, atol=1e-6)


log_probs = st.floats(-30, 0, width=32)


@st.composite
def batches(draw):
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 12)))
    teacher, old = (draw(hnp.arrays(np.float32, shape, elements=log_probs)) for _ in range(2))
    mask = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 1)))
    mask[draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))] = 1
    return torch.from_numpy(teacher), torch.from_numpy(old), torch.from_numpy(mask)


@given(batches(), st.sampled_from([None, 1.0, 5.0]), st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_equals_the_published_formula(data, clip, center, scale):
    advantages = whiten(*data, clip=clip, center=center, scale=scale)
    assert advantages.dtype == torch.float32 and advantages.shape == data[2].shape
    expected = published_formula(*data, clip=clip, center=center, scale=scale)
    # Where every ratio is the same up to rounding, the gain is 1/1e-4 and rounding of the mean shows.
    slack = 1e-6 * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(advantages.double().numpy(), expected, rtol=1e-6, atol=slack)
    assert (advantages[data[2] == 0] == 0).all()


@pytest.mark.parametrize("estimator", ["gndpo", "opd"])
def test_verl_finds_the_estimators_by_name(estimator):
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    teacher, old, mask = batch()
    advantages, returns = get_adv_estimator_fn(estimator)(
        token_level_rewards=torch.zeros_like(old),
        response_mask=mask,
        config={},
        index=["a"] * len(old),
        teacher_log_probs=teacher,
        old_log_probs=old,
    )
    whiten = estimator == "gndpo"
    close(advantages, published_formula(teacher, old, mask, center=whiten, scale=whiten))
    assert torch.equal(advantages, returns) and returns.dtype == torch.float32


def test_long_batches_are_taken_in_blocks_without_a_seam():
    teacher, old, mask = batch(rows=3, length=BLOCK_TOKENS // 2 + 7, spread=0.3)
    advantages = whiten(teacher, old, mask)
    close(advantages, published_formula(teacher, old, mask))


@given(batches(), st.randoms())
@settings(max_examples=50, deadline=None)
def test_order_and_padding_of_rows_do_not_matter(data, random):
    teacher, old, mask = data
    reference = whiten(teacher, old, mask)
    order = list(range(len(mask)))
    random.shuffle(order)
    shuffled = whiten(teacher[order], old[order], mask[order])
    torch.testing.assert_close(
        shuffled, reference[order], rtol=1e-6, atol=1e-6 * max(1.0, reference.abs().max().item())
    )
    # verl adds rows with an empty mask until the batch divides by the number of ranks.
    junk = torch.full((2, mask.shape[1]), math.nan)
    padded = whiten(
        torch.cat([teacher, junk]), torch.cat([old, junk]), torch.cat([mask, torch.zeros_like(mask[:1]).repeat(2, 1)])
    )
    assert torch.equal(padded[: len(mask)], reference) and (padded[len(mask) :] == 0).all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e38])
def test_what_the_mask_hides_is_never_read(garbage):
    teacher, old, mask = batch()
    expected = whiten(teacher, old, mask)
    for poisoned in (teacher, old):
        poisoned[mask == 0] = garbage
    advantages = whiten(teacher, old, mask)
    assert torch.equal(advantages, expected)


@pytest.mark.parametrize("where", ["teacher", "old"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_under_a_valid_token_is_an_error_that_names_it(where, value):
    teacher, old, mask = batch()
    {"teacher": teacher, "old": old}[where][2, 0] = value
    with pytest.raises(ValueError, match="row 2, position 0") as error:
        whiten(teacher, old, mask)
    assert str(teacher[2, 0].item()) in str(error.value) and str(old[2, 0].item()) in str(error.value)


def test_both_minus_infinity_is_not_taken_for_agreement():
    teacher, old, mask = batch()
    teacher[1, 0] = old[1, 0] = -math.inf
    with pytest.raises(ValueError, match="row 1, position 0"):
        whiten(teacher, old, mask)


def test_a_batch_without_a_valid_token_is_an_error():
    teacher, old, mask = batch()
    with pytest.raises(ValueError, match=r"no valid response token.*\(6, 40\)"):
        whiten(teacher, old, torch.zeros_like(mask))


def test_shapes_that_differ_are_named():
    teacher, old, mask = batch()
    with pytest.raises(ValueError, match=r"\(6, 39\), \(6, 40\) and \(6, 40\)"):
        whiten(teacher[:, :-1], old, mask)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_one_valid_token(center, scale):
    """verl's masked_whiten raises here (defect 6 of the released code)."""
    teacher, old = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-3.0, -1.0]])
    advantages = whiten(teacher, old, torch.tensor([[1, 0]]), center=center, scale=scale)
    assert advantages.tolist() == [[0.0 if center else 2.0, 0.0]]


def test_zero_variance_gives_zeros_not_rounding_noise():
    old = -torch.rand(64, 100)
    advantages = whiten(old, old, torch.ones(64, 100))
    assert (advantages == 0).all()
    # The same gap everywhere: what remains is the rounding of the inputs, far below the floor.
    teacher = (old.double() + 0.5).float()
    advantages = whiten(teacher, old, torch.ones(64, 100))
    assert advantages.abs().max() < 1e-3


def test_an_all_masked_row_is_zero_and_counts_for_nothing():
    teacher, old, mask = batch()
    mask[3] = 0
    advantages = whiten(teacher, old, mask)
    assert (advantages[3] == 0).all() and torch.isfinite(advantages).all()
    close(advantages, published_formula(teacher, old, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_exactly(dtype):
    teacher, old, mask = batch()
    teacher, old = teacher.to(dtype), old.to(dtype)
    advantages = whiten(teacher, old, mask)
    assert advantages.dtype == torch.float32
    close(advantages, published_formula(teacher.double(), old.double(), mask))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_any_mask_dtype(dtype):
    teacher, old, mask = batch()
    assert torch.equal(whiten(teacher, old, mask.to(dtype)), whiten(teacher, old, mask))


def test_inputs_are_left_alone():
    data = batch()
    copies = [x.clone() for x in data]
    whiten(*data)
    assert all(torch.equal(a, b) for a, b in zip(data, copies, strict=True))


def test_advantages_carry_no_gradient():
    """The signal is a constant of the policy loss; k1 must not be back-propagated."""
    teacher, old, mask = batch()
    advantages = whiten(teacher.requires_grad_(), old.requires_grad_(), mask)
    assert not advantages.requires_grad


def test_raw_ratios_are_not_clamped():
    """Defect 2 of the released code: its naive baseline is clamped already. bound=none is the arm without one."""
    teacher, old, mask = batch(spread=10.0)
    advantages, _ = compute_log_ratio_advantage(
        "opd", response_mask=mask, teacher_log_probs=teacher, old_log_probs=old, config={"gndpo": {"bound": "none"}}
    )
    assert advantages.abs().max() > 5
    close(advantages, published_formula(teacher, old, mask, clip=None, center=False, scale=False))


def test_without_a_teacher_the_error_says_who_provides_it():
    _, old, mask = batch()
    with pytest.raises(ValueError, match=r"teacher_log_probs.*trainer\.use_v1"):
        compute_log_ratio_advantage("gndpo", response_mask=mask, old_log_probs=old)


def test_outliers_are_amplified_as_the_reference_says():
    """Known weakness of whitening: with a body of sd 0.3 and 0.1 % of outliers at the bound, -5 becomes about -14.7."""
    g = torch.Generator().manual_seed(0)
    ratio = torch.randn(100, 1000, generator=g) * 0.3
    ratio.view(-1)[:100] = -5.0
    advantages = whiten(ratio, torch.zeros_like(ratio), torch.ones_like(ratio))
    assert advantages.min().item() == pytest.approx(-14.7, abs=0.3)


@given(batches(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_statistics_of_a_group_are_those_of_its_rows_alone(data, random):
    teacher, old, mask = data
    groups = [random.choice("ab") for _ in mask]
    settings = read_signal_config({"gndpo": {"baseline": "teacher", "scale": "teacher"}}, "gndpo").signal
    advantages = compute_advantages(teacher, old, mask, settings, teachers=groups)
    for group in set(groups):
        rows = [row for row, name in enumerate(groups) if name == group]
        if mask[rows].any():
            expected = published_formula(teacher[rows], old[rows], mask[rows])
            slack = 1e-6 * max(1.0, np.abs(expected).max())
            np.testing.assert_allclose(advantages[rows].double().numpy(), expected, rtol=1e-6, atol=slack)
        else:
            assert not advantages[rows].any()


def test_statistics_by_teacher_need_more_than_one_teacher_to_differ():
    teacher, old, mask = batch()
    config = {"gndpo": {"baseline": "teacher", "scale": "teacher"}}
    inputs = {"teacher_log_probs": teacher, "old_log_probs": old, "response_mask": mask}
    whole, _ = compute_log_ratio_advantage("gndpo", **inputs, config=config)
    close(whole, published_formula(teacher, old, mask))
    labels = ["a"] * 3 + ["b"] * 3
    apart, _ = compute_log_ratio_advantage("gndpo", **inputs, config=config, teacher=labels)
    for rows in (slice(0, 3), slice(3, 6)):
        close(apart[rows], published_formula(teacher[rows], old[rows], mask[rows]))
    together, _ = compute_log_ratio_advantage("gndpo", **inputs, config={}, teacher=labels)
    close(together, published_formula(teacher, old, mask))


@pytest.mark.parametrize("bound", ["none", "tanh"])
def test_a_bad_number_is_named_by_its_row_in_the_batch(bound):
    teacher, old, mask = batch()
    teacher[3, 0] = float("nan")
    mask[3, 0] = 1
    settings = read_signal_config({"gndpo": {"bound": bound, "baseline": "group"}}, "gndpo").signal
    with pytest.raises(ValueError, match="row 3, position 0"):
        compute_advantages(teacher, old, mask, settings, groups=["a", "a", "b", "b", "b", "a"])
    with pytest.raises(ValueError, match="no valid response token"):
        compute_advantages(teacher, old, mask * 0, settings, groups=["a", "b"] * 3)
