# SPDX-License-Identifier: Apache-2.0
"""Run hundreds of steps of the real loop on tiny models, and fail if the memory of a process, its open files or
TransferQueue grow.

    python -m benchmarks.soak [--steps 300] [--warm-up 60] [--json OUT] [--keep FOLDER]

Runs examples/run_qwen2_5vl_gndpo.sh with PROFILE=cpu: verl's trainer, vLLM, the teacher's worker, a checkpoint each
50 steps and a validation each 100. After each step it reads, for every process of the run, the memory that no other
run shares (anonymous pages and shared memory, in proportion: PSS of smaps_rollup without files) and the number of its
open files; the run itself adds what TransferQueue holds.

A slope is the median of the slopes between all pairs of steps after the warm-up, which single peaks do not change.
The limit is 1 MB in 10 steps for each process. About 1.5 seconds a step on two cores.

Ray's gcs_server remembers the last 100,000 tasks, and grows until it has seen so many. Here it remembers 1,000.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil

from benchmarks._common import machine, print_table, with_children, write_json
from benchmarks._runs import overrides, prepare
from tests.end_to_end.harness import Run, kill

MEMORY_LIMIT = 0.1
"""MB per step."""
FILES_LIMIT = 0.01
"""Open files per step: 3 in 300 steps."""
QUEUE = ("soak/queue_keys", "soak/queue_rows", "soak/queue_bytes")
START_UP_LIMIT_S = 900
STEP_LIMIT_S = 180


def memory(pid: int) -> int:
    """Return the bytes of a process that are not pages of files; what it shares counts in proportion.

    Raises:
        OSError: the process has ended.
    """
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("Pss_Anon", "Pss_Shmem"):
            total += int(value.split()[0]) * 1024
    return total


def sample(process: psutil.Process) -> dict[str, tuple[float, int]]:
    """Return, for each process of a run, its memory in MB and the number of its open files; by name and id."""
    found = {}
    for member in with_children(process):
        try:
            name = " ".join(Path(word).name for word in member.cmdline()[:3])[:40]
            if name.startswith("ray::"):
                # An actor adds the method that it runs.
                name = name.split(".")[0].rstrip()
            found[f"{name} ({member.pid})"] = (memory(member.pid) / 1e6, member.num_fds())
        except (psutil.Error, OSError):
            continue
    return found


def slope(values: list[float], steps: list[int]) -> float:
    """Return the median of the slopes between all pairs of points (Theil and Sen), per step."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    first, second = np.triu_indices(len(x), 1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))


