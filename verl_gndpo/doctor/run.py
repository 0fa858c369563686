# SPDX-License-Identifier: Apache-2.0
"""What has to be true before a run is worth starting: `verl-gndpo doctor`, and the start of every training.

Each `check_*` function looks at one thing and returns what it found as `Check`s; it prints and raises nothing.
"""

import logging
import sys
from typing import Any

from verl_gndpo.config import uses_gndpo
from verl_gndpo.doctor.check import Check, DoctorError
from verl_gndpo.doctor.data import check_data, check_rewards, check_routing
from verl_gndpo.doctor.environment import check_accelerator, check_plugin, check_verl, check_versions
from verl_gndpo.doctor.models import check_models
from verl_gndpo.doctor.settings import check_estimator, check_settings, check_verl_settings

logger = logging.getLogger(__name__)


def run_checks(config: Any = None) -> list[Check]:
    """Everything that can be known before a worker is placed.

    Args:
        config: verl's whole config; None checks the environment only. Where it selects none of our estimators, teacher
            and settings of ours are not looked at.
    """
    checks = check_verl()
    if sys.modules.get("verl") is None:
        return checks
    plugin = check_plugin()
    checks += [*plugin, *check_versions(config), *check_accelerator(config)]
    if config is None:
        return checks
    # Without its trainer and the plugin, nothing could be asked about the rest of verl's config.
    if plugin[0].status != "error":
        checks += [*check_estimator(config), *check_verl_settings(config)]
        if uses_gndpo(config):
            checks += [*check_settings(config), *check_models(config), *check_routing(config)]
    return [*checks, *check_data(config), *check_rewards(config)]


def raise_on_errors(config: Any) -> None:
    """Let a run start, or say everything that keeps it from starting. Warnings are logged.

    Raises:
        DoctorError: any check of `run_checks` found an error.
    """
    checks = run_checks(config)
    for check in checks:
        if check.status == "warning":
            logger.warning("%s: %s%s", check.name, check.detail, f" -> {check.remedy}" if check.remedy else "")
    errors = [check for check in checks if check.status == "error"]
    if errors:
        lines = [f"  {c.name}: {c.detail}{f' -> {c.remedy}' if c.remedy else ''}" for c in errors]
        raise DoctorError("\n".join([f"verl-gndpo: {len(errors)} error(s), nothing was started", *lines]))
