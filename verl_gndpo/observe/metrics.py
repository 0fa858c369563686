# SPDX-License-Identifier: Apache-2.0
"""What the signal of a step looked like, as flat dicts of finite numbers. Logs nothing itself.

`pack` takes the valid tokens out of a batch once; every `describe_*` function reads what it returns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from verl_gndpo.advantage import Signal, bounded_log_ratio
from verl_gndpo.observe.token_classes import CLASSES, EOS

# Smaller advantages are as good as none, and their reciprocals would leave float32.
NO_ADVANTAGE = 1e-30

# exp() of a larger log-ratio would dominate the k3 mean; verl bounds its own k3 estimator at the same value.
K3_MAX_LOG_RATIO = 20.0

# How many values are sampled to find the neighbourhood of a quantile, and how far that reaches to both sides: more than
# six standard deviations of the 1st percentile of such a sample.
QUANTILE_SAMPLE = 1 << 14
QUANTILE_MARGIN = 0.005

# Beyond how many nats of |D| tokens are counted, and which part of the tokens counts as the top.
BEYOND = (1, 5, 10)
TOP_PART = 0.01

PARTS = 10


@dataclass(frozen=True)
class Tokens:
    """The valid tokens of a batch, row after row; float32 on the host.

    Attributes:
        valid: (batch, response_length) bool, where they stand.
        d: (tokens,), D = log pi_T - log pi_old, nats.
        k: (tokens,), the bounded signal, in the bound's unit.
        a: (tokens,), the advantage.
        limit: what counts as clipped: |D| beyond it, nats; inf for bounds without a limit.
        drops: whether tokens beyond the limit are left out of k's statistics (bound=mask).
    """

    valid: np.ndarray
    d: np.ndarray
    k: np.ndarray
    a: np.ndarray
    limit: float
    drops: bool

    @cached_property
    def counts(self) -> np.ndarray:
        """(batch,): how many of each row."""
        return np.count_nonzero(self.valid, axis=1)

    @cached_property
    def starts(self) -> np.ndarray:
        """(batch,): where each row begins."""
        return self.counts.cumsum() - self.counts

    @cached_property
    def magnitude(self) -> np.ndarray:
        """(tokens,): |A|."""
        return np.abs(self.a)

    @cached_property
    def flipped(self) -> np.ndarray:
        """(tokens,) bool: whether A and k differ in sign. Exact where their product would vanish."""
        return ((self.a < 0) & (self.k > 0)) | ((self.a > 0) & (self.k < 0))

    def of_rows(self, rows: np.ndarray) -> "Tokens":
        """Args: rows (batch,) bool."""
        tokens = np.repeat(rows, self.counts)
        return Tokens(self.valid[rows], self.d[tokens], self.k[tokens], self.a[tokens], self.limit, self.drops)


@dataclass(frozen=True)
class Parts:
    """Sums over the tenths of each response: (batch, 10) each, float64 or int.

    Attributes:
        count: valid tokens.
        d, magnitude: sums of D (nats) and of |A|.
    """

    count: np.ndarray
    d: np.ndarray
    magnitude: np.ndarray


def pack(
    teacher_log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    advantages: torch.Tensor,
    signal: Signal,
) -> Tokens:
    """Take the valid tokens out of a batch.

    Args:
        teacher_log_probs, old_log_probs, response_mask, advantages: (batch, response_length), as the estimator saw and
            returned them; at least one valid token, all valid tokens finite.
        signal: the stages.
    """
    # In numpy, which packs, compares, counts and selects several times faster on the host than torch.
    valid = response_mask.bool().cpu()
    here = valid.numpy().reshape(-1)
    d = _flat(teacher_log_probs.float() - old_log_probs.float())[here]
    a = _flat(advantages)[here]
    limit = math.inf
    if signal.bound in ("clamp", "mask"):
        limit = signal.parameters["limit"]
    elif signal.bound == "soft_clamp":
        limit = signal.parameters["soft_clamp_factor"] * float(np.abs(d).mean(dtype=np.float64))
    if signal.bound in ("none", "mask"):
        k = d
    elif signal.bound == "clamp":
        k = d.clip(-limit, limit)
    else:
        teacher, old = (x.cpu()[valid].double() for x in (teacher_log_probs, old_log_probs))
        k = bounded_log_ratio(teacher, old, signal)[0].float().numpy()
    return Tokens(valid.numpy(), d, k, a, limit, signal.bound == "mask")


def describe_signal(tokens: Tokens, signal: Signal) -> dict[str, float]:
    """Raw log-ratio, bounded signal and advantage, each described apart.

    Args:
        tokens: at least one.
        signal: the stages.

    Returns:
        gndpo/log_ratio/{mean,std,min,max,p01,p05,p50,p95,p99}: D, nats, before the bound;
        gndpo/log_ratio/beyond_{1,5,10}_share: share of tokens with |D| above so many nats;
        gndpo/clipped_low_share, gndpo/clipped_high_share: share of tokens with D beyond -limit and +limit;
        gndpo/mu, gndpo/sigma: mean and standard deviation (Bessel-corrected) of the bounded signal, in its unit, over
            the tokens that bound=mask leaves in;
        gndpo/gain: what the bounded signal was multiplied by: 1/sigma, floored and limited, for scale=batch, 1 for
            scale=none, else deviation of A over that of k (0 where k has none);
        gndpo/advantage_abs_max;
        gndpo/advantage_kurtosis: excess kurtosis of A, 0 for a normal distribution and where A is constant;
        gndpo/effective_sample_share: (sum |A|)^2 / (tokens * sum A^2), 0 where A is 0 everywhere;
        gndpo/top_1pct_gradient_share: share of sum |A| of the 1 % of tokens, at least one, with the largest |A|;
        gndpo/sign_flip_share: share of tokens whose advantage and bounded signal differ in sign;
        gndpo/k1, gndpo/k3: estimates of KL(student || teacher) in nats: mean of -D and of exp(D) - 1 - D;
        gndpo/tokens: number of valid tokens.
    """
    d, k, a, limit = tokens.d, tokens.k, tokens.a, tokens.limit
    n = d.size
    scratch = np.empty_like(d)
    distance = np.abs(d, out=scratch)
    beyond = {f"gndpo/log_ratio/beyond_{nats}_share": np.count_nonzero(distance > nats) / n for nats in BEYOND}
    kept = k[distance <= limit] if tokens.drops else k
    mean, std = _mean_and_std(d, scratch)
    mu, sigma = _mean_and_std(kept, scratch[: kept.size]) if kept.size else (0.0, 0.0)
    at_most_20 = np.clip(d, -np.inf, K3_MAX_LOG_RATIO, out=scratch)
    minus = _mean(at_most_20)
    k3 = _mean(np.expm1(at_most_20, out=scratch)) - minus
    p01, p05, p50, p95, p99 = _quantiles(d, 0.01, 0.05, 0.5, 0.95, 0.99)
    return {
        "gndpo/log_ratio/mean": mean,
        "gndpo/log_ratio/std": std,
        "gndpo/log_ratio/min": float(d.min()),
        "gndpo/log_ratio/max": float(d.max()),
        "gndpo/log_ratio/p01": p01,
        "gndpo/log_ratio/p05": p05,
        "gndpo/log_ratio/p50": p50,
        "gndpo/log_ratio/p95": p95,
        "gndpo/log_ratio/p99": p99,
        **beyond,
        "gndpo/clipped_low_share": np.count_nonzero(d < -limit) / n,
        "gndpo/clipped_high_share": np.count_nonzero(d > limit) / n,
        "gndpo/mu": mu,
        "gndpo/sigma": sigma,
        "gndpo/gain": _gain(kept, sigma, a, signal, scratch),
        "gndpo/sign_flip_share": np.count_nonzero(tokens.flipped) / n,
        **_describe_sizes(a, tokens.magnitude, scratch),
        "gndpo/k1": -mean,
        "gndpo/k3": k3,
        "gndpo/tokens": float(n),
    }


def _gain(k: np.ndarray, sigma: float, a: np.ndarray, signal: Signal, scratch: np.ndarray) -> float:
    # Another baseline leaves another deviation than that of k.
    if signal.scale == "batch" and signal.baseline in ("none", "batch"):
        # One token has no spread to scale by.
        gain = (sigma**2 + signal.std_floor**2) ** -0.5 if k.size > 1 else 1.0
        return min(gain, signal.gain_limit)
    if signal.scale == "none":
        return 1.0
    return _mean_and_std(a, scratch)[1] / sigma if sigma else 0.0


def _describe_sizes(a: np.ndarray, magnitude: np.ndarray, scratch: np.ndarray) -> dict[str, float]:
    """How unevenly the gradient is spread over the tokens: a token's weight in it is |A|."""
    n, largest = a.size, float(magnitude.max())
    shares = {
        "gndpo/advantage_kurtosis": 0.0,
        "gndpo/effective_sample_share": 0.0,
        "gndpo/top_1pct_gradient_share": 0.0,
    }
    if largest > NO_ADVANTAGE:
        # In units of the largest, so that no power leaves float32.
        unit = np.multiply(a, np.float32(1 / largest), out=scratch)
        squares, total = _squares(unit), float(magnitude.sum(dtype=np.float64))
        unit -= np.float32(_mean(unit))
        variance = _squares(unit)
        fourth = _squares(np.multiply(unit, unit, out=unit))
        top = max(int(TOP_PART * n), 1)
        (threshold,) = _ordered(magnitude, [n - top])
        above = magnitude[np.flatnonzero(magnitude > threshold)]
        # Several may be as large as the smallest of the top.
        largest_ones = float(above.sum(dtype=np.float64)) + (top - above.size) * threshold
        shares = {
            "gndpo/advantage_kurtosis": n * fourth / variance**2 - 3 if variance > 0 else 0.0,
            # n equal tokens give 1, one token among n zeros 1/n.
            "gndpo/effective_sample_share": (total / largest) ** 2 / (n * squares),
            "gndpo/top_1pct_gradient_share": largest_ones / total,
        }
    return {"gndpo/advantage_abs_max": largest, **shares}


