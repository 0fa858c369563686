# SPDX-License-Identifier: Apache-2.0
"""Measure how fast `verl-gndpo evaluate` answers with a tiny model, and whether its memory grows with the problems.

    python benchmarks/evaluation.py [--json OUT] [--problems 500 4000] [--data_parallel 1]

A tiny Qwen2.5-VL with random weights looks at dice and answers in 24 tokens. `per_minute` counts from the first answer
on, without the start, which is `start_s`. The peaks are sums over the command's processes of their anonymous memory,
sampled every 0.2 s: with what vLLM allocates once, without pages of mapped files. Targets: 500 per minute, and a peak
that is the same for all numbers of problems.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from _common import machine, print_table, proportional, with_children, write_json

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_S = 0.2
LENGTHS = ["--max-prompt", "64", "--max-response", "24"]


def measure(model: Path, data: Path, out: Path, engines: int) -> dict:
    """Evaluate once. Return seconds and peaks."""
    command = [sys.executable, "-m", "verl_gndpo.cli", "evaluate", str(model), "--data", str(data), "--out", str(out)]
    command += [*LENGTHS, "--dtype", "float32", "--gpu-memory-utilization", "0.1", "--data-parallel", str(engines)]
    command += ["--reward-function", f"{ROOT / 'examples' / 'quickstart' / 'reward.py'}:compute_score"]
    answers = out / "models" / model.name / "answers.jsonl"
    first = last = size = peak = 0.0
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = psutil.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        while process.poll() is None:
            now, found = time.perf_counter(), answers.stat().st_size if answers.exists() else 0
            if found != size:
                first, last, size = first or now, now, found
            peak = max(peak, sum(proportional(member)["Pss_Anon"] for member in with_children(process)))
            time.sleep(SAMPLE_S)
        seconds = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{command} failed:\n{log.read().decode()[-3000:]}")
    count = sum(1 for _ in answers.open())
    rate = 60 * count / max(last - first, SAMPLE_S)
    return {"seconds": seconds, "start_s": first - start, "per_minute": rate, "peak_anonymous_gb": peak / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--problems", type=int, nargs="+", default=[500, 4000])
    parser.add_argument("--data_parallel", type=int, default=1)
    args = parser.parse_args()

    sys.path.insert(0, str(ROOT))
    import verl  # noqa: F401  # prepares processes without an accelerator

    from examples.quickstart import diagrams
    from examples.quickstart.tiny_vlm import build_tiny_vlm

    results = []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        build_tiny_vlm(scratch / "model", seed=0)
        diagrams.write_dataset(scratch)
        table = pq.read_table(scratch / "train.parquet")
        for problems in args.problems:
            whole = pa.concat_tables([table] * -(-problems // len(table))).slice(0, problems)
            pq.write_table(whole, scratch / "problems.parquet", row_group_size=256)
            figures = measure(scratch / "model", scratch / "problems.parquet", scratch / "out", args.data_parallel)
            shutil.rmtree(scratch / "out")
            results.append({"problems": problems, "data_parallel": args.data_parallel} | figures)
    for result in results:
        result["memory_vs_fewest"] = result["peak_anonymous_gb"] / results[0]["peak_anonymous_gb"]
    names = [name for name in results[0] if name != "problems"]
    rows = [[result["problems"], *(result[name] for name in names)] for result in results]
    print_table("verl-gndpo evaluate", ["problems", *names], rows)
    write_json(args.json, {"machine": machine(), "results": results})


if __name__ == "__main__":
    main()
