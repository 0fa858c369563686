# SPDX-License-Identifier: Apache-2.0
"""Ten thousand random batches through every signal, against the oracle of test_stages.py, with whatever may arrive.

`test_stages.py` looks for the smallest example that breaks a property. This file looks far: values at the ends of a
float, other dtypes, masks and shapes of all kinds, garbage where nothing may be read and where it must be named.
A failure names its seed and number; `GNDPO_RANDOM_BATCHES` sets how many batches run.
"""

import math
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import verl_gndpo.advantage as advantage
from tests.helpers import trace_of
from tests.unit.test_stages import oracle
from verl_gndpo.advantage import BASELINES, BOUNDS, SCALES, Signal, SignalState, Trace, compute_advantages
from verl_gndpo.observe.metrics import Tokens, describe_positions, describe_signal, describe_teachers, sum_parts

BATCHES = int(os.environ.get("GNDPO_RANDOM_BATCHES", 10_000))
SEEDS = 20

NOT_FINITE = (math.nan, math.inf, -math.inf)
# Certain, nearly certain, where exp() leaves float32 and float64, a banned token, and what masks put on logits.
ENDS = (0.0, -0.0, 1e-7, -1e-45, -1e-12, -1e-7, -1e-3, -1.0, -20.0, -88.0, -104.0, -745.0, -1e4, -3e4)
LARGEST = float(np.finfo(np.float32).max)
LOWEST = (*ENDS, -1e30, -LARGEST)


class Draw:
    """One batch and what is asked for, from one generator."""

    def __init__(self, seed: int, number: int):
        self.rng = np.random.default_rng((seed, number))
        self.rows = 1 if self.chance(0.15) else int(self.rng.integers(2, 40 if self.chance(0.05) else 9))
        self.length = 1 if self.chance(0.05) else int(self.rng.integers(2, 200 if self.chance(0.02) else 25))
        self.signal = self.draw_signal()
        self.dtype = self.one_of(*[torch.float32] * 7, torch.float64, torch.bfloat16, torch.float16)
        self.teacher, self.old = (torch.from_numpy(x).to(self.dtype) for x in self.draw_log_probs())
        self.valid = self.draw_mask()
        self.groups, self.teachers = (self.draw_labels() for _ in range(2))
        self.kl = torch.from_numpy(self.rng.exponential(size=self.shape)).to(self.dtype)
        self.task = torch.from_numpy(self.rng.normal(size=self.shape) * self.chance(0.9)).float()
        self.task_coef = float(self.rng.exponential()) if self.chance(0.2) else 0.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.length

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def one_of(self, *values):
        return values[self.rng.integers(len(values))]

    def around(self, low: float, high: float) -> float:
        """Return a positive number whose order of magnitude is uniform."""
        return float(10 ** self.rng.uniform(low, high))

    def draw_signal(self) -> Signal:
        bound = self.one_of(*BOUNDS)
        ranges = {"limit": (-3, 3), "power_alpha": (-1, 1), "soft_clamp_factor": (-1, 1)}
        parameters = {
            key: self.around(*ranges[key]) if key in ranges else float(self.rng.uniform(0.01, 0.99))
            for key in BOUNDS[bound].parameters
        }
        return Signal(
            bound=bound,
            parameters=parameters,
            baseline=self.one_of(*BASELINES),
            scale=self.one_of(*SCALES),
            top_k=64,
            std_floor=self.around(-5, 0),
            gain_limit=self.one_of(math.inf, self.around(-1, 3)),
            ema_decay=float(self.rng.uniform(0, 0.99)),
        )

    def draw_log_probs(self):
        rng, shape = self.rng, self.shape
        old = -rng.exponential(self.around(-3, 1.5), shape)
        kind = self.one_of("near", "near", "near", "equal", "shifted", "ends", "lowest", "far", "outlier", "free")
        if kind == "equal":
            return old, old.copy()
        if kind == "shifted":
            return old - self.around(-3, 3), old
        if kind in ("ends", "lowest"):
            ends = LOWEST if kind == "lowest" and self.dtype in (torch.float32, torch.float64) else ENDS
            return rng.choice(ends, shape), rng.choice(ends, shape)
        if kind == "far":
            return old - 1e4, old
        if kind == "free":
            return rng.uniform(-50, 0, shape), rng.uniform(-50, 0, shape)
        # Rounding can take a log-prob above 0.
        teacher = np.minimum(old + rng.normal(size=shape) * self.around(-6, 1), 1e-6)
        if kind == "outlier":
            teacher[rng.integers(shape[0]), rng.integers(shape[1])] = -self.around(0, 4)
        return teacher, old

    def draw_mask(self) -> np.ndarray:
        kind = self.one_of("prefix", "prefix", "holes", "all", "one")
        positions = np.arange(self.length)
        if kind == "prefix":
            valid = positions < self.rng.integers(0, self.length + 1, (self.rows, 1))
        elif kind == "holes":
            valid = self.rng.random(self.shape) < self.rng.random()
        else:
            valid = np.full(self.shape, kind == "all")
        if kind != "one" and self.chance(0.3):
            # Rows that verl adds as padding.
            valid[self.rng.random(self.rows) < 0.5] = False
        if not valid.any():
            valid[self.rng.integers(self.rows), self.rng.integers(self.length)] = True
        return valid

    def draw_labels(self) -> list[str]:
        number = self.one_of(1, 2, 3, self.rows)
        return [str(label) for label in self.rng.integers(number, size=self.rows)]

    def spoil_what_is_masked(self) -> None:
        hidden = torch.from_numpy(~self.valid)
        for x in (self.teacher, self.old, self.kl, self.task):
            x[hidden] = self.one_of(*NOT_FINITE, 0.0, 1.0)

    def spoil_a_valid_token(self) -> tuple[int, int]:
        """Put NaN or inf under valid tokens of one input. Returns the place of the first."""
        places = np.argwhere(self.valid)
        which = sorted(self.rng.choice(len(places), size=min(int(self.rng.integers(1, 4)), len(places)), replace=False))
        needed = [*(["kl"] if self.signal.baseline == "kl" else []), *(["task"] if self.task_coef else [])]
        name = self.one_of("teacher", "old", *needed)
        for row, position in places[which]:
            getattr(self, name)[row, position] = self.one_of(*NOT_FINITE)
        row, position = places[which[0]].tolist()
        return row, position

    def run(self, *, task: bool = False, state: SignalState | None = None) -> tuple[torch.Tensor, Trace]:
        traces = []
        advantages = compute_advantages(
            self.teacher,
            self.old,
            torch.from_numpy(self.valid).to(self.one_of(torch.bool, torch.int64, torch.float32)),
            self.signal,
            groups=self.groups,
            teachers=self.one_of(self.teachers, None) if len(set(self.teachers)) == 1 else self.teachers,
            kl=self.kl,
            task_advantages=self.task,
            task_coef=self.task_coef if task else 0.0,
            state=state,
            on_trace=traces.append,
        )
        return advantages, traces[0]

    def oracle(self, scale: str) -> np.ndarray:
        """Return what the oracle makes of the batch with this scale. It can't read what the mask hides."""
        visible = torch.from_numpy(self.valid)
        teacher, old, kl = (torch.where(visible, x.double(), 0.0) for x in (self.teacher, self.old, self.kl))
        with np.errstate(all="ignore"):
            return oracle(teacher, old, self.valid, replace(self.signal, scale=scale), self.groups, self.teachers, kl)


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6 * max(1.0, np.abs(expected).max()))