def summarise(samples: dict[int, dict[str, tuple[float, int]]], queue: dict[int, dict], warm_up: int) -> dict:
    """Return the first and last values and the slopes after the warm-up, of processes that live in all of its steps."""
    steps = [step for step in sorted(samples) if step > warm_up]
    series: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for step in steps:
        for name, values in samples[step].items():
            series[name].append(values)
    processes = {}
    for name, values in series.items():
        if len(values) == len(steps):
            of_memory, of_files = ([pair[i] for pair in values] for i in (0, 1))
            tenth = max(len(values) // 10, 1)
            processes[name] = {
                "mb_first": float(np.median(of_memory[:tenth])),
                "mb_last": float(np.median(of_memory[-tenth:])),
                "mb_per_step": slope(of_memory, steps),
                "files_first": float(np.median(of_files[:tenth])),
                "files_last": float(np.median(of_files[-tenth:])),
                "files_per_step": slope(of_files, steps),
            }
    counted = [step for step in sorted(queue) if step > warm_up]
    in_queue = {
        name: {
            "first": queue[counted[0]][name],
            "last": queue[counted[-1]][name],
            "largest": max(queue[step][name] for step in counted),
            "per_step": slope([queue[step][name] for step in counted], counted),
        }
        for name in QUEUE
    }
    return {"processes": processes, "queue": in_queue, "seen_only_in_part": sorted(set(series) - set(processes))}


def failures(summary: dict) -> list[str]:
    """Return what grows."""
    grown = []
    for name, of in summary["processes"].items():
        if of["mb_per_step"] > MEMORY_LIMIT:
            grown.append(f"{name}: {10 * of['mb_per_step']:.2f} MB in 10 steps")
        if of["files_per_step"] > FILES_LIMIT:
            grown.append(f"{name}: {of['files_first']:.0f} to {of['files_last']:.0f} open files")
    grown += [
        f"{name}: {of['first']} to {of['last']}"
        for name, of in summary["queue"].items()
        # Nothing remains of a step: verl's prompts and rows are all deleted.
        if of["per_step"] > 0 or (name == "soak/queue_keys" and of["last"] > of["first"])
    ]
    return grown


def watch(run: Run, steps: int) -> dict[int, dict[str, tuple[float, int]]]:
    """Start a run, and sample its processes after each step until it ends.

    Raises:
        SystemExit: the run failed, or a step took longer than STEP_LIMIT_S.
    """
    samples: dict[int, dict[str, tuple[float, int]]] = {}
    metrics, process, begin = run.out / "metrics.jsonl", run.start(), time.monotonic()
    family, deadline = psutil.Process(process.pid), begin + START_UP_LIMIT_S
    try:
        while process.poll() is None:
            # Each step is a line; they are read at the end.
            done = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            if done and done not in samples:
                samples[done] = sample(family)
                deadline = time.monotonic() + STEP_LIMIT_S
                if done % 10 == 0:
                    total = sum(size for size, _ in samples[done].values())
                    print(f"step {done} of {steps} after {time.monotonic() - begin:.0f} s: {total:.0f} MB", flush=True)
            if time.monotonic() > deadline:
                sys.exit(f"no step after {done} in time: {run.out / 'log'}")
            time.sleep(0.2)
    finally:
        kill(process)
    if process.returncode:
        print("\n".join(run.log.splitlines()[-40:]))
        sys.exit(f"the run failed with exit code {process.returncode}")
    return samples


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warm-up", type=int, default=60, help="steps that are not counted (default %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the figures, with all samples")
    parser.add_argument("--keep", type=Path, help="folder of the run; a temporary one without it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.keep or Path(temporary)).resolve()
        environment = prepare(folder, batch=2, n=2, MAX_RESPONSE="4")
        environment["RAY_task_events_max_num_task_in_gcs"] = "1000"
        more = ["trainer.save_freq=50", "trainer.max_actor_ckpt_to_keep=1", "trainer.test_freq=100"]
        settings = overrides(arguments.steps, folder / "checkpoints", *more, "trainer.resume_mode=disable")
        run = Run(folder / "run", environment, settings, module="benchmarks._soak_queue")
        samples = watch(run, arguments.steps)
        metrics = {int(step["training/global_step"]): step for step in run.steps}
    queue = {step: {name: of[name] for name in QUEUE} for step, of in metrics.items()}
    summary = summarise(samples, queue, arguments.warm_up)
    seconds = float(np.median([of["timing_s/step"] for of in metrics.values()]))
    figures = {"machine": machine(), "steps": len(metrics), "warm_up": arguments.warm_up, "seconds_per_step": seconds}
    write_json(arguments.json, figures | summary | {"samples": samples, "queue_of_steps": queue})
    rows = [
        [name, of["mb_first"], of["mb_last"], 10 * of["mb_per_step"], int(of["files_first"]), int(of["files_last"])]
        for name, of in sorted(summary["processes"].items(), key=lambda item: -item[1]["mb_per_step"])
    ]
    columns = ["process", "MB at first", "at last", "MB in 10 steps", "files at first", "at last"]
    print_table(f"{len(metrics)} steps of {seconds:.2f} s, {arguments.warm_up} of them warm-up", columns, rows)
    rows = [[name, *(of[key] for key in ("first", "last", "largest"))] for name, of in summary["queue"].items()]
    print_table("TransferQueue after a step", ["", "first", "last", "largest"], rows)
    grown = failures(summary)
    sys.exit("grows: " + "; ".join(grown) if grown else 0)


if __name__ == "__main__":
    main()
