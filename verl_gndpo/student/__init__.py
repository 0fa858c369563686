# SPDX-License-Identifier: Apache-2.0
"""The student's passes, in which each prompt and image runs once for all of its responses."""
