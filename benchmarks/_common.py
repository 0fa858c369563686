# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: rivals timed in turns, figures written as JSON, a table on the terminal."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table


def time_in_turns(rivals: dict[str, Callable[[], object]], rounds: int, before: Callable[[], object]) -> dict:
    """Time every rival once a round, so that whatever else the machine does falls on all of them alike.

    Args:
        rivals: by name, what to time. One round is run before the timed ones.
        rounds: timed calls of each.
        before: called before every call, not timed.

    Returns:
        {name: [seconds, ...]}, one entry a round.
    """
    seconds = {name: [] for name in rivals}
    for _ in range(rounds + 1):
        for name, call in rivals.items():
            before()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}


def machine() -> dict:
    """Where the figures come from: processor, cores, versions, and the load that they were measured under."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def with_children(process: psutil.Process) -> list[psutil.Process]:
    """The process and all below it; empty once it has ended."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def proportional(process: psutil.Process) -> dict[str, int]:
    """What a process holds alone plus its share of what it has in common with others (PSS), in bytes: {"Pss": whole,
    "Pss_Anon": without pages of files}; zeros once it has ended."""
    sizes = {"Pss": 0, "Pss_Anon": 0}
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return sizes
    for line in lines:
        name, _, value = line.partition(":")
        if name in sizes:
            sizes[name] = int(value.split()[0]) * 1024
    return sizes


def write_json(path: Path | None, figures: dict) -> None:
    """Write `figures` to `path`, which never holds a part of them; None: nowhere."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(figures, indent=2) + "\n")
    partial.replace(path)


def print_table(title: str, columns: list[str], rows: list[list]) -> None:
    """Numbers right, the first column left; floats with three significant digits."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
