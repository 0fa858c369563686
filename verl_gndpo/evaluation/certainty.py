# SPDX-License-Identifier: Apache-2.0
"""Say how certain an accuracy is, and whether two models differ. Pure functions of arrays."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import comb, sqrt

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
_Z = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""
_BLOCK_VALUES = 2_000_000
"""Resampled values that are in memory at a time."""


@dataclass(frozen=True)
class Interval:
    """A share or a difference of shares, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Model B minus model A on the same problems."""

    interval: Interval
    only_a: int
    """Problems on which A is better."""
    only_b: int
    """Problems on which B is better."""
    p: float
    """Two-sided: McNemar's exact test of one answer each, a sign-flip test of several."""


def wilson(right: int, total: int) -> Interval:
    """Return the score interval of a share (Wilson 1927), which stays within 0 and 1.

    Raises:
        ValueError: no problems.
    """
    if total < 1:
        raise ValueError("an interval needs at least one problem")
    share, z2 = right / total, _Z * _Z / total
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z * sqrt(share * (1 - share) / total + z2 / (4 * total)) / (1 + z2)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    # Rounding would leave the ends just beside 0 and 1.
    return Interval(share, 0.0 if right == 0 else low, 1.0 if right == total else high)


def accuracy(acc: np.ndarray, groups: Sequence[Hashable] | None = None, seed: int = 0) -> Interval:
    """Return the mean accuracy with its interval.

    Args:
        acc: (problems, answers) of 0 and 1. The mean over its columns is mean@n.
        groups: (problems,) what each problem is a variant of. Related problems are drawn together.
        seed: of the bootstrap.
    """
    if acc.shape[1] == 1 and (groups is None or len(set(groups)) == len(acc)):
        return wilson(int(acc.sum()), len(acc))
    return _bootstrap(acc.mean(axis=1), groups, seed)


def compare(a: np.ndarray, b: np.ndarray, groups: Sequence[Hashable] | None = None, seed: int = 0) -> Difference:
    """Compare two models on the same problems, paired by row.

    Args:
        a, b: (problems, answers) of 0 and 1; the numbers of answers may differ.
        groups: as for `accuracy`.
        seed: of the bootstrap and of the sign-flip test.

    Raises:
        ValueError: the numbers of problems differ.
    """
    if len(a) != len(b):
        raise ValueError(f"one model has {len(a)} problems and the other {len(b)}")
    change = b.mean(axis=1) - a.mean(axis=1)
    only_a, only_b = int((change < 0).sum()), int((change > 0).sum())
    related = groups is not None and len(set(groups)) < len(change)
    single = a.shape[1] == b.shape[1] == 1 and not related
    p = mcnemar(only_a, only_b) if single else _sign_flip(_sums(change, groups)[0], seed)
    return Difference(_bootstrap(change, groups, seed), only_a, only_b, p)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided p-value of the exact test (McNemar 1947): the binomial test of the discordant pairs."""
    pairs = only_a + only_b
    tail = sum(comb(pairs, k) for k in range(min(only_a, only_b) + 1))
    # Integers, because 2 ** pairs is no float for many pairs.
    return min(1.0, (2 * tail) / (1 << pairs)) if 2 * tail < 1 << pairs else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values that are adjusted for the number of comparisons (Holm 1979), in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def pass_at_k(acc: np.ndarray, k: int) -> float:
    """Return the unbiased estimate of pass@k (Chen et al. 2021, arXiv:2107.03374, equation 1).

    Args:
        acc: (problems, answers) of 0 and 1.
        k: at most the number of answers.

    Raises:
        ValueError: k is larger than the number of answers, or below 1.
    """
    answers = acc.shape[1]
    if not 1 <= k <= answers:
        raise ValueError(f"pass@{k} needs between 1 and {answers} answers per problem")
    wrong = answers - acc.sum(axis=1).astype(int)
    return float(np.mean([1 - comb(int(number), k) / comb(answers, k) for number in wrong]))


def _sums(values: np.ndarray, groups: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the number of the values of each group."""
    if groups is None:
        return values, np.ones(len(values))
    places = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    labels = np.array([places[name] for name in groups])
    return np.bincount(labels, weights=values), np.bincount(labels).astype(float)


def _bootstrap(values: np.ndarray, groups: Sequence[Hashable] | None, seed: int) -> Interval:
    """Return the mean with the percentile interval over resampled groups (Efron 1979)."""
    sums, counts = _sums(values, groups)
    rng = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    block = max(1, _BLOCK_VALUES // len(sums))
    for start in range(0, RESAMPLES, block):
        drawn = rng.integers(0, len(sums), (min(block, RESAMPLES - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def _sign_flip(changes: np.ndarray, seed: int) -> float:
    """Return the two-sided p-value of the sum of the changes if each sign were a coin's (Fisher 1935)."""
    changes = changes[changes != 0]
    if not len(changes):
        return 1.0
    rng, found = np.random.default_rng(seed), abs(changes.sum())
    as_large, block = 0, max(1, _BLOCK_VALUES // len(changes))
    for start in range(0, RESAMPLES, block):
        signs = 2 * rng.integers(0, 2, (min(block, RESAMPLES - start), len(changes))) - 1
        as_large += int((np.abs(signs @ changes) >= found - 1e-9).sum())
    return (as_large + 1) / (RESAMPLES + 1)
