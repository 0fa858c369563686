# SPDX-License-Identifier: Apache-2.0
"""What the signal of a step looked like, as a flat dict of numbers. Logs nothing itself."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from verl_gndpo.config import SignalConfig

# exp() of a larger log-ratio would dominate the k3 mean; verl bounds its own k3 estimator at the same value.
K3_MAX_LOG_RATIO = 20.0

# How many values are sampled to find the neighbourhood of a quantile, and how far that reaches to both sides: more than
# six standard deviations of the 1st percentile of such a sample.
QUANTILE_SAMPLE = 1 << 14
QUANTILE_MARGIN = 0.005


def describe_signal(
    teacher_log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    advantages: torch.Tensor,
    settings: SignalConfig,
) -> dict[str, float]:
    """Raw log-ratio, bounded signal and advantage, each described apart.

    Args:
        teacher_log_probs, old_log_probs, response_mask, advantages: (batch, response_length), as the estimator saw and
            returned them; at least one valid token, all valid tokens finite.
        settings: the resolved `algorithm.gndpo`.

    Returns:
        gndpo/log_ratio/{mean,std,min,max,p01,p99}: D = log pi_T - log pi_old, nats, before the bound;
        gndpo/clipped_low_share, gndpo/clipped_high_share: share of tokens with D beyond -clip and +clip;
        gndpo/mu, gndpo/sigma: mean and standard deviation (Bessel-corrected) of the bounded signal, nats;
        gndpo/gain: what the bounded signal was multiplied by, 1/sigma for gndpo; absent where it differs by teacher;
        gndpo/advantage_abs_max;
        gndpo/sign_flip_share: share of tokens whose advantage and bounded signal differ in sign;
        gndpo/k1, gndpo/k3: estimates of KL(student || teacher) in nats: mean of -D and of exp(D) - 1 - D;
        gndpo/tokens: number of valid tokens.
    """
    # In numpy, which packs, compares, counts and selects several times faster on the host than torch.
    valid = _flat(response_mask.bool())
    d = _flat(teacher_log_probs.float() - old_log_probs.float())[valid]
    a = _flat(advantages)[valid]
    n = d.size
    bound = settings.limit if settings.bound in ("clamp", "mask") else np.inf
    k = d.clip(-bound, bound)
    mean, std = _mean_and_std(d)
    mu, sigma = _mean_and_std(k)
    p01, p99 = _quantiles(d, 0.01, 0.99)
    at_most_20 = d.clip(-np.inf, K3_MAX_LOG_RATIO)
    described = {
        "gndpo/log_ratio/mean": mean,
        "gndpo/log_ratio/std": std,
        "gndpo/log_ratio/min": float(d.min()),
        "gndpo/log_ratio/max": float(d.max()),
        "gndpo/log_ratio/p01": p01,
        "gndpo/log_ratio/p99": p99,
        "gndpo/clipped_low_share": np.count_nonzero(d < -bound) / n,
        "gndpo/clipped_high_share": np.count_nonzero(d > bound) / n,
        "gndpo/mu": mu,
        "gndpo/sigma": sigma,
        "gndpo/advantage_abs_max": float(max(a.max(), -a.min())),
        "gndpo/sign_flip_share": np.count_nonzero(a * k < 0) / n,
        "gndpo/k1": -mean,
        "gndpo/k3": _mean(np.expm1(at_most_20) - at_most_20),
        "gndpo/tokens": float(n),
    }
    if "teacher" not in (settings.baseline, settings.scale):
        described["gndpo/gain"] = (
            (sigma**2 + settings.std_floor**2) ** -0.5 if settings.scale == "batch" and n > 1 else 1.0
        )
    return described


def describe_teachers(
    teachers: Sequence[str],
    teacher_log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    advantages: torch.Tensor,
    settings: SignalConfig,
) -> dict[str, float]:
    """The metrics of `describe_signal` for the rows of each teacher, as gndpo/teacher/<teacher>/...

    Args:
        teachers: of each row, which teacher has scored it.
        teacher_log_probs, old_log_probs, response_mask, advantages, settings: of `describe_signal`.
    """
    described = {}
    for teacher in sorted(set(teachers)):
        rows = [row for row, name in enumerate(teachers) if name == teacher]
        part = [x[rows] for x in (teacher_log_probs, old_log_probs, response_mask, advantages)]
        if part[2].any():
            own = {stage: "batch" for stage in ("baseline", "scale") if getattr(settings, stage) == "teacher"}
            metrics = describe_signal(*part, replace(settings, **own))
            if not own:
                # All teachers share one.
                del metrics["gndpo/gain"]
            described |= {name.replace("gndpo/", f"gndpo/teacher/{teacher}/", 1): x for name, x in metrics.items()}
    return described


def _flat(x: torch.Tensor) -> np.ndarray:
    return x.detach().cpu().numpy().reshape(-1)


def _mean(x: np.ndarray) -> float:
    return float(x.mean(dtype=np.float64))


def _mean_and_std(x: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation (Bessel-corrected, 0 for a single value)."""
    mean = _mean(x)
    centred = x - mean
    return mean, math.sqrt(np.dot(centred, centred) / max(x.size - 1, 1))


def _quantiles(x: np.ndarray, *levels: float) -> list[float]:
    """Nearest-rank quantiles, exact: a sample tells between which values a quantile lies, those are selected from.

    A partial sort of all values would take longer than all other diagnostics together.
    """
    sample = np.sort(x[:: max(x.size // QUANTILE_SAMPLE, 1)])
    values = []
    for level in levels:
        rank = min(int(level * x.size), x.size - 1)
        ends = np.clip([level - QUANTILE_MARGIN, level + QUANTILE_MARGIN], 0, 1) * (sample.size - 1)
        low, high = sample[int(ends[0])], sample[math.ceil(ends[1])]
        near = x[np.flatnonzero((x >= low) & (x <= high))]
        rank_near = rank - np.count_nonzero(x < low)
        if not 0 <= rank_near < near.size:
            near, rank_near = x, rank
        values.append(float(np.partition(near, rank_near)[rank_near]))
    return values
