# SPDX-License-Identifier: Apache-2.0
"""Metrics of a step's signal, as flat dicts of finite numbers. Logs nothing itself.

Every `describe_*` function reads `Tokens`: what `advantage.compute_advantages` has made of the valid tokens of a batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from verl_gndpo.advantage import Trace
from verl_gndpo.observe.token_classes import CLASSES, EOS

# Smaller advantages count as 0, because their reciprocals would leave float32.
NO_ADVANTAGE = 1e-30

# exp() of a larger log-ratio would dominate the k3 mean. verl bounds its own k3 estimator at the same value.
K3_MAX_LOG_RATIO = 20.0

# Limits of |D|, in nats, beyond which tokens are counted.
BEYOND = (1, 5, 10)
# Share of the tokens that counts as the top.
TOP_PART = 0.01

PARTS = 10

# Up to this value the sum of a batch's squares stays in float32. The lowest float32, by which some models ban tokens,
# goes beyond it.
FLOAT32_ROOM = 1e14


class Tokens:
    """The valid tokens of a batch, row after row, and what is derived from them; in numpy, on the host."""

    def __init__(self, trace: Trace):
        self._trace = trace
        self.valid = trace.valid
        """(batch, response_length) bool, their places."""
        self.d, self.k, self.a = _with_room(trace.log_ratio, trace.bounded, trace.advantages)
        """(tokens,) each, all float32 or all float64: D = log pi_T - log pi_old, nats; the bounded signal, in the
        bound's unit; the advantage."""
        self.clips_at = trace.clips_at
        """|D|, nats, beyond which a token counts as clipped; inf: none does."""

    @cached_property
    def counts(self) -> np.ndarray:
        """(batch,): the number of tokens of each row."""
        return np.count_nonzero(self.valid, axis=1)

    @cached_property
    def starts(self) -> np.ndarray:
        """(batch,): the index of each row's first token."""
        return self.counts.cumsum() - self.counts

    @cached_property
    def magnitude(self) -> np.ndarray:
        """(tokens,): |A|."""
        return np.abs(self.a)

    @cached_property
    def flipped(self) -> np.ndarray:
        """(tokens,) bool: True where A and k differ in sign. Exact where their product would vanish."""
        return ((self.a < 0) & (self.k > 0)) | ((self.a > 0) & (self.k < 0))

    @property
    def kept_k(self) -> np.ndarray:
        """(kept tokens,): k of the tokens that the bound keeps."""
        return self.k if self._trace.kept is None else self.k[self._trace.kept]

    @property
    def gain(self) -> float | None:
        """Return the factor of the scale, 1/(unit of k); None if rows differ in it, or for scale=rank."""
        if self._trace.gain is None:
            return None
        first, *others = np.unique(self._trace.gain[self.counts > 0])
        return None if others else float(first)

    def of_rows(self, rows: np.ndarray) -> "Tokens":
        """Return the tokens of some rows. Args: rows (batch,) bool."""
        trace, mine = self._trace, np.repeat(rows, self.counts)
        return Tokens(
            Trace(
                valid=trace.valid[rows],
                log_ratio=trace.log_ratio[mine],
                bounded=trace.bounded[mine],
                kept=None if trace.kept is None else trace.kept[mine],
                advantages=trace.advantages[mine],
                clips_at=trace.clips_at,
                gain=None if trace.gain is None else trace.gain[rows],
            )
        )


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


