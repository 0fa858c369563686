# SPDX-License-Identifier: Apache-2.0
"""Ask models the questions of benchmarks, grade the answers, and report as each benchmark reports.

breakdowns.py   the figures of each benchmark, each with its source
certainty.py    intervals, paired differences, pass@k
    page.py         the page and its tables
"""
