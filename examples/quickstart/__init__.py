# SPDX-License-Identifier: Apache-2.0
"""The embedded task of the quickstart: drawn boards of dice, adding questions, and two tiny models."""