def check_ranks(actual: np.ndarray, values: np.ndarray) -> None:
    """Check that each token has the rank of its value, up to the order of values that are equal but for rounding.

    Args:
        actual, values: (tokens,), the advantages and what they are the ranks of.
    """
    ordered, slack = np.sort(values), 1e-9 * max(1.0, np.abs(values).max())
    rank = (actual / math.sqrt(3) + 1) * values.size / 2 + 0.5
    fewer, more = (np.searchsorted(ordered, values + sign * slack, side) for sign, side in ((-1, "left"), (1, "right")))
    assert (rank >= fewer + 1 - 1e-3).all() and (rank <= more + 1e-3).all()
    assert actual.sum() == pytest.approx(0, abs=1e-5 * values.size)


class Average:
    """The oracle of scale=ema: the average of the variances of the batches so far, each with its own decay."""

    def __init__(self):
        self.state, self.variance, self.weight = SignalState(), 0.0, 0.0

    def expect(self, draw: Draw, r: np.ndarray, counted: np.ndarray) -> np.ndarray:
        n, decay = counted.sum(), draw.signal.ema_decay
        if n:
            self.variance = decay * self.variance + (1 - decay) * (r[counted].var(ddof=1) if n > 1 else 0.0)
            self.weight = decay * self.weight + (1 - decay)
        gain = 1 / math.sqrt(self.variance / self.weight + draw.signal.std_floor**2) if n > 1 else 1.0
        return r * min(gain, draw.signal.gain_limit if n > 1 else 1.0)


