# SPDX-License-Identifier: Apache-2.0
"""How stable are signals for on-policy distillation? Seeds, hostile regimes and arms on the quickstart's dice."""
