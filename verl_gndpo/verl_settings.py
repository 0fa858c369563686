# SPDX-License-Identifier: Apache-2.0
"""Find the settings of verl that a run of ours ignores, and those that differ from the published recipe."""

import math
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from verl_gndpo.config import GNDPOConfig, read_signal_config
from verl_gndpo.presets import RECIPE


class Ignored(NamedTuple):
    """One setting of verl that means nothing to our estimators, so that a run proceeds without it."""

    key: str
    value: Any
    instead: Any
    why: str


def ignored_settings(config: Any, signal: GNDPOConfig) -> list[Ignored]:
    """Return the settings of verl that are on in a config and that a run of ours turns off.

    Args:
        config: verl's whole config, with one of our estimators.
        signal: its section `algorithm.gndpo`.
    """
    off: dict[str, tuple[Any, str]] = {
        "algorithm.use_kl_in_reward": (
            False,
            "advantages come from the teacher, not from a reward that a penalty could change "
            "(actor_rollout_ref.actor.use_kl_loss=True adds a KL loss)",
        ),
        "trainer.critic_warmup": (0, "there is no critic to warm up, and the student would not learn meanwhile"),
        "actor_rollout_ref.actor.use_prefix_grouper": (False, "verl's v1 trainers never read it"),
    }
    # A sampler of the user's own decides itself what to filter.
    if not signal.task_reward.coef and not OmegaConf.select(config, "trainer.v1.sampler.custom_sampler.path"):
        off["algorithm.filter_groups.enable"] = (
            False,
            "it drops groups by their rewards, which are only logged here, and waits forever if they never differ",
        )
    values = {key: OmegaConf.select(config, key) for key in off}
    return [Ignored(key, value, *off[key]) for key, value in values.items() if value]


class Difference(NamedTuple):
    """One setting that is not as in the published runs."""

    key: str
    value: Any
    published: Any


def recipe_differences(config: Any) -> list[Difference]:
    """Return all differences of a config from the published recipe of GNDPO.

    The signal counts where `algorithm.adv_estimator=gndpo` claims it. A run with another estimator of ours has chosen
    another signal, so that only the rest is compared.

    Args:
        config: verl's whole config, with one of our estimators and a valid section `algorithm.gndpo`.
    """
    own = RECIPE["algorithm.adv_estimator"]
    asynchronous = config.trainer.v1.trainer_mode == "separate_async"
    found = []
    for key, published in RECIPE.items():
        if key == "algorithm.adv_estimator" or (".separate_async." in key and not asynchronous):
            continue
        if isinstance(published, str) and published.startswith("${"):
            published = OmegaConf.select(config, published[2:-1])
        found.append(Difference(key, OmegaConf.select(config, key), published))
    if config.algorithm.adv_estimator == own:
        given, published = (_stages(read_signal_config(algorithm, own)) for algorithm in (config.algorithm, None))
        for key, value in published.items():
            full = f"algorithm.gndpo.{key}"
            # Parameters of the published bound are given beside another bound, too. null leaves them as published.
            beside = OmegaConf.select(config, full)
            found.append(Difference(full, given.get(key, value if beside is None else beside), value))
    return [difference for difference in found if difference.value != difference.published]


def _stages(config: GNDPOConfig) -> dict[str, Any]:
    """Return what decides a signal, by the keys of `algorithm.gndpo`."""
    signal = config.signal
    return {
        "preset": config.preset,
        "bound": signal.bound,
        "baseline": signal.baseline,
        "scale": signal.scale,
        **signal.parameters,
        "std_floor": signal.std_floor,
        "gain_limit": None if math.isinf(signal.gain_limit) else signal.gain_limit,
        "task_reward.coef": config.task_reward.coef,
    }
