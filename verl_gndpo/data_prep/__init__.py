# SPDX-License-Identifier: Apache-2.0
"""Make the converters importable as `verl_gndpo.data_prep` in a clone, where they are in the top-level data_prep.

An installed wheel holds the top-level folder in place of this one (pyproject.toml, `package-dir`).
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "data_prep")]
