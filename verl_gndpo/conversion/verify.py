# SPDX-License-Identifier: Apache-2.0
"""Read the written files back through verl's own reader, and compare."""

from __future__ import annotations

import asyncio
import contextlib
import io
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from .errors import ConversionError, one_line
from .images import pixel_digest
from .lengths import Measure
from .report import Report
from .text import IMAGE_PLACEHOLDER

SLICE_ROWS = 256
SLICE_BYTES = 64 * 1024 * 1024
DIGEST_BYTES = 16


def import_reader() -> tuple[type[Any] | None, str]:
    """Return verl's RLHFDataset and ""; or None and why it cannot be imported."""
    try:
        from verl.utils.dataset.rl_dataset import RLHFDataset
    except Exception as error:  # not only ImportError: a torchvision of another torch version raises RuntimeError
        return None, one_line(error)
    return RLHFDataset, ""


def verify(
    reader: type[Any], paths: list[Path], report: Report, scratch: Path, measure: Measure, workers: int = 1
) -> str:
    """Read every row of a split back through verl's RLHFDataset, and compare it with what was written.

    The rows are read slice by slice, so neither memory nor disk space grows with the set. For each row, compare its
    place, id, ground truth, messages, and the size and pixels of each image; compute its length from its text and its
    images' sizes, and add the length to the report. The rows of each slice with the most extreme pictures and texts
    also pass through all steps of verl's agent loop: resizing, chat template, tokenizer and image processor. The result
    states the largest difference between their actual and their computed lengths: 0 for Qwen-VL processors, while other
    processors may frame an image with tokens of their own.

    Args:
        reader: verl's RLHFDataset.
        paths: files of the split, in order.
        report: report of the split; receives the lengths.
        scratch: folder for slices and the copies that `datasets` makes of them.
        measure: tokenizer and processor.
        workers: number of threads.

    Returns:
        A summary of the checks, in words.

    Raises:
        ConversionError: a row does not come back as it was written.
    """
    rows = start = 0
    errors: list[int] = []
    with (
        _datasets_in(scratch / "cache"),
        ThreadPoolExecutor(workers) as threads,
        tqdm(total=report.written, desc=f"{report.split}: reading back", unit="row") as progress,
    ):
        for table in _slices(paths):
            stored = table.to_pylist()
            dataset = _open(reader, table, scratch, measure, report.split)
            if len(dataset) != len(stored):
                raise ConversionError(f"verl reads {len(dataset)} of {len(stored)} rows of split {report.split}.")
            expected = []
            for row in stored:
                end = start + len(row["images"]) * DIGEST_BYTES
                expected.append(report.digests[start:end].tobytes())
                start = end
            lengths = [_length(row, measure) for row in stored]
            report.prompt_tokens.extend(prompt for prompt, _ in lengths)
            report.image_tokens.extend(image for _, image in lengths)
            whole_way = _extremes(stored, lengths)

            check = partial(_checked, reader, measure, dataset, stored, expected, lengths, whole_way)
            for error in threads.map(check, range(len(stored))):
                errors += error
                progress.update()
            rows += len(stored)
            del dataset, check
            shutil.rmtree(scratch / "cache")
    if rows != report.written:
        raise ConversionError(f"verl reads {rows} of the {report.written} rows written for split {report.split}.")
    off = f", lengths off by up to {max(errors)} tokens" if max(errors, default=0) else ""
    return f"messages, images, ground truths; {len(errors)} of them through tokenizer and processor{off}"


def _checked(
    reader: type[Any],
    measure: Measure,
    dataset: Any,
    stored: list[dict[str, Any]],
    expected: list[bytes],
    lengths: list[tuple[int, int]],
    whole_way: set[int],
    index: int,
) -> list[int]:
    """Compare one row of a slice; for a row in `whole_way`, return by how many tokens its computed length is off."""
    try:
        row = dataset[index]
        _compare(row, stored[index], expected[index])
        return [abs(_prompt_length(reader, row, measure) - lengths[index][0])] if index in whole_way else []
    except Exception as error:
        row_id = stored[index]["extra_info"]["id"]
        raise ConversionError(f"row {row_id} does not come back from verl ({one_line(error)}).") from error