def describe_teachers(teachers: Sequence[str], tokens: Tokens, signal: Signal) -> dict[str, float]:
    """The metrics of `describe_signal` for the rows of each teacher, as gndpo/teacher/<teacher>/...

    Args:
        teachers: of each row, which teacher has scored it.
        tokens, signal: of `describe_signal`.
    """
    described = {}
    for teacher in sorted(set(teachers)):
        part = tokens.of_rows(np.array([name == teacher for name in teachers]))
        if part.d.size:
            own = {stage: "batch" for stage in ("baseline", "scale") if getattr(signal, stage) == "teacher"}
            metrics = describe_signal(part, replace(signal, **own))
            if not own:
                # All teachers share one.
                del metrics["gndpo/gain"]
            described |= {name.replace("gndpo/", f"gndpo/teacher/{teacher}/", 1): x for name, x in metrics.items()}
    return described


def sum_parts(tokens: Tokens, lengths: np.ndarray) -> Parts:
    """Add up each tenth of each response: a token at position p of a response of length n is in tenth 10 p // n.

    Args:
        lengths: (batch,), tokens of each response, those that the mask leaves out included.
    """
    # Rounded up.
    edges = -(np.arange(PARTS + 1) * -lengths[:, None] // PARTS)
    # No valid token is behind a response, and together the parts have to be all of a row.
    edges[:, -1] = tokens.valid.shape[1]
    count = _segment_sums(tokens.valid.reshape(-1).view(np.int8), np.diff(edges, axis=1), np.int64)
    return Parts(count, *(_segment_sums(x, count, np.float32) for x in (tokens.d, tokens.magnitude)))


def describe_positions(parts: Parts) -> dict[str, float]:
    """By relative position in the response.

    Returns:
        gndpo/position/<0..9>/{k1,advantage_abs_mean}: over the tokens of each tenth of their responses, nats and mean
            of |A|; absent where no response has a token there.
    """
    return {
        f"gndpo/position/{part}/{name}": value
        for part, sums in enumerate(zip(*(x.sum(0) for x in vars(parts).values()), strict=True))
        if sums[0]
        for name, value in _means(*sums).items()
    }


def describe_classes(tokens: Tokens, classes: np.ndarray) -> dict[str, float]:
    """By kind of token.

    Args:
        classes: (tokens,) uint8, indices of `token_classes.CLASSES`.

    Returns:
        gndpo/token/<class>/share: of the tokens;
        gndpo/token/<class>/{k1,advantage_abs_mean}: nats and mean of |A|; absent where a step has no such token.
    """
    described = {}
    weights = np.empty_like(tokens.d)
    for number, name in enumerate(CLASSES):
        mine = classes == number
        count = np.count_nonzero(mine)
        described[f"gndpo/token/{name}/share"] = count / classes.size
        if count:
            # In a product with zeros and ones, which takes a fraction of the time of selecting or of `bincount`.
            np.copyto(weights, mine)
            means = _means(count, np.dot(weights, tokens.d), np.dot(weights, tokens.magnitude))
            described |= {f"gndpo/token/{name}/{metric}": value for metric, value in means.items()}
    return described


def describe_sources(tokens: Tokens, parts: Parts, sources: Sequence[str]) -> dict[str, float]:
    """By data source; nothing where a batch has only one.

    Args:
        sources: of each row, where it comes from.

    Returns:
        gndpo/data_source/<source>/k1: nats;
        gndpo/data_source/<source>/share: of the tokens;
        gndpo/data_source/<source>/gradient_share: of sum |A|, 0 where A is 0 everywhere;
        gndpo/data_source/<source>/sign_flip_share: share of its tokens whose advantage and bounded signal differ in
            sign;
        gndpo/data_source/<source>/tokens.
    """
    rows = {name: np.array([source == name for source in sources]) for name in sorted(set(sources))}
    rows = {name: mine for name, mine in rows.items() if tokens.counts[mine].any()}
    if len(rows) < 2:
        return {}
    flips = _segment_sums(tokens.flipped.view(np.int8), tokens.counts, np.int64)
    n, gradient = tokens.d.size, parts.magnitude.sum()
    described = {}
    for name, mine in rows.items():
        count = int(tokens.counts[mine].sum())
        described |= {
            f"gndpo/data_source/{name}/k1": -float(parts.d[mine].sum()) / count,
            f"gndpo/data_source/{name}/share": count / n,
            f"gndpo/data_source/{name}/gradient_share": float(
                parts.magnitude[mine].sum() / gradient if gradient else 0
            ),
            f"gndpo/data_source/{name}/sign_flip_share": float(flips[mine].sum()) / count,
            f"gndpo/data_source/{name}/tokens": float(count),
        }
    return described


def describe_responses(tokens: Tokens, lengths: np.ndarray, classes: np.ndarray | None = None) -> dict[str, float]:
    """Lengths and ends of the responses that have a valid token (verl's padding rows have none).

    Args:
        lengths: (batch,), of `sum_parts`.
        classes: all response tokens of the batch, row after row, valid or not, (lengths.sum(),) uint8, indices of
            `token_classes.CLASSES`; None where a batch has no token ids.

    Returns:
        gndpo/response/{length_mean,length_p95}: tokens, those that the mask leaves out included; nearest rank;
        gndpo/response/truncated_share: share of responses that don't end with EOS;
        gndpo/response/eos_share: share of tokens that are EOS. The last two are absent without `classes`.
    """
    real = tokens.counts > 0
    ordered = np.sort(lengths[real])
    described = {
        "gndpo/response/length_mean": float(ordered.mean()),
        "gndpo/response/length_p95": float(ordered[int(0.95 * ordered.size)]),
    }
    if classes is not None:
        is_eos = classes == EOS
        of_real = np.repeat(real, lengths)
        described |= {
            "gndpo/response/truncated_share": 1 - float(is_eos[lengths.cumsum()[real] - 1].mean()),
            "gndpo/response/eos_share": np.count_nonzero(is_eos & of_real) / np.count_nonzero(of_real),
        }
    return described


def _means(count: float, d: float, magnitude: float) -> dict[str, float]:
    return {"k1": -float(d) / count, "advantage_abs_mean": float(magnitude) / count}


def _segment_sums(x: np.ndarray, sizes: np.ndarray, dtype: type) -> np.ndarray:
    """Sums over consecutive pieces of x, which together are all of it; 0 for an empty one. Of the shape of `sizes`."""
    sums = np.zeros(sizes.size, np.result_type(dtype, np.float64 if dtype is np.float32 else dtype))
    flat = sizes.reshape(-1)
    full = flat > 0
    sums[full] = np.add.reduceat(x, (flat.cumsum() - flat)[full], dtype=dtype)
    return sums.reshape(sizes.shape)


def _flat(x: torch.Tensor) -> np.ndarray:
    return x.detach().cpu().numpy().reshape(-1)


def _mean(x: np.ndarray) -> float:
    return float(x.mean(dtype=np.float64))


def _squares(x: np.ndarray) -> float:
    return float(np.dot(x, x))


def _mean_and_std(x: np.ndarray, scratch: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation (Bessel-corrected, 0 for a single value); `scratch` (of x's size) is overwritten."""
    mean = _mean(x)
    return mean, math.sqrt(_squares(np.subtract(x, np.float32(mean), out=scratch)) / max(x.size - 1, 1))


def _quantiles(x: np.ndarray, *levels: float) -> list[float]:
    """Nearest-rank quantiles, exact."""
    return _ordered(x, [min(int(level * x.size), x.size - 1) for level in levels])


def _ordered(x: np.ndarray, ranks: Sequence[int]) -> list[float]:
    """The values at these places of the sorted x, exact: a sample tells between which values each lies, those are
    selected from.

    A partial sort of all values would take longer than all other diagnostics together.
    """
    sample = np.sort(x[:: max(x.size // QUANTILE_SAMPLE, 1)])
    values = []
    for rank in ranks:
        level = rank / x.size
        ends = np.clip([level - QUANTILE_MARGIN, level + QUANTILE_MARGIN], 0, 1) * (sample.size - 1)
        low, high = sample[int(ends[0])], sample[math.ceil(ends[1])]
        below = x < low
        near = x[np.flatnonzero((x <= high) ^ below)]
        rank_near = rank - np.count_nonzero(below)
        if not 0 <= rank_near < near.size:
            near, rank_near = x, rank
        values.append(float(np.partition(near, rank_near)[rank_near]))
    return values
