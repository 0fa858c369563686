# SPDX-License-Identifier: Apache-2.0
"""Reading what was written back through verl's own reader."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from .errors import ConversionError, one_line
from .row import IMAGE_PLACEHOLDER
from .source import READ_BATCH_ROWS
from .write import Report


class _NoProcessor:
    """Stands in for a model's processor: verl's message building asks only that there is one."""


@contextlib.contextmanager
def _datasets_cache(folder: Path) -> Iterator[None]:
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before


def import_reader() -> tuple[type | None, str]:
    """verl's RLHFDataset; or None, and why it cannot be had here."""
    try:
        from verl.utils.dataset.rl_dataset import RLHFDataset
    except Exception as error:  # not only ImportError: a torchvision that does not fit torch raises RuntimeError
        return None, one_line(error)
    return RLHFDataset, ""


def verify(reader: type, path: Path, report: Report, cache: Path, model: str | None = None) -> str:
    """Reads every row of `path` back through verl's RLHFDataset.

    Always checked: the number of rows, and for each row its id, its ground truth, its message with the images in place,
    and every image's pixels against the stored bytes. Where qwen_vl_utils is installed, each image also passes the
    resizing that verl's agent loop applies. With `model`, verl's own prompt filter runs chat template, tokenizer and
    image processor over each row (it drops a row that raises).

    Args:
        reader: RLHFDataset.
        path: file to read.
        report: what was written into it.
        cache: folder for the copies that `datasets` makes; the caller deletes it.
        model: path or hub id of a model whose tokenizer and processor are used.

    Returns:
        What was checked, in words.

    Raises:
        ConversionError: the model cannot be loaded, or a row does not come back as it was written.
    """
    from omegaconf import OmegaConf

    tokenizer, processor = (None, _NoProcessor()) if model is None else _load_model(model)
    config = OmegaConf.create(
        {
            "cache_dir": str(cache),
            "filter_overlong_prompts": model is not None,
            "filter_overlong_prompts_workers": None,
            "max_prompt_length": sys.maxsize,
        }
    )
    resize = importlib.util.find_spec("qwen_vl_utils") is not None
    with _datasets_cache(cache):
        try:
            dataset = reader(str(path), tokenizer, config, processor=processor)
        except Exception as error:
            raise ConversionError(f"verl cannot open the file of split {report.split} ({one_line(error)}).") from error
        if len(dataset) != report.written:
            raise ConversionError(
                f"verl reads {len(dataset)} of the {report.written} rows written for split {report.split}."
            )
        stored_rows = tqdm(_stored_rows(path), total=report.written, desc=f"{report.split}: reading back", unit="row")
        for index, stored in enumerate(stored_rows):
            try:
                row = dataset[index]
                _compare(row, stored)
                if resize:
                    asyncio.run(reader.process_vision_info(row["raw_prompt"], dataset.image_patch_size, config))
            except Exception as error:
                row_id = stored["extra_info"]["id"]
                raise ConversionError(f"row {row_id} does not come back from verl ({one_line(error)}).") from error
    return ", ".join(
        [
            "messages, images, ground truths",
            "resizing" if resize else "not resizing: qwen_vl_utils is not installed",
            f"tokenizer and processor of {model}" if model is not None else "not tokenized: no --model",
        ]
    )


def _load_model(model: str) -> tuple:
    from verl.utils import hf_processor, hf_tokenizer

    try:
        tokenizer, processor = hf_tokenizer(model), hf_processor(model)
    except Exception as error:
        raise ConversionError(f"--model {model} cannot be loaded ({one_line(error)}).") from error
    if processor is None:
        raise ConversionError(f"--model {model} has no processor that verl can load, so it cannot read images.")
    return tokenizer, processor


def _stored_rows(path: Path) -> Iterator[dict]:
    for batch in pq.ParquetFile(path, pre_buffer=False).iter_batches(batch_size=READ_BATCH_ROWS):
        yield from batch.to_pylist()


def _compare(row: dict, stored: dict) -> None:
    for key in ("data_source", "reward_model", "extra_info"):
        if row[key] != stored[key]:
            raise ValueError(f"{key} is {row[key]!r}, stored was {stored[key]!r}")
    (message,) = row["raw_prompt"]
    parts = message["content"]
    text = "".join(IMAGE_PLACEHOLDER if part["type"] == "image" else part["text"] for part in parts)
    if text != stored["prompt"][0]["content"]:
        raise ValueError(f"the message reads {text!r}")
    pictures = [part["image"] for part in parts if part["type"] == "image"]
    for position, (picture, entry) in enumerate(zip(pictures, stored["images"], strict=True)):
        original = Image.open(BytesIO(entry["bytes"]))
        if (picture.mode, picture.size) != ("RGB", original.size) or picture.tobytes() != original.tobytes():
            raise ValueError(f"image {position} has other pixels")
