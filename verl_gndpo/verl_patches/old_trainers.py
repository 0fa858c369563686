# SPDX-License-Identifier: Apache-2.0
"""Refuses our estimators in the trainers of verl that ask no teacher, before they start a worker."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from verl_gndpo.config import TRAINER_MODES, ConfigError, uses_gndpo
from verl_gndpo.verl_patches.patch import patches


@patches("old_trainers")
def refuse_our_estimators(ray_trainer: ModuleType) -> bool:
    """Make `RayPPOTrainer` and all classes derived from it raise ConfigError when they are created for our estimators.

    Some of these classes, such as that of `fully_async_main`, never call the constructor of `RayPPOTrainer`.
    """
    trainer = ray_trainer.RayPPOTrainer

    def check_constructor_of(cls: type, **kwargs: Any) -> None:
        super(trainer, cls).__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _checked(cls.__init__)  # type: ignore[misc]  # It is the constructor of this class.

    trainer.__init__ = _checked(trainer.__init__)
    trainer.__init_subclass__ = classmethod(check_constructor_of)
    return True


def _checked(constructor: Callable[..., None]) -> Callable[..., None]:
    """Return a constructor that looks at the estimator first."""

    @functools.wraps(constructor)
    def checked(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if uses_gndpo(config):
            raise ConfigError(
                f"algorithm.adv_estimator={config.algorithm.adv_estimator} needs a teacher, and verl's "
                f"{type(self).__name__} does not ask one: run verl.trainer.main_ppo with trainer.use_v1=True and "
                f"trainer.v1.trainer_mode={'|'.join(TRAINER_MODES)}"
            )
        constructor(self, config, *args, **kwargs)

    return checked