def describe_signal(tokens: Tokens) -> dict[str, float]:
    """Describe the raw log-ratio, the bounded signal and the advantage.

    Args:
        tokens: at least one.

    Returns:
        gndpo/log_ratio/{mean,std,min,max,p01,p05,p50,p95,p99}: D, nats, before the bound;
        gndpo/log_ratio/beyond_{1,5,10}_share: share of tokens with |D| above so many nats;
        gndpo/clipped_low_share, gndpo/clipped_high_share: share of tokens with D beyond -limit and +limit;
        gndpo/mu, gndpo/sigma: mean and standard deviation (Bessel-corrected) of the bounded signal, in its unit, over
            the tokens that the bound keeps;
        gndpo/gain: the factor that the scale multiplied by; where it differs between rows, and for scale=rank, the
            deviation of A over that of k (0 where k has none);
        gndpo/advantage_abs_max;
        gndpo/advantage_kurtosis: excess kurtosis of A, 0 for a normal distribution and where A is constant;
        gndpo/effective_sample_share: (sum |A|)^2 / (tokens * sum A^2), 0 where A is 0 everywhere;
        gndpo/top_1pct_gradient_share: share of sum |A| of the 1 % of tokens, at least one, with the largest |A|;
        gndpo/sign_flip_share: share of tokens whose advantage and bounded signal differ in sign;
        gndpo/k1, gndpo/k3: estimates of KL(student || teacher) in nats: mean of -D and of exp(D) - 1 - D;
        gndpo/tokens: number of valid tokens.
    """
    d, a, kept = tokens.d, tokens.a, tokens.kept_k
    n = d.size
    scratch = np.empty_like(d)
    mean, std = _mean_and_std(d, scratch)
    mu, sigma = _mean_and_std(kept, scratch[: kept.size]) if kept.size else (0.0, 0.0)
    gain = tokens.gain
    if gain is None:
        gain = _mean_and_std(a, scratch)[1] / sigma if sigma else 0.0
    # numpy sorts float32 in less time than any two quantiles take to select.
    ordered = np.sort(d)
    low, high = float(ordered[0]), float(ordered[-1])
    number = ordered.dtype.type
    below = {nats: int(np.searchsorted(ordered, number(-nats), "left")) for nats in (*BEYOND, tokens.clips_at)}
    above = {nats: n - int(np.searchsorted(ordered, number(nats), "right")) for nats in below}
    return {
        "gndpo/log_ratio/mean": mean,
        "gndpo/log_ratio/std": std,
        "gndpo/log_ratio/min": low,
        "gndpo/log_ratio/max": high,
        **{f"gndpo/log_ratio/p{p:02}": float(ordered[min(p * n // 100, n - 1)]) for p in (1, 5, 50, 95, 99)},
        **{f"gndpo/log_ratio/beyond_{nats}_share": (below[nats] + above[nats]) / n for nats in BEYOND},
        "gndpo/clipped_low_share": below[tokens.clips_at] / n,
        "gndpo/clipped_high_share": above[tokens.clips_at] / n,
        "gndpo/mu": mu,
        "gndpo/sigma": sigma,
        "gndpo/gain": gain,
        "gndpo/sign_flip_share": np.count_nonzero(tokens.flipped) / n,
        **_describe_sizes(a, tokens.magnitude, scratch),
        "gndpo/k1": -mean,
        "gndpo/k3": _k3(d, scratch),
        "gndpo/tokens": float(n),
    }


def _k3(d: np.ndarray, scratch: np.ndarray) -> float:
    """Return the mean of exp(D) - 1 - D. Overwrites `scratch`, of d's size."""
    bounded = np.minimum(d, K3_MAX_LOG_RATIO, out=scratch)
    minus = bounded.mean()
    return float(np.expm1(bounded, out=scratch).mean() - minus)


def _describe_sizes(a: np.ndarray, magnitude: np.ndarray, scratch: np.ndarray) -> dict[str, float]:
    """Describe how unevenly the gradient is spread over the tokens. The weight of a token is |A|."""
    n, largest, number = a.size, float(magnitude.max()), a.dtype.type
    shares = {
        "gndpo/advantage_kurtosis": 0.0,
        "gndpo/effective_sample_share": 0.0,
        "gndpo/top_1pct_gradient_share": 0.0,
    }
    if largest > NO_ADVANTAGE:
        # In units of the largest, so that no power leaves float32.
        unit = np.multiply(a, number(1 / largest), out=scratch)
        squares, total = _squares(unit), float(magnitude.sum())
        unit -= number(_mean(unit))
        variance = _squares(unit)
        fourth = _squares(np.multiply(unit, unit, out=unit))
        top = max(int(TOP_PART * n), 1)
        threshold = float(np.partition(magnitude, n - top)[n - top])
        above = magnitude[np.flatnonzero(magnitude > threshold)]
        # Several may be as large as the smallest of the top.
        largest_ones = float(above.sum()) + (top - above.size) * threshold
        shares = {
            "gndpo/advantage_kurtosis": n * fourth / variance**2 - 3 if variance > 0 else 0.0,
            # n equal tokens give 1, one token among n zeros 1/n.
            "gndpo/effective_sample_share": (total / largest) ** 2 / (n * squares),
            "gndpo/top_1pct_gradient_share": largest_ones / total,
        }
    return {"gndpo/advantage_abs_max": largest, **shares}


def describe_teachers(teachers: Sequence[str], tokens: Tokens) -> dict[str, float]:
    """Return the metrics of `describe_signal` for the rows of each teacher, as gndpo/teacher/<teacher>/...

    Args:
        teachers: teacher of each row.
    """
    described: dict[str, float] = {}
    for teacher in sorted(set(teachers)):
        part = tokens.of_rows(np.array([name == teacher for name in teachers]))
        if part.d.size:
            metrics = describe_signal(part)
            if tokens.gain is not None:
                # All teachers have the same.
                del metrics["gndpo/gain"]
            described |= {name.replace("gndpo/", f"gndpo/teacher/{teacher}/", 1): x for name, x in metrics.items()}
    return described


def sum_parts(tokens: Tokens, lengths: np.ndarray) -> Parts:
    """Add up each tenth of each response: a token at position p of a response of length n is in tenth 10 p // n.

    Args:
        lengths: (batch,), tokens of each response, including those that the mask hides.
    """
    # Rounded up.
    edges = -(np.arange(PARTS + 1) * -lengths[:, None] // PARTS)
    # No valid token is after the end of a response, and the parts together must be the whole row.
    edges[:, -1] = tokens.valid.shape[1]
    count = np.diff(np.minimum(edges, lengths[:, None]), axis=1)
    # Rows whose mask has holes are counted token by token.
    holes = np.flatnonzero(tokens.counts != lengths)
    if holes.size:
        inside = tokens.valid[holes].reshape(-1).view(np.int8)
        count[holes] = _segment_sums(inside, np.diff(edges[holes], axis=1), np.int64)
    return Parts(count, *(_segment_sums(x, count, x.dtype.type) for x in (tokens.d, tokens.magnitude)))


def describe_positions(parts: Parts) -> dict[str, float]:
    """Describe the signal by relative position in the response.

    Returns:
        gndpo/position/<0..9>/{k1,advantage_abs_mean}: over the tokens of each tenth of their responses, nats and mean
            of |A|; absent where no response has a token there.
    """
    described: dict[str, float] = {}
    sums = zip(parts.count.sum(0), parts.d.sum(0), parts.magnitude.sum(0), strict=True)
    for part, (count, d, magnitude) in enumerate(sums):
        if count:
            means = _means(float(count), d, magnitude)
            described |= {f"gndpo/position/{part}/{name}": value for name, value in means.items()}
    return described


def describe_classes(tokens: Tokens, classes: np.ndarray) -> dict[str, float]:
    """Describe the signal by kind of token.

    Args:
        classes: (tokens,) uint8, indices of `token_classes.CLASSES`.

    Returns:
        gndpo/token/<class>/share: of the tokens;
        gndpo/token/<class>/{k1,advantage_abs_mean}: nats and mean of |A|; absent where a step has no such token.
    """
    described: dict[str, float] = {}
    # Several times faster than `bincount`.
    counts = np.array([np.count_nonzero(classes == number) for number in range(len(CLASSES))])
    sums = np.zeros((len(CLASSES), 2), np.float64)
    weights = np.empty_like(tokens.d)
    largest = int(counts.argmax())
    for number in np.flatnonzero(counts).tolist():
        if number != largest:
            # A product with zeros and ones takes a fraction of the time of selecting, or of weights in `bincount`.
            np.copyto(weights, classes == number)
            sums[number] = np.dot(weights, tokens.d), np.dot(weights, tokens.magnitude)
    # All others together leave it.
    sums[largest] = np.array([tokens.d.sum(), tokens.magnitude.sum()], np.float64) - sums.sum(0)
    for number, name in enumerate(CLASSES):
        described[f"gndpo/token/{name}/share"] = float(counts[number] / classes.size)
        if counts[number]:
            means = _means(float(counts[number]), *sums[number])
            described |= {f"gndpo/token/{name}/{metric}": value for metric, value in means.items()}
    return described


def describe_sources(tokens: Tokens, parts: Parts, sources: Sequence[str]) -> dict[str, float]:
    """Describe the signal by data source. Returns nothing if a batch has only one.

    Args:
        sources: data source of each row.

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
    described: dict[str, float] = {}
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
    """Describe lengths and ends of the responses that have a valid token (verl's padding rows have none).

    Args:
        lengths: (batch,), as for `sum_parts`.
        classes: all response tokens of the batch, row after row, valid or not, (lengths.sum(),) uint8, indices of
            `token_classes.CLASSES`; None where a batch has no token ids.

    Returns:
        gndpo/response/{length_mean,length_p95}: tokens, including those that the mask hides; nearest rank;
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


def _means(count: float, d: np.floating, magnitude: np.floating) -> dict[str, float]:
    return {"k1": -float(d) / count, "advantage_abs_mean": float(magnitude) / count}


def _segment_sums(x: np.ndarray, sizes: np.ndarray, dtype: type) -> np.ndarray:
    """Return sums over consecutive pieces of x, which together are all of it, in the shape of `sizes`."""
    sums: np.ndarray = np.zeros(sizes.size, np.float64 if dtype is np.float32 else dtype)
    flat = sizes.reshape(-1)
    full = flat > 0
    sums[full] = np.add.reduceat(x, (flat.cumsum() - flat)[full], dtype=dtype)
    return sums.reshape(sizes.shape)


def _with_room(*tokens: np.ndarray) -> list[np.ndarray]:
    """Return float32 arrays in a type that holds the sums of their squares, too."""
    largest = max(max(x.max(initial=0), -x.min(initial=0)) for x in tokens)
    return [x.astype(np.float64) for x in tokens] if largest > FLOAT32_ROOM else [*tokens]


def _mean(x: np.ndarray) -> float:
    # numpy adds pairwise: the error is a few units in the last place of the mean of |x|.
    return float(x.mean())


def _squares(x: np.ndarray) -> float:
    return float(np.dot(x, x))


def _mean_and_std(x: np.ndarray, scratch: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation (Bessel-corrected, 0 for one value). Overwrites `scratch`, of x's size."""
    mean = _mean(x)
    return mean, math.sqrt(_squares(np.subtract(x, x.dtype.type(mean), out=scratch)) / max(x.size - 1, 1))