def check(draw: Draw, average: Average) -> None:
    draw.spoil_what_is_masked()
    scale, valid = draw.signal.scale, draw.valid
    expected = draw.oracle("none" if scale in ("rank", "ema") else scale)
    counted = valid.copy()
    if draw.signal.bound == "mask":
        teacher, old = (x.double().numpy()[valid] for x in (draw.teacher, draw.old))
        counted[valid] = np.abs(teacher - old) <= draw.signal.parameters["limit"]
    if scale == "ema":
        expected = average.expect(draw, expected, counted)
    if scale != "rank" and np.abs(expected).max() > LARGEST:
        with pytest.raises(ValueError, match="leaves float32"):
            draw.run(state=average.state if scale == "ema" else None)
        return

    advantages, trace = draw.run(state=average.state if scale == "ema" else None)
    assert advantages.dtype == torch.float32 and tuple(advantages.shape) == draw.shape
    actual = advantages.double().numpy()
    assert np.isfinite(actual).all() and (actual[~valid] == 0).all()
    if scale != "rank":
        close(actual, expected)
    elif counted.any():
        check_ranks(actual[counted], expected[counted])

    tokens = Tokens(trace)
    metrics = describe_signal(tokens) | describe_teachers(draw.teachers, tokens)
    metrics |= describe_positions(sum_parts(tokens, np.full(draw.rows, draw.length)))
    assert not {name: value for name, value in metrics.items() if not math.isfinite(value)}

    if draw.task_coef and scale != "ema":
        task = np.where(valid, draw.task.double().numpy(), 0.0)
        sizes = [math.sqrt((x**2).sum()) for x in (actual, task)]
        mixed = actual + draw.task_coef * (sizes[0] / sizes[1] if all(sizes) else 1.0) * task
        if np.abs(mixed).max() <= LARGEST:
            close(draw.run(task=True)[0].double().numpy(), mixed)


def check_that_it_is_refused(draw: Draw) -> None:
    row, position = draw.spoil_a_valid_token()
    with pytest.raises(ValueError, match=f"NaN or inf under a valid token: row {row}, position {position}: "):
        draw.run(task=True)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_batches_equal_the_oracle_or_name_what_is_wrong(seed, monkeypatch):
    average = Average()
    for number in range(BATCHES // SEEDS):
        draw = Draw(seed, number)
        # Small blocks, so that small batches have several.
        monkeypatch.setattr(advantage, "BLOCK_TOKENS", draw.one_of(1, 8, 64, 1 << 16))
        try:
            if draw.chance(0.1):
                check_that_it_is_refused(draw)
            else:
                check(draw, average)
        except BaseException:
            print(f"Draw({seed}, {number}): {draw.signal}, {draw.dtype}, {draw.shape}")
            raise


@pytest.mark.parametrize("baseline", ["none", "batch"])
@pytest.mark.parametrize("scale", ["batch", "group"])
def test_a_deviation_that_its_mean_dwarfs_is_not_lost(baseline, scale):
    """Sums of squares alone would put it at 0 or at several times what it is."""
    d = torch.tensor([[-1e6 - 1e-3, -1e6 + 1e-3] * 500, [3.0, 5.0] * 500], dtype=torch.float64)
    d = d[:1] if scale == "batch" else d
    signal = Signal("none", {}, baseline, scale, 64, 1e-9, math.inf, 0.9)
    trace = trace_of(d, torch.zeros_like(d), torch.ones_like(d), signal, groups=["a", "b"][: len(d)])
    np.testing.assert_allclose(trace.gain, [1e3, 1][: len(d)], rtol=1e-3)


def test_an_advantage_that_leaves_float32_is_named():
    lowest = torch.finfo(torch.float32).min
    teacher, old = torch.tensor([[lowest, 0.0, 0.0]]), torch.tensor([[0.0, lowest, lowest]])
    signal = Signal("none", {}, "batch", "none", 64, 1e-4, math.inf, 0.9)
    with pytest.raises(ValueError, match=r"row 0, position 0 leaves float32.*bound=clamp"):
        compute_advantages(teacher, old, torch.ones(1, 3), signal)


@pytest.mark.parametrize(("name", "baseline", "coef"), [("kl", "kl", 0.0), ("task_advantages", "none", 0.5)])
def test_what_a_stage_needs_beside_the_log_probs_is_checked(name, baseline, coef):
    old, mask = torch.zeros(2, 3), torch.ones(2, 3)
    signal = Signal("none", {}, baseline, "rank", 64, 1e-4, math.inf, 0.9)
    for x, words in (
        (None, "there is none"),
        (torch.zeros(2, 4), re.escape("shape (2, 4) and the log-probs (2, 3)")),
        (torch.tensor([[0.0] * 3, [0.0, math.nan, 0.0]]), f"row 1, position 1: {name}.* is nan"),
    ):
        with pytest.raises(ValueError, match=words):
            compute_advantages(old, old, mask, signal, task_coef=coef, **{name: x})
