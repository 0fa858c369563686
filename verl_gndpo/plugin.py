# SPDX-License-Identifier: Apache-2.0
"""Entry point `verl.plugins`: what happens to a process that imports verl. Registrations only.

verl reports a failing plugin at DEBUG level only, and every process of a run loads it, so this file does next to
nothing by itself: each registration waits until verl's own module of that name is imported.
"""

from wrapt import register_post_import_hook

from verl_gndpo.platforms import without_accelerator
from verl_gndpo.verl_patches import fixes as verl_fixes

_HOOKS = {
    "verl.trainer.ppo.core_algos": "verl_gndpo.estimators:register",
    "verl.trainer.ppo.v1": "verl_gndpo.trainer:install",
    "hydra.core.plugins": "verl_gndpo.hydra_search_path:register",
}
_HOOKS_WITHOUT_ACCELERATOR = {
    "verl.utils.distributed": "verl_gndpo.platforms.cpu:use_gloo_once",
    "verl.workers.engine.fsdp.transformer_impl": "verl_gndpo.platforms.cpu:register_engines",
}


def _load() -> None:
    verl_fixes.apply()
    hooks = dict(_HOOKS)
    if without_accelerator():
        from verl.plugin.platform import PlatformRegistry

        from verl_gndpo.platforms import cpu

        PlatformRegistry.register("cpu")(cpu.PlatformCPU)
        cpu.activate()
        hooks |= _HOOKS_WITHOUT_ACCELERATOR
    for module, hook in hooks.items():
        register_post_import_hook(hook, module)


_load()
