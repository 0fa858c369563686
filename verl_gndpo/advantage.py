# SPDX-License-Identifier: Apache-2.0
"""From teacher and student log-probs to advantages: the algorithm, as a pipeline of pure functions.

For every response token y_t of the batch (m is the response mask, all statistics run over tokens with m = 1):

    D = log pi_T(y_t) - log pi_old(y_t)          log-ratio of the sampled token, nats
    k = bound(D)                                 BOUNDS: no single token may dominate
    r = k - b                                    baseline: what any token would have got here
    A = r * g * m                                scale: g = 1 / deviation of r
    A = A + coef * rms(A) / rms(A_task) * A_task     task reward, where coef > 0

GNDPO (arXiv 2606.09091) is bound=clamp at 5, baseline=batch, scale=batch:

    A = (clip(D, -5, +5) - mu) / sqrt(var + 1e-8) * m        mu, var (Bessel-corrected) over the whole batch

presets.py names the published combinations. Bounds take the valid tokens of a batch block by block, in float64, so that
nothing is lost where two log-probs nearly cancel. Everything runs on the host, as verl's trainer does.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from inspect import signature
from operator import add
from typing import Any, NamedTuple

import numpy as np
import torch

from verl_gndpo.setting import Setting

# A probability of 1 has no log-odds, so log-probs above this one, in nats, count as this one.
CERTAIN = -1e-9

# Tokens of the batch per block: a block and what a bound makes of it stay in a core's cache (benchmarks/estimator.py).
BLOCK_TOKENS = 1 << 16

BASELINES = ("none", "batch", "group", "position", "teacher", "kl")
SCALES = ("none", "batch", "group", "teacher", "ema", "rank")
# Sums of squares keep about 16 digits. Below this share of the squared mean, too few of the variance's are left.
LEAST_SHARE_OF_SQUARED_MEAN = 1e-6
# For a baseline, the scales that can use its sums: subtracting a mean leaves the deviation from it as it was.
SAME_SEGMENTS = {
    "none": ("none", "batch", "ema"),
    "batch": ("none", "batch", "ema"),
    "group": ("none", "group"),
    "teacher": ("none", "teacher"),
}

# --- bound: log-probs of both models (tokens,) in nats -> k (tokens,) and which tokens still count --------------------


@dataclass(frozen=True)
class Bound:
    """A way to bound the log-ratio.

    Attributes:
        function: from teacher and student log-probs, (tokens,) float64 each, nats, and the parameters by name, to k,
            (tokens,). It sees one block of the batch at a time. If it takes `mean_abs_log_ratio`, it gets the mean of
            abs(D) over the whole batch, nats.
        parameters: what `algorithm.gndpo` can set, by key.
        keeps: takes the same, and returns which tokens count, (tokens,) bool; None: all.
        clips_at: takes the parameters and, if it asks for it, `mean_abs_log_ratio`, and returns the abs(D), nats,
            beyond which a token counts as clipped in the metrics; None: no token does.
    """

    function: Callable[..., torch.Tensor]
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    keeps: Callable[..., torch.Tensor] | None = None
    clips_at: Callable[..., float] | None = None


BOUNDS: dict[str, Bound] = {}


def register_bound(
    name: str,
    *,
    keeps: Callable[..., torch.Tensor] | None = None,
    clips_at: Callable[..., float] | None = None,
    **parameters: Setting,
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Make a function the bound `algorithm.gndpo.bound=<name>`, with a key of `algorithm.gndpo` for each parameter.

    Args:
        name: value of `algorithm.gndpo.bound`.
        keeps, clips_at, parameters: see `Bound`. Bounds may share a parameter: its declarations must then be equal.

    Raises:
        ValueError: the name is taken, or another bound declares a parameter differently.
    """
    if name in BOUNDS:
        raise ValueError(f"there is a bound called {name} already")
    for key, declared in parameters.items():
        for other, bound in BOUNDS.items():
            if bound.parameters.get(key, declared) != declared:
                raise ValueError(f"parameter {key} of bound {name} is declared differently by bound {other}")

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        BOUNDS[name] = Bound(function, parameters, keeps, clips_at)
        return function

    return register


