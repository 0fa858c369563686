# SPDX-License-Identifier: Apache-2.0
"""GNDPO: stable on-policy distillation of multimodal models, as a plugin for stock verl.

Importing this package is cheap; `verl` loads `verl_gndpo.plugin` by itself (entry point `verl.plugins`).
"""

from verl_gndpo.presets import PRESETS

SUPPORTED_VERL = "0.9.1"
ESTIMATORS = tuple(PRESETS)
