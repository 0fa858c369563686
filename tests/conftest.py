# SPDX-License-Identifier: Apache-2.0
"""Every test process is offline and, without an accelerator, set up as a run would be: by importing verl."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import verl  # noqa: F401  loads the plugin
