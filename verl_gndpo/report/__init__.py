# SPDX-License-Identifier: Apache-2.0
"""Draw and compare runs from the logs of verl's file logger, for `verl-gndpo report`. Needs neither verl nor torch.

The modules, in the order in which the data passes through them:

    logs.py       read the logs
    table.py      compute the figures of the table
    plots.py      the list of plots
    curves.py     draw metrics over steps
    groups.py     draw metrics by group: token classes, positions, data sources, teachers
    timing.py     draw how the time of a step divides into stages
    drawing.py    what a plot is; how lines, bands and legends look
    page.py       write the page, its PNGs and summary.json

docs/report.md describes the report for its readers.
"""
