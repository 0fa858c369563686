# SPDX-License-Identifier: Apache-2.0
"""Compare two conversions of Geometry3K: verl's own recipe (`datasets.map`, then `to_parquet`) and data_prep/geo3k.py.

The latter runs with all its checks, which include reading every row back through verl. Targets: at least as fast, at
most half the peak memory, and a peak that does not grow with the set.

    python benchmarks/data_prep.py [--json OUT] [--data FILE] [--rows 4000] [--growth 4 10] [--num_proc 8 2]

The rows of `--data` are repeated up to `--rows`. By default they are the real sample if there is one, otherwise drawn
diagrams. Each conversion is a process of its own with a fresh cache, and the methods take turns. `peak_gb` is the sum
of the proportional set sizes (PSS) of the process and its children, sampled every 50 ms. It includes pages of mapped
files; `peak_anonymous_gb` does not.
"""

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from _common import machine, print_table, proportional, with_children, write_json
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data" / "geometry3k" / "train.parquet"
SAMPLE_S = 0.05

# The same steps per row as verl's recipe for Geometry3K, and the same way of writing them.
RECIPE = """
import sys
import datasets

source, out, workers = sys.argv[1:]

def convert(row, index):
    question, answer, images = row.pop("problem"), row.pop("answer"), row.pop("images")
    return {
        "data_source": "hiyouga/geometry3k",
        "prompt": [{"role": "user", "content": question + " Think first, then box the answer."}],
        "images": images,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"split": "train", "index": index, "answer": answer, "question": question},
    }

rows = datasets.load_dataset("parquet", data_files=source, split="train")
rows.map(convert, with_indices=True, num_proc=int(workers)).to_parquet(out)
"""


def repeated(data: Path | None, rows: int, folder: Path) -> Path:
    """Write `rows` rows in the schema of hiyouga/geometry3k by repeating those of `data`, or drawn ones."""
    path = folder / "train.parquet"
    if path.exists():
        return path
    folder.mkdir(parents=True)
    table = pq.read_table(data) if data else drawn(192)
    with pq.ParquetWriter(path, table.schema) as writer:
        for start in range(0, rows, len(table)):
            writer.write_table(table.slice(0, min(len(table), rows - start)), row_group_size=100)
    return path


def drawn(rows: int) -> pa.Table:
    """Return line drawings of the size of Geometry3K's, with an alpha channel as most of those have."""
    seed = random.Random(0)
    made = []
    for number in range(rows):
        width, height = seed.randrange(200, 700), seed.randrange(150, 500)
        image = Image.new("RGBA", (width, height), "white")
        canvas = ImageDraw.Draw(image)
        for _ in range(40):
            ends = [seed.randrange(side) for side in (width, height) * 2]
            canvas.line(ends, fill=(seed.randrange(256), 0, 0, 255), width=2)
        buffer = BytesIO()
        image.save(buffer, "PNG")
        images = [{"bytes": buffer.getvalue(), "path": None}]
        made.append({"images": images, "problem": f"<image>Find side {number}.", "answer": str(number)})
    return pa.Table.from_pylist(made)


def measure(command: list[str], cache: Path) -> tuple[float, float, float]:
    """Run a command; return its seconds, and the peaks of PSS and of its anonymous part in bytes, with children."""
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    peak = peak_anonymous = 0
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = psutil.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT)
        while process.poll() is None:
            sizes = [proportional(member) for member in with_children(process)]
            peak = max(peak, sum(size["Pss"] for size in sizes))
            peak_anonymous = max(peak_anonymous, sum(size["Pss_Anon"] for size in sizes))
            time.sleep(SAMPLE_S)
        seconds = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{command} failed:\n{log.read().decode()[-3000:]}")
    return seconds, peak, peak_anonymous


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--data", type=Path, default=REAL if REAL.exists() else None)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--growth", type=int, nargs="*", default=[4, 10], help="ours also converts this many times")
    parser.add_argument("--num_proc", type=int, nargs="+", default=[8, 2], help="verl's recipe has 8")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)

        def call(method: str, workers: int, rows: int) -> dict:
            source = repeated(args.data, rows, scratch / str(rows))
            out, cache = scratch / "out", scratch / "cache"
            if method == "verl_recipe":
                command = [sys.executable, "-c", RECIPE, str(source), str(out / "train.parquet"), str(workers)]
            else:
                command = [sys.executable, "data_prep/geo3k.py", "--local_dataset_path", str(source)]
                command += ["--local_save_dir", str(out), "--num_proc", str(workers)]
            out.mkdir()
            seconds, peak, anonymous = measure(command, cache)
            written = pq.ParquetFile(out / "train.parquet").metadata.num_rows
            shutil.rmtree(out)
            shutil.rmtree(cache, ignore_errors=True)
            if written != rows:
                raise SystemExit(f"{method} wrote {written} of {rows} rows")
            return {"seconds": seconds, "peak_gb": peak / 1e9, "peak_anonymous_gb": anonymous / 1e9}

        runs = [(method, workers, args.rows) for workers in args.num_proc for method in ("verl_recipe", "ours")]
        samples = {run: [] for run in runs}
        for _ in range(args.rounds):
            for run in runs:
                samples[run].append(call(*run))
        for factor in args.growth:
            run = ("ours", args.num_proc[-1], args.rows * factor)
            samples[run] = [call(*run)]
    figures = ("seconds", "peak_gb", "peak_anonymous_gb")
    results = [
        {"method": method, "num_proc": workers, "rows": rows}
        | {name: statistics.median(sample[name] for sample in samples[method, workers, rows]) for name in figures}
        for method, workers, rows in samples
    ]
    by_run = dict(zip(samples, results, strict=True))
    for (method, workers, rows), result in by_run.items():
        if method == "ours" and rows == args.rows:
            rival = by_run["verl_recipe", workers, rows]
            result["speedup_vs_recipe"] = rival["seconds"] / result["seconds"]
            result["memory_vs_recipe"] = result["peak_gb"] / rival["peak_gb"]
        elif method == "ours":
            result["memory_vs_fewer_rows"] = result["peak_gb"] / by_run["ours", workers, args.rows]["peak_gb"]
    columns = [*figures, "speedup_vs_recipe", "memory_vs_recipe", "memory_vs_fewer_rows"]
    print_table(
        "Converting Geometry3K",
        ["method, processes, rows", *columns],
        [[f"{r['method']}, {r['num_proc']}, {r['rows']}", *(r.get(column, "") for column in columns)] for r in results],
    )
    write_json(args.json, {"machine": machine(), "results": results})


if __name__ == "__main__":
    main()
