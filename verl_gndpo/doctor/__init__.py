# SPDX-License-Identifier: Apache-2.0
"""Check, before anything is started, whether a run can work."""
