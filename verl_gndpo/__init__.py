# SPDX-License-Identifier: Apache-2.0
"""GNDPO: stable on-policy distillation of multimodal models, as a plugin for stock verl.

Importing this package is cheap; `verl` loads `verl_gndpo.plugin` by itself (entry point `verl.plugins`). Modules of
users add signals through `register_bound` and `register_preset` (docs/extending/signal.md).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl_gndpo.advantage import register_bound
    from verl_gndpo.estimators import register_preset

__all__ = ["register_bound", "register_preset"]


def __getattr__(name: str) -> Any:
    # Late, because both import torch, which the command line does without.
    if name == "register_bound":
        from verl_gndpo.advantage import register_bound

        return register_bound
    if name == "register_preset":
        from verl_gndpo.estimators import register_preset

        return register_preset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
