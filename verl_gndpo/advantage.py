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

presets.py names the published combinations. The functions below take the valid tokens of a batch as vectors of float64.
"""

import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from verl_gndpo.blockwise import check_batch, log_ratio_advantages, raise_not_finite
from verl_gndpo.setting import Setting

# The log-prob, in nats, above which a model is taken to be as sure as this: a probability of 1 has no log-odds.
CERTAIN = -1e-9

BASELINES = ("none", "batch", "group", "position", "teacher", "kl")
SCALES = ("none", "batch", "group", "teacher", "ema", "rank")

# --- bound: log-probs of both models (tokens,) in nats -> k (tokens,) and which tokens still count --------------------


@dataclass(frozen=True)
class Bound:
    """A way to bound the log-ratio.

    Attributes:
        function: from teacher and student log-probs, (tokens,) each, nats, and the parameters by name, to k, (tokens,).
            If it takes `mean_abs_log_ratio`, it is given the mean of abs(D) over the batch, nats.
        parameters: what `algorithm.gndpo` can set, by key.
        keeps: like `function`, but returns which tokens count, (tokens,) bool; None: all.
    """

    function: Callable[..., torch.Tensor]
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    keeps: Callable[..., torch.Tensor] | None = None


BOUNDS: dict[str, Bound] = {}


def register_bound(
    name: str, *, keeps: Callable[..., torch.Tensor] | None = None, **parameters: Setting
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Make a function the bound `algorithm.gndpo.bound=<name>`, with a key of `algorithm.gndpo` for each parameter.

    Args:
        name: of the bound.
        keeps, parameters: see `Bound`. Bounds may share a parameter: its declarations must then be equal.

    Raises:
        ValueError: the name is taken, or a parameter is declared otherwise by another bound.
    """
    if name in BOUNDS:
        raise ValueError(f"there is a bound called {name} already")
    for key, declared in parameters.items():
        for other, bound in BOUNDS.items():
            if bound.parameters.get(key, declared) != declared:
                raise ValueError(f"parameter {key} of bound {name} is declared otherwise by bound {other}")

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        BOUNDS[name] = Bound(function, parameters, keeps)
        return function

    return register


LIMIT = Setting(5.0, "Limit on both sides, nats.", above=0)
NEGATIVE_LIMIT = Setting(0.4, "How far below 0 the bound may go before it is weighted.", above=0, at_most=1)


