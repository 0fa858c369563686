# SPDX-License-Identifier: Apache-2.0
"""Warn of metrics on which a person should act, and say how."""

import math
from collections.abc import Callable

from verl_gndpo.config import Warn

CORRELATION = "training/rollout_actor_probs_pearson_corr"

# Number of steps at the start of a run whose mean share of truncated responses is the reference.
FIRST_STEPS = 5
# Number of steps before a warning is repeated.
REPEAT_AFTER_STEPS = 50


class SignalWarnings:
    """Compares each step's metrics with limits.

    Remembers the share of truncated responses of the first steps, and when each warning was given.
    """

    def __init__(self, limits: Warn):
        self._limits = limits
        self._first_truncated: list[float] = []
        self._given: dict[str, int] = {}

    def check(self, step: int, metrics: dict[str, float]) -> tuple[dict[str, float], list[str]]:
        """Check the metrics of a step.

        Args:
            step: verl's global step.
            metrics: `gndpo/...` and verl's. A limit whose metric is absent or not finite is not checked.

        Returns:
            gndpo/warning/<kind>: 1.0 if a limit is exceeded, else 0.0; absent if it is null or not checked.
            The texts of warnings that were not given within the last `REPEAT_AFTER_STEPS` steps.
        """
        flags, texts = {}, []
        for kind, rule in RULES.items():
            limit = getattr(self._limits, kind)
            found = None if limit is None else rule(self, metrics, limit)
            if found is None:
                continue
            passed, text = found
            flags[f"gndpo/warning/{kind}"] = float(passed)
            if passed and step - self._given.get(kind, -math.inf) >= REPEAT_AFTER_STEPS:
                self._given[kind] = step
                texts.append(text)
        return flags, texts

    def _gain(self, metrics: dict[str, float], limit: float) -> tuple[bool, str] | None:
        gain = _finite(metrics, "gndpo/gain")
        if gain is None:
            return None
        text = (
            f"gndpo/gain is {gain:.1f}, above {limit:g}: the log-ratios are nearly equal, and whitening inflates "
            "their noise. Near convergence, stop here; otherwise raise algorithm.gndpo.std_floor, set "
            "algorithm.gndpo.gain_limit, or take a preset without a scale (algorithm.adv_estimator=opd)"
        )
        return gain > limit, text

    def _sign_flip_share(self, metrics: dict[str, float], limit: float) -> tuple[bool, str] | None:
        share = _finite(metrics, "gndpo/sign_flip_share")
        if share is None:
            return None
        text = (
            f"{share:.0%} of the tokens, more than {limit:.0%}, get an advantage whose sign is not that of the "
            "log-ratio, because of the baseline or the task reward. Use algorithm.gndpo.baseline=none, a preset that "
            "keeps signs (algorithm.adv_estimator=opd, power_opd or tv_opd), or a smaller task_reward.coef"
        )
        return share > limit, text

    def _truncated_share_rise(self, metrics: dict[str, float], limit: float) -> tuple[bool, str] | None:
        share = _finite(metrics, "gndpo/response/truncated_share")
        if share is None:
            return None
        if len(self._first_truncated) < FIRST_STEPS:
            self._first_truncated.append(share)
        first = sum(self._first_truncated) / len(self._first_truncated)
        text = (
            f"{share:.0%} of the responses don't end with EOS, {first:.0%} in the first {FIRST_STEPS} steps of this "
            "run: they get longer than allowed. Raise data.max_response_length; if they repeat themselves (look at "
            "trainer.rollout_data_dir), go back to an earlier checkpoint and lower actor_rollout_ref.actor.optim.lr"
        )
        return share - first > limit, text

    def _correlation(self, metrics: dict[str, float], limit: float) -> tuple[bool, str] | None:
        correlation = _finite(metrics, CORRELATION)
        if correlation is None:
            return None
        text = (
            f"{CORRELATION} is {correlation:.4f}, below {limit:g}: rollout and training engine disagree about the "
            "student's probabilities, which no signal can correct. Give both the same dtype "
            "(actor_rollout_ref.rollout.dtype, actor_rollout_ref.actor.fsdp_config.dtype), or correct for it with "
            "algorithm.rollout_correction.rollout_is=token"
        )
        return correlation < limit, text

    def _data_source_gradient_share(self, metrics: dict[str, float], limit: float) -> tuple[bool, str] | None:
        prefix, suffix = "gndpo/data_source/", "/gradient_share"
        shares = {
            name.removeprefix(prefix).removesuffix(suffix): value
            for name, value in metrics.items()
            if name.startswith(prefix) and name.endswith(suffix)
        }
        if not shares:
            return None
        source = max(shares, key=lambda name: shares[name])
        text = (
            f"data source {source} has {shares[source]:.0%} of the gradient, more than {limit:.0%}, with "
            f"{metrics[f'{prefix}{source}/share']:.0%} of the tokens: the others hardly train the student. Give them "
            "more weight (verl-gndpo data mix --weights). If its share of tokens is much smaller, the teacher may not "
            "fit this source: remove it, or give it a teacher of its own (teacher.models)"
        )
        return shares[source] > limit, text


RULES: dict[str, Callable[[SignalWarnings, dict[str, float], float], tuple[bool, str] | None]] = {
    "gain": SignalWarnings._gain,
    "sign_flip_share": SignalWarnings._sign_flip_share,
    "truncated_share_rise": SignalWarnings._truncated_share_rise,
    "correlation": SignalWarnings._correlation,
    "data_source_gradient_share": SignalWarnings._data_source_gradient_share,
}


def _finite(metrics: dict[str, float], name: str) -> float | None:
    value = metrics.get(name)
    return value if value is not None and math.isfinite(value) else None
