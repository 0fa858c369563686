# SPDX-License-Identifier: Apache-2.0
"""`verl-gndpo report`: plots and a table from what verl's file logger wrote, without verl.

read.py takes logs, table.py the figures, figures.py draws, page.py writes the page.
"""