def limit_itself(limit: float) -> float:
    """Return the limit, for bounds that clip D at it."""
    return limit


LIMIT = Setting(5.0, "Limit on both sides, nats.", above=0)
NEGATIVE_LIMIT = Setting(0.4, "How far below 0 the bound may go before it is weighted.", above=0, at_most=1)


@register_bound("none")
def no_bound(teacher: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """k = D, in nats: a Monte Carlo estimate of the reverse KL's gradient, unbounded (Thinking Machines)."""
    return teacher - old


@register_bound("clamp", clips_at=limit_itself, limit=LIMIT)
def clamp(teacher: torch.Tensor, old: torch.Tensor, limit: float) -> torch.Tensor:
    """k = clip(D, -limit, +limit), in nats (GNDPO; verl's `loss_max_clamp`)."""
    return (teacher - old).clamp_(-limit, limit)


@register_bound("tanh")
def tanh(teacher: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """k = tanh(D), in (-1, 1) (an arm of PowerOPD, arXiv 2606.17199)."""
    return (teacher - old).tanh_()


@register_bound("sign")
def sign(teacher: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """k = sign(D): the gradient of the total variation (TV-OPD, arXiv 2609.08341)."""
    return (teacher - old).sign_()


@register_bound("power", power_alpha=Setting(5.0, "Exponent of both probabilities.", above=0))
def power(teacher: torch.Tensor, old: torch.Tensor, power_alpha: float) -> torch.Tensor:
    """k = pi_T^a - pi_old^a, in [-1, 1], of D's sign (PowerOPD, arXiv 2606.17199).

    Args:
        teacher, old: (tokens,), log-probs in nats.
        power_alpha: a > 0; towards 0, k / a becomes D.
    """
    # Larger probability times (1 - ratio): exact where the two nearly agree, and nothing overflows.
    larger, d = torch.maximum(teacher, old), teacher - old
    return (power_alpha * larger).exp() * -torch.expm1(-power_alpha * d.abs()) * d.sign()


@register_bound("gap", negative_limit=NEGATIVE_LIMIT)
def gap(teacher: torch.Tensor, old: torch.Tensor, negative_limit: float) -> torch.Tensor:
    """k = sqrt(pi_old) * max(pi_T - pi_old, -negative_limit), of D's sign (this project's; docs/study.md).

    The gap of the probabilities is bounded and vanishes as the student approaches the teacher. Its weight makes the
    gradients of likely and unlikely tokens more alike, and ends the positive side at 2 / sqrt(27) = 0.38. The negative
    side needs a limit, because outliers are tokens to which the teacher gives almost no probability.
    """
    return (old / 2).exp() * power(teacher, old, 1.0).clamp(min=-negative_limit)


@register_bound("odds", negative_limit=NEGATIVE_LIMIT)
def odds(teacher: torch.Tensor, old: torch.Tensor, negative_limit: float) -> torch.Tensor:
    """k = pi_old * max(tanh((logit pi_T - logit pi_old) / 2), -negative_limit), of D's sign (this project's).

    If only two tokens are possible, pi_old times any odd function of the log-odds ratio gives the same gradient
    whichever of the two is sampled, so that sampling adds no variance.
    """
    # Odds need probabilities of at most 1, and rounding can take a log-prob above 0.
    teacher, old = teacher.clamp(max=0), old.clamp(max=0)
    student, rest = old.exp(), -torch.expm1(old)
    disagree = student * -torch.expm1(teacher) + teacher.exp() * rest
    # tanh((logit q - logit p) / 2) = (q - p) / (p (1 - q) + q (1 - p)); 0 if both are certain of the same token.
    opinion = torch.where(disagree > 0, power(teacher, old, 1.0) / disagree, 0.0)
    return student * opinion.clamp(min=-negative_limit)


@register_bound("log_odds", limit=LIMIT)
def log_odds(teacher: torch.Tensor, old: torch.Tensor, limit: float) -> torch.Tensor:
    """k = pi_old * clip(logit pi_T - logit pi_old, -limit, +limit), of D's sign (this project's; docs/study.md).

    Like `odds`, but it grows with the disagreement up to a larger limit, as the log-ratio does. A signal that saturates
    early is weak at first, and too strong near the end for the learning rate that compensates for it. In nats.
    """
    log_odds_teacher, log_odds_old = (
        x - torch.log(-torch.expm1(x)) for x in (teacher.clamp(max=CERTAIN), old.clamp(max=CERTAIN))
    )
    return old.clamp(max=0).exp() * (log_odds_teacher - log_odds_old).clamp(-limit, limit)


@register_bound(
    "proximal",
    proximal_alpha=Setting(0.5, "Weight of the teacher in the mixture that is the target.", above=0, below=1),
)
def proximal(teacher: torch.Tensor, old: torch.Tensor, proximal_alpha: float) -> torch.Tensor:
    """k = log(alpha * rho + 1 - alpha), rho = pi_T / pi_old: the log-ratio to a mixture of teacher and student.

    In nats, at least log(1 - alpha) (TOP-D, arXiv 2607.04751).
    """
    d = teacher - old
    # log1p is exact near 0. Above 20 the 1 - alpha no longer matters, and expm1 could overflow.
    large = d + math.log(proximal_alpha)
    return torch.where(d > 20, large, torch.log1p(proximal_alpha * torch.expm1(d.clamp(max=20))))


def soft_limit(soft_clamp_factor: float, mean_abs_log_ratio: float) -> float:
    """c = factor * mean(abs(D)) over the batch, in nats."""
    return soft_clamp_factor * mean_abs_log_ratio


@register_bound(
    "soft_clamp",
    clips_at=soft_limit,
    soft_clamp_factor=Setting(3.0, "The limit as a multiple of the batch mean of abs(D).", above=0),
)
def soft_clamp(
    teacher: torch.Tensor, old: torch.Tensor, soft_clamp_factor: float, mean_abs_log_ratio: float
) -> torch.Tensor:
    """k = clip(D, -c, +c), c = `soft_limit`, in nats (arXiv 2607.07050)."""
    return clamp(teacher, old, soft_limit(soft_clamp_factor, mean_abs_log_ratio))


def keep_within(teacher: torch.Tensor, old: torch.Tensor, limit: float) -> torch.Tensor:
    """Return True for tokens with abs(D) <= limit; the others get advantage 0 (Uni-OPD, arXiv 2605.03677)."""
    return (teacher - old).abs() <= limit


@register_bound("mask", keeps=keep_within, clips_at=limit_itself, limit=LIMIT)
def mask(teacher: torch.Tensor, old: torch.Tensor, limit: float) -> torch.Tensor:
    """k = D, in nats, for the tokens that `keep_within` keeps."""
    return teacher - old


@dataclass(frozen=True)
class Signal:
    """The resolved stages of a signal: every value is there and valid. `config.read_signal_config` makes it.

    Attributes:
        bound: a name of BOUNDS.
        parameters: all parameters of that bound, and no others.
        baseline: one of BASELINES.
        scale: one of SCALES.
        top_k: for baseline=kl, the number of the student's most likely tokens that are compared one by one.
        std_floor: floor of the standard deviation, in the bound's unit, added in quadrature.
        gain_limit: largest factor of the scale; inf: none.
        ema_decay: for scale=ema, the weight of the steps before.
    """

    bound: str
    parameters: Mapping[str, float]
    baseline: str
    scale: str
    top_k: int
    std_floor: float
    gain_limit: float
    ema_decay: float


# --- baseline and scale: the tokens that share a mean or a deviation --------------------------------------------------


@dataclass(frozen=True)
class Sums:
    """Count, sum and sum of squares of the tokens of each segment: what mean and deviation are made of.

    All are (segments,). Sums of parts of a batch (micro-batches, ranks) add up to those of the whole.
    """

    count: np.ndarray
    total: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, segment: np.ndarray, segments: int) -> "Sums":
        """Add up tokens by segment. Args: x (tokens,) float64; segment (tokens,) int64, in [0, segments)."""
        return cls(*(np.bincount(segment, weights, segments) for weights in (None, x, x * x)))

    @classmethod
    def of_pieces(cls, x: np.ndarray, sizes: np.ndarray) -> "Sums":
        """Add up consecutive pieces of x, (tokens,) float64, which together are all of it. Pieces may be empty."""
        if sizes.size == 1:
            # Not numpy's dot: its threads and torch's would wait for each other, for milliseconds per call.
            squares = torch.dot(*[torch.from_numpy(x)] * 2).reshape(1).numpy()
            return cls(sizes, x.sum(keepdims=True), squares)
        full = sizes > 0
        starts = (sizes.cumsum() - sizes)[full]
        total, squares = np.zeros((2, sizes.size))
        if starts.size:
            total[full], squares[full] = np.add.reduceat(x, starts), np.add.reduceat(x * x, starts)
        return cls(sizes, total, squares)

    @staticmethod
    def concatenate(parts: "Sequence[Sums]") -> "Sums":
        """Put the segments of several parts one after the other."""
        return Sums(*(np.concatenate(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))

    def merge(self, segment: np.ndarray, segments: int) -> "Sums":
        """Add up segments to larger ones. Args: segment, the larger one of each, (old segments,) int64."""
        return Sums(*(np.bincount(segment, part, segments) for part in vars(self).values()))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> np.ndarray:
        """(segments,); 0 where a segment is empty."""
        return self.total / np.maximum(self.count, 1)

    @property
    def variance(self) -> np.ndarray:
        """(segments,), Bessel-corrected; 0 where a segment has fewer than two tokens."""
        return np.maximum(self.squares - self.count * self.mean**2, 0) / np.maximum(self.count - 1, 1)


def deviation_gain(variance: np.ndarray, std_floor: float, gain_limit: float = math.inf) -> np.ndarray:
    """g = min(1 / sqrt(variance + std_floor^2), gain_limit), in 1/(unit of k)."""
    return np.minimum(1 / np.sqrt(variance + std_floor**2), gain_limit)


def unit_ranks(x: np.ndarray) -> np.ndarray:
    """Return ranks (ties share their mean), spread evenly around 0 with variance 1: within +-sqrt(3), whatever x is."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    middle = count.cumsum() - (count - 1) / 2
    return ((2 * middle - 1) / x.size - 1)[place] * math.sqrt(3)


@dataclass
class SignalState:
    """The average that scale=ema carries from step to step. The trainer saves it with its checkpoints."""

    ema_variance: float = 0.0
    ema_weight: float = 0.0

    def update(self, variance: float, decay: float) -> float:
        """Add a step's variance, and return the average over steps, weighted by decay^age."""
        self.ema_variance = decay * self.ema_variance + (1 - decay) * variance
        self.ema_weight = decay * self.ema_weight + (1 - decay)
        return self.ema_variance / self.ema_weight


# --- the pipeline -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """The stages of a batch's valid tokens, row after row, for metrics.

    Attributes:
        valid: (batch, response_length) bool, their places.
        log_ratio: (tokens,) float32, D, nats.
        bounded: (tokens,) float32, k, in the bound's unit.
        kept: (tokens,) bool, the tokens that the bound keeps; None: all.
        advantages: (tokens,) float32, A.
        clips_at: abs(D), nats, beyond which a token counts as clipped; inf: none does.
        gain: (batch,) float64, the factor of each row's scale; None for scale=rank.
    """

    valid: np.ndarray
    log_ratio: np.ndarray
    bounded: np.ndarray
    kept: np.ndarray | None
    advantages: np.ndarray
    clips_at: float
    gain: np.ndarray | None


# What overflows, and what is not a number, is found and named below.
@np.errstate(over="ignore", invalid="ignore")
@torch.no_grad()
def compute_advantages(
    teacher_log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    signal: Signal,
    *,
    groups: Sequence[Hashable] | None = None,
    teachers: Sequence[Hashable] | None = None,
    kl: torch.Tensor | None = None,
    task_advantages: torch.Tensor | None = None,
    task_coef: float = 0.0,
    state: SignalState | None = None,
    on_trace: Callable[[Trace], Any] | None = None,
) -> torch.Tensor:
    """Run all stages over a batch.

    Args:
        teacher_log_probs: (batch, response_length), nats, any floating dtype.
        old_log_probs: (batch, response_length), nats: the student's, by the training engine, before the update.
        response_mask: (batch, response_length), non-zero on the tokens that count. Values of the log-probs elsewhere,
            NaN and inf included, have no effect.
        signal: the stages.
        groups: prompt of each row, for baseline or scale `group`.
        teachers: teacher of each row, for baseline or scale `teacher`; None: one for all.
        kl: (batch, response_length), KL(student || teacher) at each position in nats, for baseline=kl.
        task_advantages: (batch, response_length), mixed in with weight `task_coef`.
        task_coef: see `mix`; 0: nothing is mixed in.
        state: for scale=ema; it is updated. None: this batch alone.
        on_trace: called once, with the stages of all valid tokens.

    Returns:
        (batch, response_length), float32, exactly 0 where the mask is 0 or bound=mask drops the token.

    Raises:
        ValueError: shapes differ; no token is valid; NaN or inf under a valid token, in any of the inputs; a stage's
            input is missing; a bound returns NaN or inf; an advantage leaves float32.
    """
    valid = _check_batch(teacher_log_probs, old_log_probs, response_mask)
    if signal.baseline == "kl":
        _check_input("algorithm.gndpo.baseline=kl", "kl, KL(student || teacher) at each response token", kl, valid)
    if task_coef:
        what = "task_advantages, which verl's estimator makes of the rewards"
        _check_input("algorithm.gndpo.task_reward.coef", what, task_advantages, valid)
    bounded = _bound_tokens(teacher_log_probs, old_log_probs, valid, signal, keep_trace=on_trace is not None)
    advantages, gain = _center_and_scale(bounded, valid.shape, signal, groups, teachers, kl, state)
    result = torch.from_numpy(advantages)
    if task_coef:
        assert task_advantages is not None, "checked above"
        result = mix(result, task_advantages.cpu(), response_mask.cpu(), task_coef)
    if not result.isfinite().all():
        row, position = (~result.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"the advantage of row {row}, position {position} leaves float32: teacher_log_probs "
            f"{teacher_log_probs[row, position].item()}, old_log_probs {old_log_probs[row, position].item()}; a bound "
            "such as algorithm.gndpo.bound=clamp limits it; nothing was updated"
        )
    if on_trace:
        on_trace(Trace(valid, *bounded.trace, result.numpy()[valid], bounded.clips_at, gain))
    return result.to(teacher_log_probs.device)


def mix(
    advantages: torch.Tensor, task_advantages: torch.Tensor, response_mask: torch.Tensor, coef: float
) -> torch.Tensor:
    """A + coef * rms(A) / rms(A_task) * A_task: at coef 1 both parts are equally large, whatever their units.

    Args:
        advantages, task_advantages, response_mask: (batch, response_length). If one part is 0 everywhere, the result is
            the other.
    """
    valid = response_mask.bool()
    task = torch.where(valid, task_advantages, 0.0).double()
    size, task_size = (x.double().square().sum().sqrt() for x in (advantages, task))
    factor = size / task_size if size > 0 and task_size > 0 else 1.0
    return (advantages + coef * factor * task).float()


def _check_batch(teacher: torch.Tensor, old: torch.Tensor, response_mask: torch.Tensor) -> np.ndarray:
    """Return the mask as bool.

    Raises:
        ValueError: shapes differ; no token is valid.
    """
    shapes = [tuple(x.shape) for x in (teacher, old, response_mask)]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        raise ValueError(
            "teacher_log_probs, old_log_probs and response_mask must all be (batch, response_length), "
            f"got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    valid = response_mask.bool().cpu().numpy()
    if not valid.any():
        raise ValueError(
            f"no valid response token in a batch of shape {shapes[0]}: response_mask is 0 everywhere; "
            "check that rollouts are not empty and that the mask is not filtered away"
        )
    return valid


def _check_input(setting: str, what: str, x: torch.Tensor | None, valid: np.ndarray) -> None:
    """Check what a setting needs beside the log-probs.

    Args:
        setting: for messages.
        what: name and meaning of the input, for messages.
        x: (batch, response_length).
        valid: the mask, as bool.

    Raises:
        ValueError: it is missing, has another shape, or is not finite under a valid token; names the first one.
    """
    if x is None:
        raise ValueError(f"{setting} needs {what}, and there is none")
    if tuple(x.shape) != valid.shape:
        raise ValueError(f"{setting} needs {what}: it has the shape {tuple(x.shape)} and the log-probs {valid.shape}")
    bad = ~torch.isfinite(x).cpu() & torch.from_numpy(valid)
    for row, position in bad.nonzero().tolist()[:1]:
        raise ValueError(
            f"NaN or inf under a valid token: row {row}, position {position}: {what}, is {x[row, position].item()} "
            f"({int(bad.sum())} such tokens in the batch); nothing was updated"
        )


@dataclass
class _Block:
    """Some rows of a batch, few enough for a core's cache.

    Attributes:
        rows: their place in the batch.
        counted: (rows, response_length) bool, the valid tokens that the bound keeps.
        k: (counted tokens,) float64, row after row: what the stages so far have made of them.
    """

    rows: slice
    counted: np.ndarray
    k: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """(rows,): the number of tokens of each row."""
        return np.count_nonzero(self.counted, axis=1)

    @property
    def positions(self) -> np.ndarray:
        """(counted tokens,): the position of each in its response."""
        return np.broadcast_to(np.arange(self.counted.shape[1]), self.counted.shape)[self.counted]


def _rows_of_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(BLOCK_TOKENS // shape[1], 1)
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def _on_host(x: torch.Tensor) -> np.ndarray:
    # numpy has no bfloat16, all of whose values float32 has, too.
    return (x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy()


class _Bounded(NamedTuple):
    """The first stage of a batch.

    Attributes:
        blocks: all rows.
        sums: those of all k together.
        trace: D, k and kept of all valid tokens, as `Trace` has them; empty if there is no trace.
        clips_at: see `Trace`.
    """

    blocks: list[_Block]
    sums: Sums
    trace: tuple[np.ndarray, np.ndarray, np.ndarray | None]
    clips_at: float


def _bound_tokens(
    teacher: torch.Tensor, old: torch.Tensor, valid: np.ndarray, signal: Signal, keep_trace: bool
) -> _Bounded:
    """Run the first stage over all valid tokens."""
    bound, parameters = BOUNDS[signal.bound], dict(signal.parameters)
    log_probs = _on_host(teacher), _on_host(old)

    def take(rows: slice) -> Iterator[torch.Tensor]:
        # numpy selects several times faster than torch.
        return (torch.from_numpy(x[rows][valid[rows]]) for x in log_probs)

    functions = [f for f in (bound.function, bound.keeps, bound.clips_at) if f]
    if any("mean_abs_log_ratio" in signature(f).parameters for f in functions):
        total = sum((t.double() - o).abs_().sum().item() for t, o in map(take, _rows_of_blocks(valid.shape)))
        parameters["mean_abs_log_ratio"] = total / np.count_nonzero(valid)

    def bind(function: Callable[..., Any]) -> Callable[..., Any]:
        """Fill in those of the parameters that a function takes."""
        return partial(function, **{key: x for key, x in parameters.items() if key in signature(function).parameters})

    run, keeps = bind(bound.function), bind(bound.keeps) if bound.keeps else None
    count = np.count_nonzero(valid) if keep_trace else 0
    traced_d, traced_k = np.empty((2, count), np.float32)
    traced_kept = np.empty(count, bool) if keep_trace and keeps else None
    blocks, sums, begin, finite = [], [], 0, True
    for rows in _rows_of_blocks(valid.shape):
        t, o = take(rows)
        # The product of finite numbers is finite, unless it overflows: the fastest way to look for others.
        finite = finite and math.isfinite(torch.dot(t, o))
        t, o = t.double(), o.double()
        bounded, counted = run(t, o), valid[rows]
        k, kept = bounded.numpy(), keeps(t, o).numpy() if keeps else None
        if keep_trace:
            here = slice(begin, begin := begin + len(t))
            traced_d[here], traced_k[here] = t.sub_(o).numpy(), k
            if traced_kept is not None:
                traced_kept[here] = kept
        if kept is not None:
            counted = counted.copy()
            counted[valid[rows]], k = kept, k[kept]
        blocks.append(_Block(rows, counted, k))
        sums.append(Sums.of_pieces(k, np.array([k.size])))
    if not finite:
        _check_finite(teacher, old, valid)
    whole = reduce(add, sums)
    if not math.isfinite(whole.total[0]):
        raise ValueError(f"algorithm.gndpo.bound={signal.bound} returns NaN or inf for finite log-probs")
    clips_at = bind(bound.clips_at)() if bound.clips_at else math.inf
    return _Bounded(blocks, whole, (traced_d, traced_k, traced_kept), clips_at)


def _check_finite(teacher: torch.Tensor, old: torch.Tensor, valid: np.ndarray) -> None:
    """Check each valid token.

    Raises:
        ValueError: some log-ratio is not a finite number; names the first one.
    """
    bad = ~torch.isfinite(teacher.double() - old.double()).cpu() & torch.from_numpy(valid)
    for row, position in bad.nonzero().tolist()[:1]:
        raise ValueError(
            f"NaN or inf under a valid token: row {row}, position {position}: "
            f"teacher_log_probs {teacher[row, position].item()}, old_log_probs {old[row, position].item()} "
            f"({int(bad.sum())} such tokens in the batch); nothing was updated"
        )


class _Segments:
    """The rows that share a mean or a deviation: all of them, those of a prompt, or those of a teacher."""

    def __init__(self, kind: str, rows: int, labels: Sequence[Hashable] | None):
        """
        Args:
            kind: a baseline or a scale.
            rows: number of rows of the batch.
            labels: prompt or teacher of each row; None: one segment.

        Raises:
            ValueError: there are not as many labels as rows.
        """
        labels = [0] * rows if labels is None else labels
        if len(labels) != rows:
            raise ValueError(f"{len(labels)} labels for `{kind}` and {rows} rows")
        numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        self.of_row = np.array([numbers[label] for label in labels])
        self.number = len(numbers)

    def add_up(self, blocks: list[_Block]) -> Sums:
        """Return the sums of each segment."""
        if self.number == 1:
            return reduce(add, (Sums.of_pieces(block.k, np.array([block.k.size])) for block in blocks))
        by_row = Sums.concatenate([Sums.of_pieces(block.k, block.sizes) for block in blocks])
        return by_row.merge(self.of_row, self.number)

    def variance(self, blocks: list[_Block], sums: Sums) -> np.ndarray:
        """Return the variance of each segment.

        Args:
            blocks: all rows.
            sums: those of the segments.
        """
        variance, mean = sums.variance, sums.mean
        if (variance >= LEAST_SHARE_OF_SQUARED_MEAN * mean**2).all():
            return variance
        # The squared mean has swallowed it: a second pass, over what the mean leaves.
        return self.add_up([replace(block, k=block.k - self.spread(mean, block)) for block in blocks]).variance

    def spread(self, values: np.ndarray, block: _Block) -> np.ndarray:
        """Return the value, of (segments,), of each token of a block."""
        return values if self.number == 1 else np.repeat(values[self.of_row[block.rows]], block.sizes)


def _center_and_scale(
    bounded: _Bounded,
    shape: tuple[int, ...],
    signal: Signal,
    groups: Sequence[Hashable] | None,
    teachers: Sequence[Hashable] | None,
    kl: torch.Tensor | None,
    state: SignalState | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Run the stages baseline and scale. The blocks' k are overwritten.

    Args:
        shape: (batch, response_length).

    Returns:
        advantages: (batch, response_length), float32.
        gain: of each row, (batch,) float64; None for scale=rank.
    """
    blocks = bounded.blocks

    def segments(kind: str) -> _Segments:
        if kind == "group" and groups is None:
            raise ValueError("baseline or scale `group` needs the prompt of each row (index)")
        return _Segments(kind, shape[0], {"group": groups, "teacher": teachers}.get(kind))

    shift, sums = _baseline(bounded, shape, signal.baseline, segments, kl)
    if signal.scale not in SAME_SEGMENTS.get(signal.baseline, ("none",)):
        # This scale's statistics are those of what the baseline leaves.
        if shift:
            for block in blocks:
                block.k -= shift(block)
        shift = sums = None

    gain: np.ndarray | None = np.ones(shape[0])
    factor = None
    if signal.scale == "rank":
        ranks = unit_ranks(np.concatenate([block.k for block in blocks]))
        for block, end in zip(blocks, np.cumsum([block.k.size for block in blocks]), strict=True):
            block.k = ranks[end - block.k.size : end]
        gain = None
    elif signal.scale != "none":
        shared = segments(signal.scale)
        sums = sums or shared.add_up(blocks)
        variance = shared.variance(blocks, sums)
        if signal.scale == "ema" and state is not None and sums.count[0]:
            variance = np.array([state.update(float(variance[0]), signal.ema_decay)])
        # One token has no spread to scale by.
        of_segment = np.where(sums.count > 1, deviation_gain(variance, signal.std_floor, signal.gain_limit), 1.0)
        factor, gain = partial(shared.spread, of_segment), of_segment[shared.of_row]

    advantages = np.zeros(shape, np.float32)
    for block in blocks:
        if shift:
            block.k -= shift(block)
        if factor:
            block.k *= factor(block)
        advantages[block.rows][block.counted] = block.k
    return advantages, gain


def _baseline(
    bounded: _Bounded,
    shape: tuple[int, ...],
    kind: str,
    segments: Callable[[str], _Segments],
    kl: torch.Tensor | None,
) -> tuple[Callable[[_Block], np.ndarray] | None, Sums | None]:
    """Return what each token of a block loses, None if nothing; and the sums of k, if segments of rows share a mean."""
    if kind == "none":
        return None, bounded.sums
    if kind == "kl":
        assert kl is not None, "compute_advantages checks it"
        divergence = _on_host(kl)
        # The mean of D over all tokens that the student might have sampled is -KL(student || teacher).
        return lambda block: -divergence[block.rows][block.counted], None
    if kind == "position":
        mean = reduce(add, (Sums.of(block.k, block.positions, shape[1]) for block in bounded.blocks)).mean
        return lambda block: mean[block.positions], None
    shared = segments(kind)
    sums = bounded.sums if kind == "batch" else shared.add_up(bounded.blocks)
    return partial(shared.spread, sums.mean), sums
