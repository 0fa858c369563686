# SPDX-License-Identifier: Apache-2.0
"""Every stage of the signal against numpy in float64, and what must hold of it whatever the batch is."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from tests.unit.test_advantage import batch, batches
from verl_gndpo.advantage import (
    BASELINES,
    BOUNDS,
    SCALES,
    SignalState,
    Sums,
    compute_advantages,
    mix,
    proximal,
    unit_ranks,
)
from verl_gndpo.config import read_signal_config
from verl_gndpo.estimators import compute_log_ratio_advantage
from verl_gndpo.presets import PRESETS

quick = settings(max_examples=60, deadline=None)
STAGES = {"bound": tuple(BOUNDS), "baseline": BASELINES, "scale": SCALES}
stages = st.fixed_dictionaries({stage: st.sampled_from(names) for stage, names in STAGES.items()})
# Parameters that differ from the presets', so that one that is not passed on shows.
PARAMETERS = {
    "limit": 2.5,
    "power_alpha": 0.7,
    "negative_limit": 0.25,
    "proximal_alpha": 0.3,
    "soft_clamp_factor": 1.5,
    "std_floor": 1e-2,
    "gain_limit": 3.0,
}


def oracle(teacher, old, mask, s, groups, teachers, kl):
    """The pipeline in numpy, token by token where that is clearer, from the formulas of REFERENCE alone."""
    teacher, old, kl = (np.asarray(x, np.float64) for x in (teacher, old, kl))
    valid = np.asarray(mask) != 0
    d = np.where(valid, teacher - old, 0.0)
    p, q = np.exp(old), np.exp(teacher)
    limit, negative_limit, alpha = (
        s.parameters.get(key, math.nan) for key in ("limit", "negative_limit", "proximal_alpha")
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        # From log-probs, as 1 - p rounds to 0; certain of the same (inf - inf): no opinion.
        log_odds = [x - np.log(-np.expm1(x)) for x in (np.minimum(teacher, 0), np.minimum(old, 0))]
        opinion = np.nan_to_num(np.tanh((log_odds[0] - log_odds[1]) / 2), nan=0.0)
    certain_odds = lambda x: (x := np.minimum(x, -1e-9)) - np.log1p(-np.exp(x))  # noqa: E731
    bounds = {
        "none": lambda: d,
        "clamp": lambda: np.clip(d, -limit, limit),
        "tanh": lambda: np.tanh(d),
        "sign": lambda: np.sign(d),
        "power": lambda: np.exp(teacher) ** s.parameters["power_alpha"] - np.exp(old) ** s.parameters["power_alpha"],
        "gap": lambda: np.sqrt(p) * np.maximum(q - p, -negative_limit),
        "odds": lambda: np.minimum(p, 1) * np.maximum(opinion, -negative_limit),
        "log_odds": lambda: np.minimum(p, 1) * np.clip(certain_odds(teacher) - certain_odds(old), -limit, limit),
        "proximal": lambda: np.logaddexp(math.log(alpha) + d, math.log(1 - alpha)),
        "soft_clamp": lambda: np.clip(d, -(c := s.parameters["soft_clamp_factor"] * np.abs(d[valid]).mean()), c),
        "mask": lambda: d,
    }
    k = bounds[s.bound]()
    if s.bound == "mask":
        valid = valid & (np.abs(d) <= limit)
    if not valid.any():
        return np.zeros(valid.shape)

    def segments(kind):
        rows, length = valid.shape
        labels = {"batch": [0] * rows, "ema": [0] * rows, "group": groups, "teacher": teachers}
        for label in range(length) if kind == "position" else sorted(set(labels[kind])):
            if kind == "position":
                where = np.zeros_like(valid)
                where[:, label] = True
            else:
                where = np.array([x == label for x in labels[kind]])[:, None] & np.ones_like(valid)
            if (where & valid).any():
                yield where & valid

    r = k.copy()
    if s.baseline == "kl":
        r = k + kl
    elif s.baseline != "none":
        for where in segments(s.baseline):
            r[where] = k[where] - k[where].mean()
    a = r.copy()
    if s.scale == "rank":
        n = valid.sum()
        a[valid] = ((2 * pd.Series(r[valid]).rank().to_numpy() - 1) / n - 1) * math.sqrt(3)
    elif s.scale != "none":
        for where in segments(s.scale):
            n = where.sum()
            gain = min(1 / math.hypot(r[where].std(ddof=1), s.std_floor), s.gain_limit) if n > 1 else 1.0
            a[where] = r[where] * gain
    return np.where(valid, a, 0.0)


@st.composite
def problems(draw):
    teacher, old, mask = draw(batches())
    rows = len(mask)
    groups, teachers = (draw(st.lists(st.sampled_from("ab"), min_size=rows, max_size=rows)) for _ in range(2))
    kl = torch.from_numpy(np.abs(np.asarray(teacher) - np.asarray(old)) / 3)
    return {
        "teacher_log_probs": teacher,
        "old_log_probs": old,
        "response_mask": mask,
        "groups": groups,
        "teachers": teachers,
        "kl": kl,
    }


def resolve(**given):
    return read_signal_config({"gndpo": PARAMETERS | given}, "gndpo").signal


def close(actual, expected):
    np.testing.assert_allclose(actual.double(), expected, rtol=1e-6, atol=1e-6 * max(1.0, np.abs(expected).max()))


def rows_of(data, rows):
    return {name: [value[i] for i in rows] if isinstance(value, list) else value[rows] for name, value in data.items()}


@given(problems(), stages)
@settings(max_examples=400, deadline=None)
def test_any_combination_of_stages_equals_the_oracle(data, chosen):
    config = resolve(**chosen)
    advantages = compute_advantages(**data, signal=config)
    assert advantages.dtype == torch.float32 and advantages.shape == data["response_mask"].shape
    assert advantages.isfinite().all() and (advantages[data["response_mask"] == 0] == 0).all()
    if chosen["scale"] == "rank":
        # Rounding decides the order of values that are nearly equal, as where tanh has saturated. Only equal inputs are
        # sure to share a rank.
        k = oracle(*list(data.values())[:3], resolve(**chosen | {"scale": "none"}), *list(data.values())[3:])
        rows, positions = np.nonzero(data["response_mask"].numpy())
        teacher, old = (data[name].numpy()[rows, positions] for name in ("teacher_log_probs", "old_log_probs"))
        place = (rows, positions) if chosen["baseline"] not in ("none", "batch") else (0 * rows, 0 * rows)
        _, first = np.unique(np.stack([teacher, old, *place]), axis=1, return_index=True)
        distinct = np.sort(k[rows, positions][first])
        assume(len(distinct) < 2 or np.diff(distinct).min() > 1e-6)
    close(advantages, oracle(*list(data.values())[:3], config, *list(data.values())[3:]))


@given(problems(), stages, st.randoms(use_true_random=False))
@quick
def test_the_order_of_rows_does_not_matter(data, chosen, random):
    config = resolve(**chosen)
    advantages = compute_advantages(**data, signal=config)
    order = list(range(len(advantages)))
    random.shuffle(order)
    shuffled = compute_advantages(**rows_of(data, order), signal=config)
    if chosen["scale"] != "rank":
        close(shuffled, advantages[order].double().numpy())
    else:
        assert sorted(shuffled.flatten().tolist()) == pytest.approx(sorted(advantages.flatten().tolist()), abs=1e-6)


@given(problems(), stages)
@quick
def test_rows_that_verl_adds_as_padding_count_for_nothing(data, chosen):
    config = resolve(**chosen)
    advantages = compute_advantages(**data, signal=config)
    junk = {
        "teacher_log_probs": torch.full((2, advantages.shape[1]), math.nan),
        "old_log_probs": torch.full((2, advantages.shape[1]), math.inf),
        "response_mask": torch.zeros(2, advantages.shape[1], dtype=torch.int64),
        "groups": ["a", "padding"],
        "teachers": ["b", "padding"],
        "kl": torch.full((2, advantages.shape[1]), math.nan),
    }
    padded = {
        name: value + junk[name] if isinstance(value, list) else torch.cat([value, junk[name]])
        for name, value in data.items()
    }
    with_padding = compute_advantages(**padded, signal=config)
    close(with_padding[:-2], advantages.double().numpy())
    assert (with_padding[-2:] == 0).all()


@given(problems(), st.integers(2, 4))
@quick
def test_sums_of_micro_batches_and_ranks_add_up_to_those_of_the_batch(data, parts):
    valid = data["response_mask"] != 0
    x = (data["teacher_log_probs"].double() - data["old_log_probs"].double())[valid].numpy()
    segment = np.arange(len(x)) % 3
    whole = Sums.of(x, segment, 3)
    shards = [Sums.of(x[i::parts], segment[i::parts], 3) for i in range(parts)]
    merged = shards[0]
    for shard in shards[1:]:
        merged = merged + shard
    for name in ("count", "mean", "variance"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-9, atol=1e-9)


@given(problems(), st.sampled_from(["none", "soft_clamp"]), st.sampled_from(["none", "batch", "group", "position"]))
@quick
def test_log_ratios_twice_as_large_make_advantages_twice_as_large(data, bound, baseline):
    """Of the bounds without a unit of their own; with a scale the advantages stay what they are."""
    twice = data | {
        "teacher_log_probs": data["old_log_probs"] + 2 * (data["teacher_log_probs"] - data["old_log_probs"])
    }
    # Subtracting and adding rounds; take what is left of it as the data.
    data = data | {"teacher_log_probs": data["old_log_probs"] + (data["teacher_log_probs"] - data["old_log_probs"])}
    plain = resolve(bound=bound, baseline=baseline, scale="none")
    single, double = (compute_advantages(**x, signal=plain).double() for x in (data, twice))
    np.testing.assert_allclose(double, 2 * single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", ["batch", "group", "teacher", "ema"])
def test_scaled_advantages_have_no_unit(scale):
    teacher, old, mask = batch(rows=8)
    labels = {"groups": list("aabbccdd"), "teachers": list("abababab")}
    config = read_signal_config({"gndpo": {"bound": "none", "baseline": "batch", "scale": scale}}, "gndpo").signal
    single = compute_advantages(teacher, old, mask, config, **labels)
    double = compute_advantages(old + 2 * (teacher - old), old, mask, config, **labels)
    torch.testing.assert_close(double, single, rtol=1e-4, atol=1e-4)


@given(
    problems(), st.sampled_from(["clamp", "tanh", "sign", "power", "gap", "odds", "log_odds", "proximal", "soft_clamp"])
)
@quick
def test_bounds_keep_the_sign(data, bound):
    """No token that the teacher likes less is reinforced, as long as there is no baseline."""
    config = resolve(bound=bound, baseline="none", scale="none")
    advantages = compute_advantages(**data, signal=config)
    d = data["teacher_log_probs"].double() - data["old_log_probs"].double()
    assert (advantages.double() * d >= 0).all()


def test_bounds_hold_where_exponentials_overflow():
    teacher, old = torch.tensor([[-1e4, -1e-3, -800.0, 0.0]]), torch.tensor([[-1e-3, -1e4, 0.0, -800.0]])
    expected = {
        "tanh": [-1, 1, -1, 1],
        "sign": [-1, 1, -1, 1],
        "power": [-0.995, 0.995, -1, 1],
        "gap": [-0.4 * math.exp(-5e-4), 0, -0.4, 0],
        "odds": [-0.4 * math.exp(-1e-3), 0, -0.4, 0],
        "log_odds": [-5 * math.exp(-1e-3), 0, -5, 0],
        "proximal": [math.log(0.5), 1e4 + math.log(0.5), math.log(0.5), 800 + math.log(0.5)],
    }
    for bound, values in expected.items():
        config = read_signal_config({"gndpo": {"bound": bound, "baseline": "none", "scale": "none"}}, "gndpo").signal
        advantages = compute_advantages(teacher, old, torch.ones(1, 4), config)
        torch.testing.assert_close(advantages, torch.tensor([values], dtype=torch.float32), rtol=1e-4, atol=1e-3)


def test_the_power_reward_becomes_the_log_ratio_as_its_exponent_vanishes():
    teacher, old, mask = batch()
    config = read_signal_config({"gndpo": {"power_alpha": 1e-6}}, "power_opd").signal
    advantages = compute_advantages(teacher, old, mask, config)
    torch.testing.assert_close(advantages * 1e6, (teacher - old) * mask, rtol=1e-3, atol=1e-3)


def test_small_proximal_signals_are_not_lost():
    d = torch.tensor([1e-12, -1e-12], dtype=torch.float64)
    torch.testing.assert_close(proximal(d, torch.zeros_like(d), 0.5), d / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("preset", "limits"), [("odds_opd", {"negative_limit": 1.0}), ("log_odds_opd", {})])
def test_odds_give_the_same_gradient_whichever_of_two_tokens_is_sampled(preset, limits):
    logits = torch.tensor([0.7, -0.2], dtype=torch.float64, requires_grad=True)
    student, teacher = logits.log_softmax(-1), torch.tensor([0.45, 0.55], dtype=torch.float64).log()
    config = read_signal_config({"gndpo": limits}, preset).signal
    advantages = compute_advantages(teacher[:, None], student.detach()[:, None], torch.ones(2, 1), config)
    first, second = (
        torch.autograd.grad(a * log_prob, logits, retain_graph=True)[0]
        for a, log_prob in zip(advantages[:, 0].double(), student, strict=True)
    )
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-9)
    assert first[0] < 0 < first[1], "towards the teacher"


def test_outliers_are_dropped_from_the_statistics_too():
    teacher, old, mask = batch(spread=0.5)
    mask[2, 0] = 1
    config = read_signal_config({"gndpo": {"bound": "mask", "limit": 4.0}}, "gndpo").signal
    without = mask.clone()
    without[2, 0] = 0
    expected = compute_advantages(teacher, old, without, config)
    teacher[2, 0] = old[2, 0] - 50.0
    advantages = compute_advantages(teacher, old, mask, config)
    assert advantages[2, 0] == 0 and torch.equal(advantages, expected)


def test_kl_is_the_value_of_the_state():
    """With the exact KL the mean of the advantage over what the student may sample is 0 at every position."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(7, generator=g).double().log_softmax(-1) for _ in range(2))
    kl = (student.exp() * (student - teacher)).sum()
    config = read_signal_config(None, "v_opd").signal
    # One row a token of the vocabulary: all that could have been sampled.
    advantages = compute_advantages(teacher[:, None], student[:, None], torch.ones(7, 1), config, kl=kl.expand(7, 1))
    assert (student.exp() * advantages[:, 0]).sum().item() == pytest.approx(0.0, abs=1e-7)


