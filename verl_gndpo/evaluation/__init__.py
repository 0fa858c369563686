# SPDX-License-Identifier: Apache-2.0
"""Ask models the questions of benchmarks, grade the answers, and report as each benchmark reports.

command.py      the steps
job.py          what to ask a model, and its answers
pool.py         hands problems to processes and collects the answers
worker.py       such a process, with prompts.py and either engine.py (vLLM) or server.py
grading.py      accuracies from answers
breakdowns.py   the figures of each benchmark, each with its source
certainty.py    intervals, paired differences, pass@k
page.py         the page and its tables
"""
