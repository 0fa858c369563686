# SPDX-License-Identifier: Apache-2.0
"""List what is active in this process beyond stock verl, for `verl-gndpo doctor --verbose`."""

import contextlib
import importlib

from verl_gndpo import verl_patches
from verl_gndpo.advantage import BOUNDS
from verl_gndpo.families import declared_families
from verl_gndpo.presets import PRESETS

# Modules of verl whose import applies the patches that concern the trainer's process.
TRAINER_MODULES = ("verl.trainer.ppo.v1", "verl.workers.engine_workers", "verl.experimental.agent_loop.agent_loop")


def list_patches() -> list[str]:
    """Return one line per entry of `verl_patches`, with its state here after importing verl's trainer."""
    for module in TRAINER_MODULES:
        # The checks report what keeps verl from being imported.
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    return [
        f"patch {row['name']}: {row['state']} ({row['where']}); changes {row['changes']}; upstream: {row['upstream']}; "
        f"remove when {row['remove_when']}"
        for row in verl_patches.describe()
    ]


def list_signals() -> list[str]:
    """Return one line per preset and per bound, including those that modules of the user have registered."""
    presets = [
        f"estimator {name}: {', '.join(f'{key}={value}' for key, value in preset.items())}"
        for name, preset in PRESETS.items()
    ]
    bounds = []
    for name, bound in BOUNDS.items():
        parameters = [f"{key} ({declared.default}; {declared.range})" for key, declared in bound.parameters.items()]
        bounds.append(f"bound {name}: {', '.join(parameters) or 'no parameters'}")
    return presets + bounds


def list_families() -> list[str]:
    """Return one line per declared model family."""
    return [f"model family {family.name}: {', '.join(family.model_types)}" for family in declared_families()]