def test_a_gain_limit_ends_the_inflation_of_noise():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 20, generator=g) * 1e-3
    zeros, ones = torch.zeros_like(noise), torch.ones_like(noise)
    unlimited = compute_advantages(noise, zeros, ones, read_signal_config(None, "gndpo").signal)
    limited = compute_advantages(
        noise, zeros, ones, read_signal_config({"gndpo": {"gain_limit": 10.0}}, "gndpo").signal
    )
    assert unlimited.std().item() == pytest.approx(1.0, abs=0.01)
    assert limited.std().item() == pytest.approx(0.01, rel=0.05)


def test_ranks_have_unit_variance_and_share_ties():
    x = np.array([3.0, -1e9, 3.0, 5.0, 1e9])
    ranks = unit_ranks(x)
    expected = ((2 * np.array([2.5, 1, 2.5, 4, 5]) - 1) / 5 - 1) * math.sqrt(3)
    np.testing.assert_allclose(ranks, expected)
    assert unit_ranks(np.arange(1000.0)).var(ddof=1) == pytest.approx(1.0, rel=0.01)


def test_the_average_over_steps_is_unbiased_from_the_first_step_and_follows():
    config = read_signal_config({"gndpo": {"scale": "ema", "ema_decay": 0.8}}, "gndpo").signal
    state, variances = SignalState(), []
    for step in range(6):
        teacher, old, mask = batch(seed=step, spread=1.0 + step)
        advantages = compute_advantages(teacher, old, mask, config, state=state)
        k = (teacher.double() - old.double()).clamp(-5, 5)[mask != 0].numpy()
        variances.append(k.var(ddof=1))
        weights = 0.8 ** np.arange(len(variances))[::-1]
        deviation = math.hypot(math.sqrt(np.average(variances, weights=weights)), 1e-4)
        np.testing.assert_allclose(advantages[mask != 0].double(), (k - k.mean()) / deviation, rtol=1e-5, atol=1e-6)


