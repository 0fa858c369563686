# SPDX-License-Identifier: Apache-2.0
"""The teacher: a forward-only reference worker that scores the student's own tokens."""
