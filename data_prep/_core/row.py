# SPDX-License-Identifier: Apache-2.0
"""One row: the checks, and verl's schema."""

from __future__ import annotations

import json
import warnings
from io import BytesIO
from pathlib import Path

import pyarrow as pa
from PIL import ExifTags, Image, ImageOps

from .errors import DroppedRow, one_line
from .source import Recipe, SourceRow

IMAGE_PLACEHOLDER = "<image>"
# verl splits a message at these too, and asserts when the row has no such column.
FOREIGN_PLACEHOLDERS = ("<video>", "<audio>")

MAX_ASPECT_RATIO = 200
# Sides are rounded to multiples of patch size x merge size before the image processor measures the ratio again:
# 28 for Qwen2-VL and Qwen2.5-VL, 32 for Qwen3-VL.
RESIZE_FACTORS = (28, 32)

# The Image feature makes `datasets` hand verl decoded pictures, as for files of verl's own recipe. "Sequence" is
# the one spelling of a list that old and new `datasets` both read.
_HF_METADATA = {"info": {"features": {"images": {"feature": {"_type": "Image"}, "_type": "Sequence"}}}}
# One schema for every data set: verl concatenates the files of `data.train_files`, and refuses when they differ.
SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [
                    ("split", pa.string()),
                    ("index", pa.int64()),
                    ("id", pa.string()),
                    ("answer", pa.string()),
                    ("question", pa.string()),
                ]
            ),
        ),
    ],
    metadata={"huggingface": json.dumps(_HF_METADATA)},
)


def image_bytes(entry: object, folder: Path | None) -> bytes:
    """Bytes of an image entry, read from its path when the entry holds none.

    Raises:
        DroppedRow: there are no bytes to be had.
    """
    entry = entry if isinstance(entry, dict) else {}
    if entry.get("bytes"):
        return entry["bytes"]
    path = entry.get("path")
    if not path:
        raise DroppedRow("image is empty", "neither bytes nor path")
    file = Path(path) if folder is None else folder / path
    try:
        data = file.read_bytes() if file.is_file() else None
    except OSError as error:
        raise DroppedRow("image file is missing", one_line(error)) from error
    if data is None:
        raise DroppedRow("image file is missing", str(path))
    if not data:
        raise DroppedRow("image is empty", str(path))
    return data


def rgb_image(data: bytes) -> bytes:
    """`data` itself when it is an opaque, upright RGB PNG or JPEG, otherwise the same picture as RGB PNG.

    verl's two image paths disagree on everything else: one lays transparency on white, the other drops the alpha
    channel and shows whatever colour lies beneath; one obeys EXIF orientation, the other does not. Converted here, they
    agree.

    Raises:
        DroppedRow: the image does not decode, is larger than Pillow allows, or has a shape or pixel format that
            the vision processors cannot take.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(data))
        _check_shape(*image.size)
        image.load()
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise DroppedRow("image has an unsupported pixel format", f"{image.mode}: Pillow would clip it to white")
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if image.format in ("PNG", "JPEG") and image.mode == "RGB" and upright and not image.has_transparency_data:
            return data
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            flat = Image.new("RGB", image.size, "white")
            flat.paste(image, mask=image.getchannel("A"))
        else:
            flat = image.convert("RGB")
        buffer = BytesIO()
        flat.save(buffer, "PNG")
        return buffer.getvalue()
    except DroppedRow:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DroppedRow("image is too large", one_line(error)) from error
    except Exception as error:  # Pillow's decoders raise anything from struct.error to IndexError on broken bytes
        raise DroppedRow("image does not decode", one_line(error)) from error


def _check_shape(width: int, height: int) -> None:
    if min(width, height) < 1:
        raise DroppedRow("image does not decode", f"{width}x{height} pixels")
    short, long = sorted((width, height))
    ratios = [long / short] + [max(1, round(long / f)) / max(1, round(short / f)) for f in RESIZE_FACTORS]
    # The processors accept a rounded ratio of exactly 200.
    if ratios[0] >= MAX_ASPECT_RATIO or max(ratios) > MAX_ASPECT_RATIO:
        raise DroppedRow(f"aspect ratio is not below {MAX_ASPECT_RATIO}", f"{width}x{height} pixels")


def _text(value: object, what: str) -> str:
    if value is None or (isinstance(value, str) and not value.replace(IMAGE_PLACEHOLDER, "").strip()):
        raise DroppedRow(f"no {what}")
    if not isinstance(value, str):
        raise DroppedRow(f"{what} is not text", f"{type(value).__name__} {value!r:.40}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DroppedRow("text is not valid Unicode", one_line(error)) from error
    return value


def verl_row(row: SourceRow, split: str, recipe: Recipe, instruction: str) -> dict:
    """The row in verl's schema (`SCHEMA`), with every image embedded.

    Raises:
        DroppedRow: the row fails a check.
    """
    problem = row.load()
    question = _text(problem.question, "question")
    answer = _text(problem.answer, "answer").strip()
    if foreign := [mark for mark in FOREIGN_PLACEHOLDERS if mark in question]:
        raise DroppedRow("question has a video or audio placeholder", ", ".join(foreign))
    placeholders = question.count(IMAGE_PLACEHOLDER)
    if placeholders != len(problem.images):
        raise DroppedRow(
            "placeholders and images differ in number", f"{placeholders} placeholders, {len(problem.images)} images"
        )
    if not problem.images:
        raise DroppedRow("no image")
    images = [{"bytes": rgb_image(image_bytes(entry, problem.folder)), "path": None} for entry in problem.images]
    return {
        "data_source": recipe.hub_id,
        "prompt": [{"role": "user", "content": f"{question} {instruction}"}],
        "images": images,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"split": split, "index": row.index, "id": row.id, "answer": answer, "question": question},
    }
