# SPDX-License-Identifier: Apache-2.0
"""Run all checks of a run, or stop it when one of them finds an error."""

import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl_gndpo.config import uses_gndpo
from verl_gndpo.doctor.architecture import check_architectures
from verl_gndpo.doctor.check import Check, DoctorError, describe_error
from verl_gndpo.doctor.data import check_data, check_indices, check_rewards, check_routing, check_rows
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
from verl_gndpo.doctor.weights import check_weights

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
        checks += _run(check_student, config)
        if uses_gndpo(config):
            for check in (check_settings, check_recipe, check_models, check_weights, check_architectures):
                checks += _run(check, inputs)
            for check in (check_routing, check_indices):
                checks += _run(check, inputs)
    for check in (check_data, check_rows, check_rewards):
        checks += _run(check, inputs)
    return checks


def _run(check: Callable[[Any], list[Check]], given: Any) -> list[Check]:
    """Run a check. If it fails itself, say so instead of ending the run that it was to protect."""
    try:
        return check(given)
    except Exception as error:
        code = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(code.filename).name}:{code.lineno}"
        detail = f"{check.__name__} failed, so its subject is not checked: {describe_error(error)} ({where})"
        remedy = "look for damaged files and settings of a wrong type; please report it if there are none"
        return [Check("doctor", "warning", detail, remedy)]


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
