# SPDX-License-Identifier: Apache-2.0
"""The doctor: find out before anything is started whether a run can work.

`run.py` runs the checks, for `verl-gndpo doctor` and at the start of every training. Each subject has a module of its
own: environment, settings, models, data. A check returns its findings; it prints nothing and raises nothing.
"""
