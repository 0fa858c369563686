# SPDX-License-Identifier: Apache-2.0
"""Run all checks of a run, or stop it when one of them finds an error."""

import logging
from typing import Any

from verl_gndpo.config import uses_gndpo
from verl_gndpo.doctor.architecture import check_architectures
from verl_gndpo.doctor.check import Check, DoctorError
from verl_gndpo.doctor.data import check_data, check_rewards, check_routing, check_rows
from verl_gndpo.doctor.environment import (
    check_accelerator,
    check_flash_attention,
    check_plugin,
    check_verl,
    check_versions,
)
from verl_gndpo.doctor.inputs import Inputs
from verl_gndpo.doctor.models import check_models
from verl_gndpo.doctor.settings import check_estimator, check_recipe, check_settings, check_verl_settings
from verl_gndpo.doctor.student import check_student

logger = logging.getLogger(__name__)


def run_checks(config: Any = None) -> list[Check]:
    """Check everything that can be known before a worker is placed.

    Args:
        config: verl's whole config; None checks the environment only. If it selects none of this project's estimators,
            the teacher and the settings of GNDPO are not checked.
    """
    checks = check_verl()
    # Nothing else can be asked of a verl that can't be imported, or that is too old.
    if any(check.status == "error" for check in checks):
        return checks
    plugin = check_plugin()
    checks += [*plugin, *check_versions(config), *check_accelerator(config)]
    if config is None:
        return checks
    checks += check_flash_attention(config)
    inputs = Inputs(config)
    # The other checks ask verl's registries and trainers, which are incomplete without the plugin.
    if plugin[0].status != "error":
        checks += [*check_estimator(config), *check_verl_settings(config)]
        checks += check_student(config)
        if uses_gndpo(config):
            checks += [*check_settings(inputs), *check_recipe(inputs), *check_models(inputs)]
            checks += [*check_architectures(inputs), *check_routing(inputs)]
    return [*checks, *check_data(inputs), *check_rows(inputs), *check_rewards(inputs)]


def raise_on_errors(config: Any) -> None:
    """Check a run that is about to start, and log the warnings.

    Args:
        config: verl's whole config.

    Raises:
        DoctorError: at least one check found an error.
    """
    checks = run_checks(config)
    for check in checks:
        if check.status == "warning":
            logger.warning("%s", check)
    errors = [check for check in checks if check.status == "error"]
    if errors:
        lines = [f"  {check}" for check in errors]
        raise DoctorError("\n".join([f"verl-gndpo: {len(errors)} error(s), nothing was started", *lines]))
