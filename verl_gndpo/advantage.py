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

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from verl_gndpo.blockwise import check_batch, log_ratio_advantages, raise_not_finite
from verl_gndpo.config import SignalConfig

# The log-prob, in nats, above which a model is taken to be as sure as this: a probability of 1 has no log-odds.
CERTAIN = -1e-9

# --- bound: D (tokens,) in nats -> k (tokens,) and which tokens still count ------------------------------------------


def no_bound(d: torch.Tensor) -> torch.Tensor:
    """k = D, in nats: a Monte Carlo estimate of the reverse KL's gradient, unbounded (Thinking Machines)."""
    return d


def clamp(d: torch.Tensor, limit: float) -> torch.Tensor:
    """k = clip(D, -limit, +limit), in nats (GNDPO; verl's `loss_max_clamp`)."""
    return d.clamp(-limit, limit)


def tanh(d: torch.Tensor) -> torch.Tensor:
    """k = tanh(D), in (-1, 1) (an arm of PowerOPD, arXiv 2606.17199)."""
    return d.tanh()


def sign(d: torch.Tensor) -> torch.Tensor:
    """k = sign(D): the gradient of the total variation (TV-OPD, arXiv 2609.08341)."""
    return d.sign()


def power(teacher: torch.Tensor, old: torch.Tensor, exponent: float) -> torch.Tensor:
    """k = pi_T^a - pi_old^a, in [-1, 1], of D's sign (PowerOPD, arXiv 2606.17199).

    Args:
        teacher, old: (tokens,), log-probs in nats.
        exponent: a > 0; towards 0, k / a becomes D.
    """
    # The larger of the two times what it exceeds the other by: exact where they nearly agree, and nothing overflows.
    larger, d = torch.maximum(teacher, old), teacher - old
    return (exponent * larger).exp() * -torch.expm1(-exponent * d.abs()) * d.sign()


def gap(teacher: torch.Tensor, old: torch.Tensor, negative_limit: float) -> torch.Tensor:
    """k = sqrt(pi_old) * max(pi_T - pi_old, -negative_limit), of D's sign (this project's; docs/study.md).

    The gap of the probabilities is bounded and vanishes as the student approaches the teacher. Its weight makes the
    gradients of likely and unlikely tokens more alike, and with it the positive side ends at 2 / sqrt(27) = 0.38. The
    negative side has to be told where to end: outliers are tokens that the teacher is said to hate.
    """
    return (old / 2).exp() * power(teacher, old, 1.0).clamp(min=-negative_limit)


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


def log_odds(teacher: torch.Tensor, old: torch.Tensor, limit: float) -> torch.Tensor:
    """k = pi_old * clip(logit pi_T - logit pi_old, -limit, +limit), of D's sign (this project's; docs/study.md).

    As `odds`, but it grows with the disagreement up to a larger limit, as the log-ratio does: a signal that saturates
    is weak at first, and too strong near the end for the learning rate that makes up for it. In nats.
    """
    log_odds_teacher, log_odds_old = (
        x - torch.log(-torch.expm1(x)) for x in (teacher.clamp(max=CERTAIN), old.clamp(max=CERTAIN))
    )
    return old.clamp(max=0).exp() * (log_odds_teacher - log_odds_old).clamp(-limit, limit)


def proximal(d: torch.Tensor, alpha: float) -> torch.Tensor:
    """k = log(alpha * rho + 1 - alpha), rho = pi_T / pi_old: the log-ratio to a teacher that is a mixture of both.

    In nats, at least log(1 - alpha) (TOP-D, arXiv 2607.04751).
    """
    # log1p keeps what is near 0; a ratio whose exponential overflows is taken apart first.
    return torch.where(d > 20, d + math.log(alpha), torch.log1p(alpha * torch.expm1(d.clamp(max=20))))


def soft_clamp(d: torch.Tensor, factor: float) -> torch.Tensor:
    """k = clip(D, -c, +c), c = factor * mean(abs(D)) over the batch, in nats (arXiv 2607.07050)."""
    limit = factor * d.abs().mean()
    return torch.minimum(torch.maximum(d, -limit), limit)


def keep_within(d: torch.Tensor, limit: float) -> torch.Tensor:
    """Which tokens bound=mask leaves in: abs(D) <= limit. The others get advantage 0 (Uni-OPD, arXiv 2605.03677)."""
    return d.abs() <= limit


