# SPDX-License-Identifier: Apache-2.0
"""Read rows of a data file as verl does: decode their images, and measure their prompts in tokens of the student."""

import base64
import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from verl_gndpo.conversion.lengths import Measure
from verl_gndpo.doctor.check import describe_error
from verl_gndpo.doctor.parquet import MEDIA, is_unicode

BATCH_ROWS = 16
PROGRESS_AFTER_S = 2
# verl hands these to qwen_vl_utils, which would fetch them.
REMOTE = ("http://", "https://")
# Images that are programs, which Pillow would hand to Ghostscript.
PROGRAMS = "EPS"
# The factor of verl's resizing, for a student without an image processor; it only decides which shapes are refused.
USUAL_FACTOR = 28


@dataclass
class Reading:
    """Result of reading rows of a file."""

    rows: int = 0
    """Number of rows that were read."""

    total: int = 0
    """Number of rows of the file."""

    unreadable: dict[int, str] = field(default_factory=dict)
    """Why verl can't read a row's images, by the row's number."""

    lengths: dict[int, int] = field(default_factory=dict)
    """Tokens of a row's prompt, by the row's number; without rows that can't be measured."""

    with_media: set[int] = field(default_factory=set)
    """Numbers of the rows with images or videos."""

    unmeasured: str = ""
    """Why a prompt can't be measured; "" if each can."""

    @property
    def extent(self) -> str:
        """Return how many rows were read, in words."""
        return f"all {self.total} rows" if self.rows == self.total else f"{self.rows} of {self.total} rows, a sample"


def read_rows(path: Path, data: Any, measure: Measure | None, seconds: float) -> Reading:
    """Decode the images of a file's rows and measure their prompts, for a limited time.

    The row groups are read in an order that is spread over the file, so that what was read in time is a sample of it.

    Args:
        path: parquet file.
        data: verl's `data` section, which names the columns.
        measure: tokenizer and processor of the student; None measures nothing.
        seconds: time limit.

    Raises:
        pa.ArrowException, OSError: the file can't be read.
    """
    end = time.monotonic() + seconds
    with pq.ParquetFile(path, pre_buffer=False) as file:
        names = {kind: data.get(f"{kind}_key", default) for kind, default in COLUMNS.items()}
        columns = {kind: name for kind, name in names.items() if name in file.schema_arrow.names}
        declared = _are_declared(file.schema_arrow.metadata, columns.get("image", ""))
        groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = np.cumsum([0, *groups])
        reading = Reading(total=int(starts[-1]))
        workers = min(os.cpu_count() or 1, 8)
        with (
            ThreadPoolExecutor(workers) as threads,
            tqdm(total=reading.total, desc=f"decoding {path.name}", unit="row", delay=PROGRESS_AFTER_S) as progress,
        ):
            for group in spread(len(groups)):
                row = int(starts[group])
                # All columns, because verl asks for all of a row.
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group]):
                    rows = _rows(batch, columns)
                    for found in threads.map(lambda row: _read_row(row, declared, measure), rows):
                        _note(reading, row, found)
                        row += 1
                    progress.update(len(rows))
                    if time.monotonic() > end:
                        return reading
    return reading


COLUMNS = {"prompt": "prompt", "image": "images", "video": "videos"}
"""verl's default for each of `data.prompt_key`, `data.image_key` and `data.video_key`."""


def spread(count: int) -> Iterator[int]:
    """Yield the numbers below `count` in an order of which each beginning is spread evenly: 0, the middle, ..."""
    bits = max(count - 1, 0).bit_length()
    for number in range(1 << bits):
        place = int(f"{number:0{bits}b}"[::-1], 2) if bits else 0
        if place < count:
            yield place


@dataclass
class _Row:
    """What was found in one row: why it can't be read, or its length, or why that is unknown."""

    media: bool = False
    unreadable: str = ""
    tokens: int | None = None
    unmeasured: str = ""


def _note(reading: Reading, row: int, found: _Row) -> None:
    reading.rows += 1
    if found.media:
        reading.with_media.add(row)
    if found.unreadable:
        reading.unreadable[row] = found.unreadable
    elif found.tokens is not None:
        reading.lengths[row] = found.tokens
    reading.unmeasured = reading.unmeasured or found.unmeasured


def _rows(batch: pa.RecordBatch, columns: Mapping[str, str]) -> list[dict[str, Any] | str]:
    """Return for each row its values by kind, as `columns` names them; or why it can't be decoded."""
    try:
        return [{kind: row[name] for kind, name in columns.items()} for row in batch.to_pylist()]
    except UnicodeDecodeError:
        rows: list[dict[str, Any] | str] = []
        for place in range(len(batch)):
            broken = [name for name in batch.schema.names if not is_unicode(batch[name][place])]
            if broken:
                rows.append(f"column {broken[0]} holds text that is not valid UTF-8")
            else:
                rows.append({kind: batch[name][place].as_py() for kind, name in columns.items()})
        return rows


