# SPDX-License-Identifier: Apache-2.0
"""Write a page that shows some rows of each split as they were written."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from .report import Report

THUMBNAIL = 480
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }
article { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 1.5em; padding: 1.2em 0;
  border-top: 1px solid #ccc }
img { max-width: 100%; border: 1px solid #ddd; margin-bottom: .5em }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: .8em; margin: 0 0 .8em }
.role { color: #888; font-size: .85em } .answer { background: #e8f4e8 } .placeholder { color: #b04000 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1em 1em; margin: 0; font-size: .9em }
dt { color: #888 } dd { margin: 0; overflow-wrap: anywhere }
"""


def write_preview(path: Path, title: str, files: dict[str, list[Path]], reports: list[Report], rows: int) -> None:
    """Write one self-contained HTML page with `rows` rows of each split, spread evenly over the split.

    Args:
        path: path of the page.
        title: heading of the page.
        files: parquet files of each split.
        reports: reports of the splits, which hold the lengths.
        rows: number of rows to show per split.
    """
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"]
    parts += [f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>"]
    for report in reports:
        count = min(rows, report.written)
        chosen = {report.written * number // count for number in range(count)}
        parts.append(f"<h2>{html.escape(report.split)}: {len(chosen)} of {report.written} rows</h2>")
        for place, row in _rows(files[report.split], chosen):
            parts.append(_article(row, report, place))
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("\n".join(parts), encoding="utf-8")
    partial.replace(path)


def _rows(paths: list[Path], chosen: set[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    place = 0
    for path in paths:
        for batch in pq.ParquetFile(path, pre_buffer=False).iter_batches(batch_size=16):
            for row in range(batch.num_rows):
                if place in chosen:
                    yield place, batch.slice(row, 1).to_pylist()[0]
                place += 1


def _article(row: dict[str, Any], report: Report, place: int) -> str:
    info = row["extra_info"]
    facts = {
        "answer": info["answer"],
        "graded as": info["answer_type"] + (f", tolerance {info['tolerance']:g}" if info["tolerance"] else ""),
        "choices": " | ".join(info["choices"]),
        "meta": info["meta"],
    }
    if report.prompt_tokens:
        facts["tokens"] = f"{report.prompt_tokens[place]}, of them {report.image_tokens[place]} for images"
    pictures = "".join(_figure(image["bytes"]) for image in row["images"])
    messages = "".join(
        f"<div class=role>{html.escape(message['role'])}</div><pre>{_marked(message['content'])}</pre>"
        for message in row["prompt"]
    )
    listed = "".join(f"<dt>{name}<dd>{html.escape(value)}" for name, value in facts.items() if value)
    return (
        f"<article><div>{pictures}</div><div><b>{html.escape(info['id'])}</b>{messages}"
        f"<div class=role>ground truth</div><pre class=answer>{html.escape(row['reward_model']['ground_truth'])}</pre>"
        f"<dl>{listed}</dl></div></article>"
    )


def _marked(text: str) -> str:
    return html.escape(text).replace("&lt;image&gt;", "<span class=placeholder>&lt;image&gt;</span>")


def _figure(data: bytes) -> str:
    image = Image.open(BytesIO(data))
    width, height = image.size
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img alt="{width} x {height}" src="data:image/png;base64,{encoded}"><div class=role>{width} x {height}</div>'
    )
