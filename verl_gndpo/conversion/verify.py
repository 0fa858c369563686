# SPDX-License-Identifier: Apache-2.0
"""Reading what was written back through verl's own reader."""

from __future__ import annotations

import asyncio
import contextlib
import io
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


def import_reader() -> tuple[type | None, str]:
    """verl's RLHFDataset; or None, and why it cannot be had here."""
    try:
        from verl.utils.dataset.rl_dataset import RLHFDataset
    except Exception as error:  # not only ImportError: a torchvision that does not fit torch raises RuntimeError
        return None, one_line(error)
    return RLHFDataset, ""


def verify(reader: type, paths: list[Path], report: Report, scratch: Path, measure: Measure, workers: int = 1) -> str:
    """Reads every row of a split back through verl's RLHFDataset, a slice at a time: neither memory nor disk space
    grows with the set.

    Checked of every row: its place, id, ground truth and messages, and every image's size and pixels against those
    that were converted. Its length is reckoned from its text and the sizes of its images, and noted in the report. The
    rows of each slice with the most extreme pictures and texts also go the whole way that verl's agent loop goes:
    resizing, chat template, tokenizer and image processor. How far their lengths are from the reckoned ones is said: 0
    for processors of the Qwen-VL kind, while others may frame an image with tokens of their own.

    Args:
        reader: RLHFDataset.
        paths: files of the split, in order.
        report: what was written into them.
        scratch: folder for slices and the copies that `datasets` makes of them.
        measure: tokenizer and processor.
        workers: threads.

    Returns:
        What was checked, in words.

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

            def check(
                index: int, dataset=dataset, stored=stored, expected=expected, lengths=lengths, whole_way=whole_way
            ) -> None:
                try:
                    row = dataset[index]
                    _compare(row, stored[index], expected[index])
                    if index in whole_way:
                        errors.append(abs(_prompt_length(reader, row, measure) - lengths[index][0]))
                except Exception as error:
                    row_id = stored[index]["extra_info"]["id"]
                    raise ConversionError(f"row {row_id} does not come back from verl ({one_line(error)}).") from error

            for _ in threads.map(check, range(len(stored))):
                progress.update()
            rows += len(stored)
            del dataset
            shutil.rmtree(scratch / "cache")
    if rows != report.written:
        raise ConversionError(f"verl reads {rows} of the {report.written} rows written for split {report.split}.")
    off = f", lengths off by up to {max(errors)} tokens" if max(errors, default=0) else ""
    return f"messages, images, ground truths; {len(errors)} of them through tokenizer and processor{off}"


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


def _open(reader: type, table: pa.Table, scratch: Path, measure: Measure, split: str):
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
        with contextlib.redirect_stdout(io.StringIO()):  # it announces the length of every slice
            return reader(str(path), measure.tokenizer, config, processor=measure.processor)
    except Exception as error:
        raise ConversionError(f"verl cannot open the file of split {split} ({one_line(error)}).") from error


@contextlib.contextmanager
def _datasets_in(folder: Path) -> Iterator[None]:
    """Has `datasets` keep its copies in a folder, and not draw a progress bar for each."""
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


def _length(row: dict, measure: Measure) -> tuple[int, int]:
    try:
        return measure(row["prompt"], [Image.open(io.BytesIO(image["bytes"])).size for image in row["images"]])
    except Exception as error:
        row_id = row["extra_info"]["id"]
        raise ConversionError(f"row {row_id} does not come back from verl ({one_line(error)}).") from error


def _extremes(stored: list[dict], lengths: list[tuple[int, int]]) -> set[int]:
    """Rows of a slice that are most likely to upset a processor."""
    places = range(len(stored))
    chosen = set()
    for score in (
        lambda place: lengths[place][0],
        lambda place: lengths[place][1],
        lambda place: len(stored[place]["images"]),
    ):
        ordered = sorted(places, key=score)
        chosen |= {ordered[0], *ordered[-2:]}
    return chosen


def _compare(row: dict, stored: dict, digests: bytes) -> None:
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


def _prompt_length(reader: type, row: dict, measure: Measure) -> int:
    """Tokens of a row's prompt after all that verl's agent loop does to it."""
    processor = measure.processor
    patch = getattr(processor.image_processor, "patch_size", 14)
    images, _ = asyncio.run(reader.process_vision_info(row["raw_prompt"], patch, {}))
    text = processor.apply_chat_template(row["raw_prompt"], add_generation_prompt=True, tokenize=False)
    return len(processor(text=[text], images=images)["input_ids"][0])
