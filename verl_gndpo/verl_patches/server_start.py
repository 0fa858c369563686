# SPDX-License-Identifier: Apache-2.0
"""Gives verl's wait for its first teacher servers a limit, and lines in the log."""

import functools
from types import ModuleType
from typing import Any

from verl_gndpo.config import TeacherConfig
from verl_gndpo.teacher.server_start import limited_start
from verl_gndpo.teacher.waiting import start_limit
from verl_gndpo.verl_patches.patch import patches


@patches("server_start")
def limit_start_of_servers(teacher_model: ModuleType, teacher: TeacherConfig) -> bool:
    """Make verl's `TeacherModelManager` say what it waits for, and end when its servers do not start.

    Args:
        teacher_model: verl's module.
        teacher: a resolved `teacher` section with `backend=server`.
    """
    manager_class = teacher_model.TeacherModelManager
    original = manager_class._initialize_llm_servers

    @functools.wraps(original)
    def _initialize_llm_servers(self: Any) -> None:
        """Run stock verl's method."""
        model = self.teacher_model_config
        with limited_start(
            model.key, model.model_path, lambda: getattr(self, "rollout_replicas", []), start_limit(teacher)
        ):
            original(self)

    manager_class._initialize_llm_servers = _initialize_llm_servers
    return True
