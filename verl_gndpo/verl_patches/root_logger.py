# SPDX-License-Identifier: Apache-2.0
"""The root logger, which a package that vLLM imports turns down for the whole process."""

import logging
import os
from types import ModuleType

from verl_gndpo.verl_patches.patch import patches


@patches("root_logger")
def show_warnings(logging_config: ModuleType) -> bool:
    """Give the root logger back Python's own level, unless the environment asks for another one.

    Args:
        logging_config: has just set the level of the root logger and of all its handlers.
    """
    if "SAGEMAKER_CONTAINER_LOG_LEVEL" in os.environ or "LOG_LEVEL" in os.environ:
        return False
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    for handler in root.handlers:
        if handler.level == logging.ERROR:
            handler.setLevel(logging.NOTSET)
    return True