@register_bound("none")
def no_bound(teacher: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """k = D, in nats: a Monte Carlo estimate of the reverse KL's gradient, unbounded (Thinking Machines)."""
    return teacher - old


@register_bound("clamp", limit=LIMIT)
def clamp(teacher: torch.Tensor, old: torch.Tensor, limit: float) -> torch.Tensor:
    """k = clip(D, -limit, +limit), in nats (GNDPO; verl's `loss_max_clamp`)."""
    return (teacher - old).clamp(-limit, limit)


@register_bound("tanh")
def tanh(teacher: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """k = tanh(D), in (-1, 1) (an arm of PowerOPD, arXiv 2606.17199)."""
    return (teacher - old).tanh()


@register_bound("sign")
def sign(teacher: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """k = sign(D): the gradient of the total variation (TV-OPD, arXiv 2609.08341)."""
    return (teacher - old).sign()


@register_bound("power", power_alpha=Setting(5.0, "Exponent of both probabilities.", above=0))
def power(teacher: torch.Tensor, old: torch.Tensor, power_alpha: float) -> torch.Tensor:
    """k = pi_T^a - pi_old^a, in [-1, 1], of D's sign (PowerOPD, arXiv 2606.17199).

    Args:
        teacher, old: (tokens,), log-probs in nats.
        power_alpha: a > 0; towards 0, k / a becomes D.
    """
    # The larger of the two times what it exceeds the other by: exact where they nearly agree, and nothing overflows.
    larger, d = torch.maximum(teacher, old), teacher - old
    return (power_alpha * larger).exp() * -torch.expm1(-power_alpha * d.abs()) * d.sign()


@register_bound("gap", negative_limit=NEGATIVE_LIMIT)
def gap(teacher: torch.Tensor, old: torch.Tensor, negative_limit: float) -> torch.Tensor:
    """k = sqrt(pi_old) * max(pi_T - pi_old, -negative_limit), of D's sign (this project's; docs/study.md).

    The gap of the probabilities is bounded and vanishes as the student approaches the teacher. Its weight makes the
    gradients of likely and unlikely tokens more alike, and with it the positive side ends at 2 / sqrt(27) = 0.38. The
    negative side has to be told where to end: outliers are tokens that the teacher is said to hate.
    """
    return (old / 2).exp() * power(teacher, old, 1.0).clamp(min=-negative_limit)


@register_bound("odds", negative_limit=NEGATIVE_LIMIT)
def odds(teacher: torch.Tensor, old: torch.Tensor, negative_limit: float) -> torch.Tensor:
    """k = pi_old * max(tanh((logit pi_T - logit pi_old) / 2), -negative_limit), of D's sign (this project's).

    Where two tokens are possible, the product of pi_old and any odd function of the log-odds ratio gives the same
    gradient whichever of the two is sampled: it has the baseline that leaves no variance.
    """
    # Odds need probabilities up to 1, above which rounding may take a log-prob.
    teacher, old = teacher.clamp(max=0), old.clamp(max=0)
    student, rest = old.exp(), -torch.expm1(old)
    disagree = student * -torch.expm1(teacher) + teacher.exp() * rest
    # tanh((logit q - logit p) / 2) = (q - p) / (p (1 - q) + q (1 - p)); both certain of the same: no opinion.
    opinion = torch.where(disagree > 0, power(teacher, old, 1.0) / disagree, 0.0)
    return student * opinion.clamp(min=-negative_limit)


@register_bound("log_odds", limit=LIMIT)
def log_odds(teacher: torch.Tensor, old: torch.Tensor, limit: float) -> torch.Tensor:
    """k = pi_old * clip(logit pi_T - logit pi_old, -limit, +limit), of D's sign (this project's; docs/study.md).

    As `odds`, but it grows with the disagreement up to a larger limit, as the log-ratio does: a signal that saturates
    is weak at first, and too strong near the end for the learning rate that makes up for it. In nats.
    """
    log_odds_teacher, log_odds_old = (
        x - torch.log(-torch.expm1(x)) for x in (teacher.clamp(max=CERTAIN), old.clamp(max=CERTAIN))
    )
    return old.clamp(max=0).exp() * (log_odds_teacher - log_odds_old).clamp(-limit, limit)


@register_bound(
    "proximal",
    proximal_alpha=Setting(0.5, "Share of the teacher in the mixture that the student is drawn to.", above=0, below=1),
)
def proximal(teacher: torch.Tensor, old: torch.Tensor, proximal_alpha: float) -> torch.Tensor:
    """k = log(alpha * rho + 1 - alpha), rho = pi_T / pi_old: the log-ratio to a teacher that is a mixture of both.

    In nats, at least log(1 - alpha) (TOP-D, arXiv 2607.04751).
    """
    d = teacher - old
    # log1p keeps what is near 0; a ratio whose exponential overflows is taken apart first.
    large = d + math.log(proximal_alpha)
    return torch.where(d > 20, large, torch.log1p(proximal_alpha * torch.expm1(d.clamp(max=20))))


@register_bound(
    "soft_clamp", soft_clamp_factor=Setting(3.0, "The limit as a multiple of the batch mean of abs(D).", above=0)
)
def soft_clamp(
    teacher: torch.Tensor, old: torch.Tensor, soft_clamp_factor: float, mean_abs_log_ratio: float
) -> torch.Tensor:
    """k = clip(D, -c, +c), c = factor * mean(abs(D)) over the batch, in nats (arXiv 2607.07050)."""
    return clamp(teacher, old, soft_clamp_factor * mean_abs_log_ratio)


def keep_within(teacher: torch.Tensor, old: torch.Tensor, limit: float) -> torch.Tensor:
    """Which tokens bound=mask leaves in: abs(D) <= limit. The others get advantage 0 (Uni-OPD, arXiv 2605.03677)."""
    return (teacher - old).abs() <= limit


@register_bound("mask", keeps=keep_within, limit=LIMIT)
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
        top_k: for baseline=kl: how many of the student's most likely tokens are compared one by one.
        std_floor: floor of the standard deviation, in the bound's unit, in quadrature.
        gain_limit: largest factor that the scale may be; inf: none.
        ema_decay: for scale=ema: weight of the steps before.
    """

    bound: str
    parameters: Mapping[str, float]
    baseline: str
    scale: str
    top_k: int
    std_floor: float
    gain_limit: float
    ema_decay: float


# --- baseline and scale: over which tokens statistics run ------------------------------------------------------------


@dataclass(frozen=True)
class Sums:
    """Count, sum and sum of squares of the tokens of each segment: what mean and deviation are made of.

    Sums of parts of a batch (micro-batches, ranks) add up to those of the whole.
    """

    count: torch.Tensor
    total: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, segment: torch.Tensor, segments: int) -> "Sums":
        """Args: x (tokens,) float64; segment (tokens,) int64, in [0, segments)."""
        parts = (torch.ones_like(x), x, x * x)
        return cls(*(x.new_zeros(segments).index_add_(0, segment, part) for part in parts))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> torch.Tensor:
        """(segments,); 0 where a segment is empty."""
        return self.total / self.count.clamp(min=1)

    @property
    def variance(self) -> torch.Tensor:
        """(segments,), Bessel-corrected; 0 where a segment has fewer than two tokens."""
        return (self.squares - self.count * self.mean**2).clamp(min=0) / (self.count - 1).clamp(min=1)


def deviation_gain(variance: torch.Tensor, std_floor: float, gain_limit: float = math.inf) -> torch.Tensor:
    """g = min(1 / sqrt(variance + std_floor^2), gain_limit), in 1/(unit of k)."""
    return (variance + std_floor**2).rsqrt().clamp(max=gain_limit)


def unit_ranks(x: torch.Tensor) -> torch.Tensor:
    """Ranks (ties share their mean), spread evenly around 0 with variance 1: within +-sqrt(3), whatever x is."""
    _, place, count = x.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    middle = last - (count - 1) / 2
    return ((2 * middle - 1) / len(x) - 1)[place] * math.sqrt(3)


@dataclass
class SignalState:
    """What scale=ema carries from step to step; the trainer saves it with its checkpoints."""

    ema_variance: float = 0.0
    ema_weight: float = 0.0

    def update(self, variance: float, decay: float) -> float:
        """Take a step's variance in and return the average over steps, weighted by decay^age."""
        self.ema_variance = decay * self.ema_variance + (1 - decay) * variance
        self.ema_weight = decay * self.ema_weight + (1 - decay)
        return self.ema_variance / self.ema_weight


# --- the pipeline -----------------------------------------------------------------------------------------------------


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
) -> torch.Tensor:
    """Run all stages over a batch.

    Args:
        teacher_log_probs: (batch, response_length), nats, any floating dtype.
        old_log_probs: (batch, response_length), nats: the student's, by the training engine, before the update.
        response_mask: (batch, response_length), non-zero on the tokens that count. What the log-probs hold elsewhere,
            NaN and inf included, is never read.
        signal: the stages.
        groups: prompt of each row, for baseline or scale `group`.
        teachers: teacher of each row, for baseline or scale `teacher`; None: one for all.
        kl: (batch, response_length), KL(student || teacher) at each position in nats, for baseline=kl.
        task_advantages: (batch, response_length), mixed in with weight `task_coef`.
        task_coef: see `mix`; 0: nothing is mixed in.
        state: for scale=ema; it is updated. None: this batch alone.

    Returns:
        (batch, response_length), float32, exactly 0 where the mask is 0 or bound=mask drops the token.

    Raises:
        ValueError: shapes differ; no token is valid; NaN or inf under a valid token; a stage's input is missing.
    """
    kinds = {signal.baseline, signal.scale}
    inputs = (teacher_log_probs, old_log_probs, response_mask)
    if signal.bound in ("none", "clamp") and kinds <= {"none", "batch"}:
        advantages, _ = log_ratio_advantages(
            *inputs,
            clip=signal.parameters.get("limit"),
            center=signal.baseline == "batch",
            scale=signal.scale == "batch",
            std_floor=signal.std_floor,
            gain_limit=signal.gain_limit,
        )
    else:
        advantages = _staged(*inputs, signal, groups, teachers, kl, state)
    if task_coef:
        if task_advantages is None:
            raise ValueError("task_coef is not 0, and there are no task advantages to mix in")
        advantages = mix(advantages, task_advantages, response_mask, task_coef)
    return advantages


def mix(
    advantages: torch.Tensor, task_advantages: torch.Tensor, response_mask: torch.Tensor, coef: float
) -> torch.Tensor:
    """A + coef * rms(A) / rms(A_task) * A_task: at coef 1 both parts are equally large, whatever their units.

    Args:
        advantages, task_advantages, response_mask: (batch, response_length). Where one part is 0 everywhere, the other
            is left as it is.
    """
    valid = response_mask.bool()
    task = torch.where(valid, task_advantages, 0.0).double()
    size, task_size = (x.double().square().sum().sqrt() for x in (advantages, task))
    factor = size / task_size if size > 0 and task_size > 0 else 1.0
    return (advantages + coef * factor * task).float()


def bounded_log_ratio(
    teacher: torch.Tensor, old: torch.Tensor, signal: Signal
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the first stage.

    Args:
        teacher, old: (tokens,), log-probs of all valid tokens of a batch, nats.
        signal: the stages.

    Returns:
        k: (tokens,), in the bound's unit.
        kept: (tokens,) bool, the tokens that the bound leaves in; None: all.
    """
    bound, given = BOUNDS[signal.bound], dict(signal.parameters)
    kept = bound.keeps(teacher, old, **given) if bound.keeps else None
    if "mean_abs_log_ratio" in inspect.signature(bound.function).parameters:
        given["mean_abs_log_ratio"] = (teacher - old).abs().mean().item()
    return bound.function(teacher, old, **given), kept


def _staged(teacher_log_probs, old_log_probs, response_mask, signal, groups, teachers, kl, state) -> torch.Tensor:
    valid, _ = check_batch(teacher_log_probs, old_log_probs, response_mask)
    teacher, old = teacher_log_probs[valid].double(), old_log_probs[valid].double()
    if not (teacher - old).isfinite().all():
        raise_not_finite(teacher_log_probs, old_log_probs, response_mask)
    k, kept = bounded_log_ratio(teacher, old, signal)
    if kept is not None:
        valid = valid.masked_scatter(valid, kept)
        k = k[kept]
    advantages = torch.zeros(valid.shape, dtype=torch.float32, device=valid.device)
    if len(k) == 0:
        return advantages

    if signal.baseline == "kl":
        if kl is None:
            raise ValueError(
                "algorithm.gndpo.baseline=kl needs the KL divergence of student and teacher at each response token (kl)"
            )
        # The value of a state: the mean of D over what the student might have sampled there, -KL(student || teacher).
        k = k + kl[valid].double()
    elif signal.baseline != "none":
        ids, number = _segments(signal.baseline, valid, groups, teachers)
        k = k - Sums.of(k, ids, number).mean[ids]

    if signal.scale == "rank":
        k = unit_ranks(k)
    elif signal.scale != "none":
        ids, number = _segments(signal.scale, valid, groups, teachers)
        sums = Sums.of(k, ids, number)
        variance = sums.variance
        if signal.scale == "ema" and state is not None:
            variance = variance.new_tensor([state.update(variance.item(), signal.ema_decay)])
        gain = deviation_gain(variance, signal.std_floor, signal.gain_limit)
        # One token has no spread to scale by.
        k = k * gain.where(sums.count > 1, 1.0)[ids]
    advantages[valid] = k.float()
    return advantages


def _segments(
    kind: str, valid: torch.Tensor, groups: Sequence[Hashable] | None, teachers: Sequence[Hashable] | None
) -> tuple[torch.Tensor, int]:
    """Of each valid token, the segment that its statistics run over; and how many segments there are."""
    rows, length = valid.shape
    if kind == "position":
        ids, number = torch.arange(length, device=valid.device).expand(rows, length), length
    else:
        if kind == "group" and groups is None:
            raise ValueError("baseline or scale `group` needs the prompt of each row (index)")
        labels = {"group": groups, "teacher": teachers}.get(kind) or [0] * rows
        if len(labels) != rows:
            raise ValueError(f"{len(labels)} labels for `{kind}` and {rows} rows")
        numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        ids = torch.tensor([numbers[label] for label in labels], device=valid.device)[:, None].expand(rows, length)
        number = len(numbers)
    return ids[valid], number