def _slices(paths: list[Path]) -> Iterator[pa.Table]:
    for path in paths:
        file = pq.ParquetFile(path, pre_buffer=False)
        groups: list[pa.Table] = []
        for number in range(file.num_row_groups):
            groups.append(file.read_row_group(number))
            full = sum(len(group) for group in groups) >= SLICE_ROWS or sum(g.nbytes for g in groups) >= SLICE_BYTES
            if full or number == file.num_row_groups - 1:
                yield pa.concat_tables(groups)
                groups.clear()


def _open(reader: type[Any], table: pa.Table, scratch: Path, measure: Measure, split: str) -> Any:
    from omegaconf import OmegaConf

    path = scratch / "slice.parquet"
    pq.write_table(table, path)
    config = OmegaConf.create(
        {
            "cache_dir": str(scratch / "cache"),
            "filter_overlong_prompts": False,
            "filter_overlong_prompts_workers": None,
            "max_prompt_length": sys.maxsize,
        }
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the length of every slice
            return reader(str(path), measure.tokenizer, config, processor=measure.processor)
    except Exception as error:
        raise ConversionError(f"verl cannot open the file of split {split} ({one_line(error)}).") from error


@contextlib.contextmanager
def _datasets_in(folder: Path) -> Iterator[None]:
    """Make `datasets` keep its copies in a folder, without a progress bar for each."""
    import datasets

    cache, bars = datasets.config.HF_DATASETS_CACHE, datasets.are_progress_bars_disabled()
    datasets.config.HF_DATASETS_CACHE = folder
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = cache
        if not bars:
            datasets.enable_progress_bars()


def _length(row: dict[str, Any], measure: Measure) -> tuple[int, int]:
    try:
        return measure(row["prompt"], [Image.open(io.BytesIO(image["bytes"])).size for image in row["images"]])
    except Exception as error:
        row_id = row["extra_info"]["id"]
        raise ConversionError(f"row {row_id} does not come back from verl ({one_line(error)}).") from error


def _extremes(stored: list[dict[str, Any]], lengths: list[tuple[int, int]]) -> set[int]:
    """Return the rows of a slice that are most likely to make a processor fail: by tokens, image tokens and images."""
    chosen: set[int] = set()
    prompts, images = zip(*lengths, strict=True)
    for scores in (prompts, images, [len(row["images"]) for row in stored]):
        ordered = sorted(range(len(stored)), key=scores.__getitem__)
        chosen |= {ordered[0], *ordered[-2:]}
    return chosen


def _compare(row: dict[str, Any], stored: dict[str, Any], digests: bytes) -> None:
    """Raise ValueError when a row of verl's reader differs from the stored row or from the pixel digests."""
    for key in ("data_source", "reward_model", "extra_info"):
        if row[key] != stored[key]:
            raise ValueError(f"{key} is {row[key]!r}, stored was {stored[key]!r}")
    pictures = []
    for message, written in zip(row["raw_prompt"], stored["prompt"], strict=True):
        parts = message["content"]
        if not isinstance(parts, str):
            pictures += [part["image"] for part in parts if part["type"] == "image"]
            parts = "".join(IMAGE_PLACEHOLDER if part["type"] == "image" else part["text"] for part in parts)
        if (message["role"], parts) != (written["role"], written["content"]):
            raise ValueError(f"the message reads {parts!r}")
    if len(pictures) != len(stored["images"]):
        raise ValueError(f"{len(pictures)} images, stored were {len(stored['images'])}")
    for position, picture in enumerate(pictures):
        digest = digests[position * DIGEST_BYTES : (position + 1) * DIGEST_BYTES]
        if picture.mode != "RGB" or pixel_digest(picture) != digest:
            raise ValueError(f"image {position} has other pixels")


def _prompt_length(reader: type[Any], row: dict[str, Any], measure: Measure) -> int:
    """Return the number of tokens of a row's prompt after all steps of verl's agent loop."""
    processor = measure.processor
    patch = getattr(processor.image_processor, "patch_size", 14)
    images, _ = asyncio.run(reader.process_vision_info(row["raw_prompt"], patch, {}))
    text = processor.apply_chat_template(row["raw_prompt"], add_generation_prompt=True, tokenize=False)
    return len(processor(text=[text], images=images)["input_ids"][0])