def _read_row(row: Mapping[str, Any] | str, declared: bool, measure: Measure | None) -> _Row:
    if isinstance(row, str):
        return _Row(unreadable=row)
    images, videos = row.get("image") or [], row.get("video") or []
    result = _Row(media=bool(images or videos))
    sizes = []
    for place, image in enumerate(images):
        try:
            sizes.append(_size(image, declared, measure))
        except Exception as error:  # Pillow's decoders raise anything from struct.error to IndexError on broken bytes
            result.unreadable = f"image {place}: {describe_error(error)}"
            return result
    for place, video in enumerate(videos):
        path = video.get("video") if isinstance(video, dict) else video
        if isinstance(path, str) and not path.startswith(REMOTE) and not _is_file(path):
            result.unreadable = f"video {place}: {path} does not exist"
            return result
    if measure is None or not row.get("prompt"):
        return result
    for token in _media_tokens(measure.processor):
        if any(isinstance(message["content"], str) and token in message["content"] for message in row["prompt"]):
            result.unreadable = f"its prompt holds {token}, which the student's processor takes for an image or a video"
            return result
    known = [size for size in sizes if size is not None]
    if videos or len(known) < len(sizes) or not all(isinstance(message["content"], str) for message in row["prompt"]):
        result.unmeasured = "videos, images behind URLs and structured messages are not measured"
        return result
    if known and not hasattr(measure.processor, "_get_num_multimodal_tokens"):
        result.unmeasured = "the student's processor can't say how many tokens an image takes"
        return result
    try:
        result.tokens, _ = measure(row["prompt"], known)
    except Exception as error:  # whatever a chat template or a processor raises
        result.unmeasured = describe_error(error)
    return result


def _media_tokens(processor: Any) -> list[str]:
    """Return the texts at which a processor puts images and videos. None of them is verl's own <image> or <video>."""
    tokens = [getattr(processor, f"{kind}_token", None) for kind in ("image", "video")]
    return [token for token in tokens if isinstance(token, str) and token and token not in MEDIA]


def _size(image: Any, declared: bool, measure: Measure | None) -> tuple[int, int] | None:
    """Decode an image as verl does, and return its (width, height); None for one that a run would fetch from a URL.

    Args:
        image: an entry of the image column.
        declared: True if the file's metadata declares the column as images, so that `datasets` decodes them.
        measure: as for `read_rows`.

    Raises:
        Exception: verl would not get a picture from the entry, or its resizing refuses the shape.
    """
    source = _source(image, declared)
    if not source:
        raise ValueError("neither bytes nor path")
    if isinstance(source, str):
        if source.startswith(REMOTE):
            return None
        if source.startswith("data:image"):
            source = base64.b64decode(source.partition("base64,")[2])
        elif not _is_file(source):
            raise ValueError(f"there is no file {source}")
    try:
        picture = Image.open(BytesIO(source) if isinstance(source, bytes) else _local(source))
    except UnidentifiedImageError:
        raise ValueError("it is no image, or of a format that Pillow does not know") from None
    with picture:
        if picture.format == PROGRAMS:
            raise ValueError("it is PostScript, which Ghostscript would run: convert it to PNG")
        picture.load()
        width, height = picture.size
    _check_shape(width, height, measure)
    return width, height


def _source(image: Any, declared: bool) -> bytes | str | None:
    """Return the bytes, the path or the URL from which verl gets an image; None if there is neither.

    Args:
        image, declared: as for `_size`.

    Raises:
        ValueError: verl does not take the entry.
    """
    source = image
    if isinstance(image, dict):
        if declared:
            source = image.get("bytes") or image.get("path")
        elif "bytes" in image:
            source = image["bytes"]
            if not source and image.get("path"):
                raise ValueError(f"no bytes, and verl does not read the path {image['path']}")
            if isinstance(source, str):
                raise ValueError("its bytes are text")
        else:
            source = image.get("image") or image.get("image_url")
    elif isinstance(image, bytes) and not declared:
        raise ValueError("it is bytes alone, where verl needs {bytes, path}")
    if source is not None and not isinstance(source, bytes | str):
        raise ValueError(f"{type(source).__name__} is neither bytes nor path")
    return source


def _local(path: str) -> str:
    return path.removeprefix("file://")


def _is_file(path: str) -> bool:
    # A pipe or a device would never end.
    return Path(_local(path)).is_file()


def _check_shape(width: int, height: int, measure: Measure | None) -> None:
    """Raise ValueError if verl's resizing refuses the shape."""
    if measure is not None and measure.processor is not None:
        measure.resized(width, height)
        return
    from qwen_vl_utils import vision_process

    vision_process.smart_resize(height, width, factor=USUAL_FACTOR)


def _are_declared(metadata: Mapping[bytes, bytes] | None, column: str) -> bool:
    """Return whether the metadata that `datasets` reads declares a column as images."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return "'Image'" in str(features[column])
    except (KeyError, TypeError, ValueError):
        return False
