# SPDX-License-Identifier: Apache-2.0
"""Entry point `verl.plugins`: what happens to a process that imports verl. Registrations only.

verl reports a failing plugin at DEBUG level only, and every process of a run loads it, so this file does next to
nothing by itself: each hook waits until its module has been imported, and is given that module.
"""

from typing import NamedTuple

from wrapt import register_post_import_hook

from verl_gndpo import verl_patches
from verl_gndpo.platforms import torchvision_ops, without_accelerator


class Hook(NamedTuple):
    """A function that uses an extension point of verl or Hydra."""

    module: str
    """The module that has the extension point."""

    function: str
    """The function that is given the module, as "module:function"."""

    without_accelerator: bool = False
    """True if only a run without an accelerator needs it."""


HOOKS = (
    Hook("verl.trainer.ppo.core_algos", "verl_gndpo.estimators:register"),
    Hook("hydra.core.plugins", "verl_gndpo.hydra_groups:register"),
    Hook("verl.plugin.platform", "verl_gndpo.platforms.cpu:register_platform", True),
    Hook("verl.workers.engine.fsdp.transformer_impl", "verl_gndpo.platforms.cpu:register_engines", True),
)
"""What comes on top of them, the patches, has an index of its own: verl_patches/."""


def _load() -> None:
    on_cpu = without_accelerator()
    for hook in HOOKS:
        if on_cpu or not hook.without_accelerator:
            register_post_import_hook(hook.function, hook.module)
    verl_patches.apply_all("every process")
    if on_cpu:
        from verl_gndpo.platforms import cpu

        cpu.prepare_environment()
        torchvision_ops.install()
        verl_patches.apply_all("without accelerator")


_load()
