# SPDX-License-Identifier: Apache-2.0
"""`verl-gndpo report`: plots and a table from what verl's file logger wrote, without verl.

read.py takes logs, table.py compares them, figures.py lists the plots; curves.py, breakdown.py and timeline.py draw
them with drawing.py, picture.py holds what is drawn and said of it, page.py writes the page.
"""