BOUNDS: dict[str, Callable[[torch.Tensor, torch.Tensor, SignalConfig], torch.Tensor]] = {
    "none": lambda teacher, old, s: no_bound(teacher - old),
    "clamp": lambda teacher, old, s: clamp(teacher - old, s.limit),
    "tanh": lambda teacher, old, s: tanh(teacher - old),
    "sign": lambda teacher, old, s: sign(teacher - old),
    "power": lambda teacher, old, s: power(teacher, old, s.power_alpha),
    "gap": lambda teacher, old, s: gap(teacher, old, s.negative_limit),
    "odds": lambda teacher, old, s: odds(teacher, old, s.negative_limit),
    "log_odds": lambda teacher, old, s: log_odds(teacher, old, s.limit),
    "proximal": lambda teacher, old, s: proximal(teacher - old, s.proximal_alpha),
    "soft_clamp": lambda teacher, old, s: soft_clamp(teacher - old, s.soft_clamp_factor),
    "mask": lambda teacher, old, s: no_bound(teacher - old),
}


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
    settings: SignalConfig,
    *,
    groups: Sequence[Hashable] | None = None,
    teachers: Sequence[Hashable] | None = None,
    kl: torch.Tensor | None = None,
    task_advantages: torch.Tensor | None = None,
    state: SignalState | None = None,
) -> torch.Tensor:
    """Run all stages over a batch.

    Args:
        teacher_log_probs: (batch, response_length), nats, any floating dtype.
        old_log_probs: (batch, response_length), nats: the student's, by the training engine, before the update.
        response_mask: (batch, response_length), non-zero on the tokens that count. What the log-probs hold elsewhere,
            NaN and inf included, is never read.
        settings: the resolved `algorithm.gndpo`.
        groups: prompt of each row, for baseline or scale `group`.
        teachers: teacher of each row, for baseline or scale `teacher`; None: one for all.
        kl: (batch, response_length), KL(student || teacher) at each position in nats, for baseline=kl.
        task_advantages: (batch, response_length), mixed in with weight `task_reward.coef`.
        state: for scale=ema; it is updated. None: this batch alone.

    Returns:
        (batch, response_length), float32, exactly 0 where the mask is 0 or bound=mask drops the token.

    Raises:
        ValueError: shapes differ; no token is valid; NaN or inf under a valid token; a stage's input is missing.
    """
    kinds = {settings.baseline, settings.scale}
    inputs = (teacher_log_probs, old_log_probs, response_mask)
    if settings.bound in ("none", "clamp") and kinds <= {"none", "batch"}:
        advantages, _ = log_ratio_advantages(
            *inputs,
            clip=settings.limit if settings.bound == "clamp" else None,
            center=settings.baseline == "batch",
            scale=settings.scale == "batch",
            std_floor=settings.std_floor,
            gain_limit=settings.gain_limit or math.inf,
        )
    else:
        advantages = _staged(*inputs, settings, groups, teachers, kl, state)
    if settings.task_reward.coef:
        if task_advantages is None:
            raise ValueError("algorithm.gndpo.task_reward.coef is not 0, and there are no task advantages to mix in")
        advantages = mix(advantages, task_advantages, response_mask, settings.task_reward.coef)
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
    teacher: torch.Tensor, old: torch.Tensor, settings: SignalConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The first stage.

    Args:
        teacher, old: (tokens,), log-probs of valid tokens, nats.
        settings: the resolved `algorithm.gndpo`.

    Returns:
        k: (tokens,), in the bound's unit.
        kept: (tokens,) bool, the tokens that bound=mask leaves in; None: all.
    """
    k = BOUNDS[settings.bound](teacher, old, settings)
    return k, keep_within(teacher - old, settings.limit) if settings.bound == "mask" else None


def _staged(teacher_log_probs, old_log_probs, response_mask, settings, groups, teachers, kl, state) -> torch.Tensor:
    valid, _ = check_batch(teacher_log_probs, old_log_probs, response_mask)
    teacher, old = teacher_log_probs[valid].double(), old_log_probs[valid].double()
    if not (teacher - old).isfinite().all():
        raise_not_finite(teacher_log_probs, old_log_probs, response_mask)
    k, kept = bounded_log_ratio(teacher, old, settings)
    if kept is not None:
        valid = valid.masked_scatter(valid, kept)
        k = k[kept]
    advantages = torch.zeros(valid.shape, dtype=torch.float32, device=valid.device)
    if len(k) == 0:
        return advantages

    if settings.baseline == "kl":
        if kl is None:
            raise ValueError(
                "algorithm.gndpo.baseline=kl needs the KL divergence of student and teacher at each response token (kl)"
            )
        # The value of a state: the mean of D over what the student might have sampled there, -KL(student || teacher).
        k = k + kl[valid].double()
    elif settings.baseline != "none":
        ids, number = _segments(settings.baseline, valid, groups, teachers)
        k = k - Sums.of(k, ids, number).mean[ids]

    if settings.scale == "rank":
        k = unit_ranks(k)
    elif settings.scale != "none":
        ids, number = _segments(settings.scale, valid, groups, teachers)
        sums = Sums.of(k, ids, number)
        variance = sums.variance
        if settings.scale == "ema" and state is not None:
            variance = variance.new_tensor([state.update(variance.item(), settings.ema_decay)])
        gain = deviation_gain(variance, settings.std_floor, settings.gain_limit or math.inf)
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