@given(problems(), st.floats(0.1, 3))
@quick
def test_the_task_reward_is_as_large_as_it_is_told_to_be(data, coef):
    mask = data["response_mask"]
    advantages = compute_advantages(**data, signal=resolve(bound="clamp"))
    task = torch.where(mask != 0, torch.linspace(-1e3, 1e3, mask.numel()).view(mask.shape), torch.nan)
    assume(advantages.abs().max() > 1e-3 and (task[mask != 0] != 0).any())
    mixed = mix(advantages, task, mask, coef)
    part = (mixed - advantages)[mask != 0]
    ratio = part.square().mean().sqrt() / advantages[mask != 0].square().mean().sqrt()
    assert ratio.item() == pytest.approx(coef, rel=1e-3)
    assert (mixed[mask == 0] == 0).all()
    assert torch.equal(mix(advantages, torch.zeros_like(advantages), mask, coef), advantages)


def test_the_task_reward_goes_through_verls_estimator():
    teacher, old, mask = batch()
    rewards = torch.zeros_like(old)
    rewards[[0, 3, 4], 0] = 1.0
    index = ["a", "a", "a", "b", "b", "b"]
    inputs = {"teacher_log_probs": teacher, "old_log_probs": old, "response_mask": mask, "index": index}
    plain, _ = compute_log_ratio_advantage("gndpo", **inputs)
    config = {"gndpo": {"task_reward": {"coef": 0.5}}}
    mixed, returns = compute_log_ratio_advantage("gndpo", **inputs, token_level_rewards=rewards, config=config)
    grpo, _ = get_adv_estimator_fn("grpo")(token_level_rewards=rewards, response_mask=mask, index=np.array(index))
    part = (mixed - plain).double()
    factor = part[0, 0] / grpo[0, 0]
    assert factor > 0 and torch.equal(mixed, returns)
    torch.testing.assert_close(part, factor * grpo.double(), rtol=1e-4, atol=1e-6)
    assert (part.norm() / plain.double().norm()).item() == pytest.approx(0.5, rel=1e-5)
    # Dr. GRPO's switch, which verl hands over beside the config. Groups with different spreads tell the two apart.
    rewards[1, 0] = 5.0
    unscaled = config | {"norm_adv_by_std_in_grpo": False}
    mixed, _ = compute_log_ratio_advantage("gndpo", **inputs, token_level_rewards=rewards, config=unscaled)
    grpo, _ = get_adv_estimator_fn("grpo")(
        token_level_rewards=rewards, response_mask=mask, index=np.array(index), norm_adv_by_std_in_grpo=False
    )
    part = (mixed - plain).double()
    torch.testing.assert_close(part, part[0, 0] / grpo[0, 0] * grpo.double(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"task_reward\.coef.*token_level_rewards"):
        compute_log_ratio_advantage("gndpo", **inputs, config=config)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_an_estimator_of_verl(preset):
    teacher, old, mask = batch()
    inputs = {"response_mask": mask, "teacher_log_probs": teacher, "old_log_probs": old}
    index, kl = list("aabbcc"), torch.rand_like(old)
    advantages, _ = get_adv_estimator_fn(preset)(
        token_level_rewards=torch.zeros_like(old), index=index, config={}, kl=kl, **inputs
    )
    settings = read_signal_config(None, preset).signal
    close(advantages, oracle(teacher, old, mask, settings, index, ["t"] * 6, kl))


@pytest.mark.parametrize(
    ("chosen", "words"), [({"baseline": "kl"}, "baseline=kl needs"), ({"scale": "group"}, "prompt of each row")]
)
def test_a_stage_without_its_input_says_what_it_needs(chosen, words):
    with pytest.raises(ValueError, match=words):
        compute_advantages(*batch(), read_signal_config({"gndpo": chosen}, "gndpo").signal)
