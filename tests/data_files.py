# SPDX-License-Identifier: Apache-2.0
"""Pictures, sources and clean processes for the tests of the converters."""

import os
import subprocess
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """Return the bytes of an image file; the options are those of Pillow's `save`."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(
    number: int = 0, size: tuple[int, int] = (40, 30), mode: str = "RGB", kind: str = "PNG", **options
) -> bytes:
    """Return an image file of two colours; the pictures of two numbers below 65,536 differ."""
    image = Image.new("RGB", size, (number % 256, number // 256 % 256, 200))
    image.putpixel((0, 0), (255, number % 256, 0))
    return encoded(image.convert(mode), kind, **options)


def geo3k_row(number: int = 0) -> dict:
    """Return a row of hiyouga/geometry3k."""
    return {
        "images": [{"bytes": picture(number), "path": None}],
        "problem": f"<image>Find $x_{{{number}}}$.",
        "answer": f"\\frac {{ {number} }} {{ 7 }}",
    }


def write_rows(path: Path, rows: list[dict], schema: pa.Schema | None = None) -> Path:
    """Write a parquet file and its folder, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def run(command: list[object], cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run a command to its end, with its output as text and without a PYTHONPATH unless `environment` gives one."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=120)


def run_here(command: list[object], cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run a command with this checkout on its path, whatever is installed."""
    return run(command, cwd, **{"PYTHONPATH": str(ROOT)} | environment)
