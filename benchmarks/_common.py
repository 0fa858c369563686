# SPDX-License-Identifier: Apache-2.0
"""Helpers of the benchmarks: time rivals in turns, write figures as JSON, print a table."""

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
    """Time every rival once per round, so that other load on the machine affects all of them equally.

    Args:
        rivals: functions to time, by name. One round runs before the timed ones.
        rounds: number of timed calls of each.
        before: called before every call, not timed.

    Returns:
        {name: [seconds, ...]}, one entry per round.
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
    """Describe the machine: processor, cores, versions, and its load."""
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
    """Return a process and all of its descendants; empty once it has ended."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def proportional(process: psutil.Process) -> dict[str, int]:
    """Return the proportional set size of a process in bytes, {"Pss": whole, "Pss_Anon": without pages of files}.

    Both are 0 once the process has ended.
    """
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
    """Write `figures` to `path` in one step. None: nowhere."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(figures, indent=2) + "\n")
    partial.replace(path)


def print_table(title: str, columns: list[str], rows: list[list]) -> None:
    """Print a table: numbers right-aligned, the first column left-aligned, floats with three significant digits."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def resident(field: str, pid: int | str = "self") -> float:
    """Return a size of a process from /proc, in GB (10^9 bytes)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return gigabytes(line)
    raise RuntimeError(f"/proc/{pid}/status has no {field}; this benchmark needs Linux")


def gigabytes(line: str) -> float:
    """Return the size in a line of /proc/PID/status, in GB (10^9 bytes)."""
    return int(line.split()[1]) * 1024 / 1e9
