# SPDX-License-Identifier: Apache-2.0
"""Describe the signal of each step: metrics, kinds of tokens, worst tokens, limits and warnings."""
