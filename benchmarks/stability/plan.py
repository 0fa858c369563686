# SPDX-License-Identifier: Apache-2.0
"""The plan of the study, fixed before its seeds are run.

Primary outcome of a run: gap closed, (accuracy - before) / (teacher - before), averaged over the measurements after the
start, which rewards learning soon and not losing it again. Secondary: gap closed at the end, peak drop, gradient norms.

Learning rates: each arm has, in each regime's family, the one of the same grid with the best primary outcome on the
validation problems over the selection's seeds; no test problem and no test seed has a part in it. All arms of a seed
share initial weights, prompts and random numbers.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from benchmarks.stability.loop import Batch, Settings
from verl_gndpo.estimators import compute_log_ratio_advantage

STEPS, PROMPTS, RESPONSES, EVALUATE_EVERY = 24, 4, 2, 8


@dataclass(frozen=True)
class Arm:
    """One signal.

    Attributes:
        estimator: of this project, or `full_kl`, `grpo`, `constant`, `shuffled`.
        settings: `algorithm.gndpo`.
        multiplier: of the advantages; None: the mean gain of gndpo in the same regime at its learning rate.
        contender: whether claims are made of it: it has all seeds, others the first five in the regimes of the main
            table and the first three elsewhere.
    """

    estimator: str
    settings: dict = field(default_factory=dict)
    multiplier: float | None = 1.0
    contender: bool = False


ARMS = {
    "opd_raw": Arm("opd_raw"),
    "opd": Arm("opd", contender=True),
    "gndpo": Arm("gndpo", contender=True),
    "scale_only": Arm("gndpo", {"baseline": "none"}),
    "centre_only": Arm("gndpo", {"scale": "none"}),
    "opd_gain_matched": Arm("opd", multiplier=None),
    "clamp_1": Arm("opd", {"limit": 1.0}, contender=True),
    "power_opd": Arm("power_opd", contender=True),
    "power_1": Arm("power_opd", {"power_alpha": 1.0}, contender=True),
    "top_d": Arm("top_d"),
    "tv_opd": Arm("tv_opd"),
    "v_opd": Arm("v_opd"),
    "full_kl": Arm("full_kl", contender=True),
    "gap_opd": Arm("gap_opd", contender=True),
    "odds_opd": Arm("odds_opd", contender=True),
    "log_odds_opd": Arm("log_odds_opd", contender=True),
    "grpo": Arm("grpo"),
    "constant": Arm("constant"),
    "shuffled": Arm("shuffled"),
}
RIVALS = ("gndpo", "power_opd", "clamp_1")


@dataclass(frozen=True)
class Regime:
    """Under what an arm trains.

    Attributes:
        start: the student's accuracy as a share of the teacher's, per cent.
        problems: "train", or "degraded" for images that are hard to read for both models; measured on clean ones.
        outliers: share of tokens whose teacher log-prob is replaced by one from -20 to -5 nats.
        teacher_temperature: below 1 the teacher is sharper than it is.
        family: the regime whose learning rates it has in the first round; None: its own.
    """

    start: str = "40"
    problems: str = "train"
    outliers: float = 0.0
    teacher_temperature: float = 1.0
    optimizer: str = "adamw"
    grad_clip: float | None = 1.0
    family: str | None = None


MAIN_TABLE = ("clean", "near convergence", "outliers 20 %", "SGD, no clipping")
REGIMES = {
    "clean": Regime(),
    "start 60": Regime(start="60", family="clean"),
    "start 80": Regime(start="80", family="near convergence"),
    "near convergence": Regime(start="95"),
    "outliers 0.1 %": Regime(outliers=0.001, family="clean"),
    "outliers 1 %": Regime(outliers=0.01, family="clean"),
    "outliers 5 %": Regime(outliers=0.05, family="outliers 20 %"),
    "outliers 20 %": Regime(outliers=0.2),
    "sharp teacher": Regime(teacher_temperature=0.25),
    "degraded images": Regime(problems="degraded"),
    "no clipping": Regime(grad_clip=None, family="clean"),
    "SGD": Regime(optimizer="sgd"),
    "SGD, no clipping": Regime(optimizer="sgd", grad_clip=None),
}


@dataclass(frozen=True)
class Round:
    """Arms that are compared on seeds that nobody has seen before, with one grid of learning rates for all of them.

    Attributes:
        ours: pre-registered, before any of `seeds` was run: it beats each of RIVALS in the primary outcome in at least
            two regimes and loses to none of them in any.
        selection_seeds: of the trainings that learning rates are chosen with.
        own_rates: regimes that choose for themselves in spite of their family.
    """

    ours: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    selection_seeds: tuple[int, ...]
    adamw_rates: tuple[float, ...]
    sgd_rates: tuple[float, ...]
    own_rates: tuple[str, ...] = ()

    def family(self, regime: str) -> str:
        """Return the regime whose learning rates `regime` uses."""
        return regime if regime in self.own_rates else REGIMES[regime].family or regime

    def learning_rates(self, regime: str) -> tuple[float, ...]:
        """Return the grid of learning rates."""
        return self.adamw_rates if REGIMES[regime].optimizer == "adamw" else self.sgd_rates

    def seeds_of(self, regime: str, arm: str) -> tuple[int, ...]:
        """Return the seeds of an arm in a regime."""
        return self.seeds if ARMS[arm].contender else self.seeds[: 5 if regime in MAIN_TABLE else 3]


# The second round came after the first one's results, and because of them: learning rates from two seeds had been
# chosen badly, 3e-4 in particular, start 80 had those of another regime, and the signals that saturate were too small
# for SGD. odds_opd was in the first round as a second try, of which nothing was claimed beforehand.
ROUNDS = {
    "first": Round(
        ours="gap_opd",
        arms=tuple(arm for arm in ARMS if arm != "log_odds_opd"),
        seeds=tuple(range(8)),
        selection_seeds=(1000, 1001),
        adamw_rates=(3e-5, 1e-4, 3e-4),
        sgd_rates=(1e-2, 2.5e-2, 5e-2, 1e-1, 2e-1),
    ),
    "second": Round(
        ours="log_odds_opd",
        arms=(*RIVALS, "log_odds_opd"),
        seeds=tuple(range(8, 16)),
        selection_seeds=(1000, 1001, 1002, 1003),
        adamw_rates=(3e-5, 1e-4, 3e-4),
        sgd_rates=(4e-3, 1e-2, 2.5e-2, 5e-2, 1e-1, 2e-1),
        own_rates=("start 80",),
    ),
}


def settings(regime: Regime, learning_rate: float, seed: int, *, evaluate_on: str, steps: int = STEPS) -> Settings:
    """Return the settings of `loop.train`."""
    return Settings(
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        prompts=PROMPTS,
        n=RESPONSES,
        optimizer=regime.optimizer,
        grad_clip=regime.grad_clip,
        teacher_temperature=regime.teacher_temperature,
        evaluate_every=max(steps * EVALUATE_EVERY // STEPS, 1),
        problems=regime.problems,
        evaluate_on=evaluate_on,
    )


def corruption(regime: Regime) -> Callable[[Batch, torch.Generator], Batch] | None:
    """Return the corruption of the teacher's log-probs. `full_kl` and the KL baseline don't see it.

    None: nothing.
    """
    if not regime.outliers:
        return None

    def corrupt(batch: Batch, generator: torch.Generator) -> Batch:
        shape = batch.teacher_log_probs.shape
        hit = torch.rand(shape, generator=generator) < regime.outliers
        value = -5 - 15 * torch.rand(shape, generator=generator)
        hit &= batch.response_mask.bool()
        return dataclasses.replace(batch, teacher_log_probs=torch.where(hit, value, batch.teacher_log_probs))

    return corrupt


def advantage(arm: Arm, seed: int, multiplier: float = 1.0) -> Callable[[Batch], torch.Tensor] | str:
    """Return the function from a batch to advantages, by the estimators that a run of verl would use."""
    if arm.estimator == "full_kl":
        return "full_kl"
    generator = torch.Generator().manual_seed(seed)

    def compute(batch: Batch) -> torch.Tensor:
        if arm.estimator == "constant":
            return batch.response_mask.float()
        if arm.estimator == "grpo":
            return get_adv_estimator_fn("grpo")(
                token_level_rewards=batch.token_level_rewards,
                response_mask=batch.response_mask,
                index=np.array(batch.index),
            )[0]
        if arm.estimator == "shuffled":
            advantages = _estimate("gndpo", {}, batch)
            valid = batch.response_mask.bool()
            values = advantages[valid]
            advantages[valid] = values[torch.randperm(len(values), generator=generator)]
            return advantages
        return _estimate(arm.estimator, arm.settings, batch) * multiplier

    return compute


def _estimate(estimator: str, stages: dict, batch: Batch) -> torch.Tensor:
    advantages, _ = compute_log_ratio_advantage(
        estimator,
        teacher_log_probs=batch.teacher_log_probs,
        old_log_probs=batch.old_log_probs,
        response_mask=batch.response_mask,
        token_level_rewards=batch.token_level_rewards,
        index=batch.index,
        kl=batch.kl,
        config={"gndpo": stages},
    )
    return advantages


def fingerprint(regime: str, arm: str) -> str:
    """Return a digest of everything that fixes the runs of an arm in a regime, to detect results of another plan."""
    content = {
        "arm": [ARMS[arm].estimator, ARMS[arm].settings, ARMS[arm].multiplier],
        "regime": dataclasses.asdict(REGIMES[regime]),
        "numbers": [STEPS, PROMPTS, RESPONSES, EVALUATE_EVERY],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
