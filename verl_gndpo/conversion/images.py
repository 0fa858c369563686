# SPDX-License-Identifier: Apache-2.0
"""Find images in folders and zip archives, check them, and encode them so that verl's two readers agree."""

from __future__ import annotations

import base64
import contextlib
import lzma
import re
import stat
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

import xxhash
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .errors import DroppedRow, SourceError, one_line

MAX_IMAGE_BYTES = 64 * 1024 * 1024
"""Limit for one image file, unpacked."""
MAX_IMAGE_PIXELS = 36_000_000
"""Limit for one image, such as 6000 x 6000. A worker process needs about 10 bytes per pixel to convert it."""
MAX_ASPECT_RATIO = 200
# Sides are rounded to multiples of patch size x merge size before the image processor measures the ratio again:
# 28 for Qwen2-VL and Qwen2.5-VL, 32 for Qwen3-VL.
RESIZE_FACTORS = (28, 32)
# On a scale to 9. Compared with Pillow's default of 6, it writes a tenth more bytes in three quarters of the time.
PNG_LEVEL = 3
# zipfile and its decompressors raise these on a damaged, encrypted or unknown member.
UNREADABLE = (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error, lzma.LZMAError)
# Pillow also has decoders that start other programs or read further files. No data set needs them.
# JPEG includes MPO, and PPM includes PGM and PBM.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+)://", re.IGNORECASE)
DATA_URL = re.compile(r"data:[^,]{0,100},", re.IGNORECASE)
BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+={0,2}\s*")
# A shorter text is taken for a path. No image file is as short.
MIN_BASE64_CHARS = 64
DIGEST_ROWS = 256
DECODED = "image decoded from base64"
# Some sources put an image into another dictionary.
WRAPPERS = ("image", "image_url", "url")


@dataclass(frozen=True)
class Picture:
    """An image in the form that is written: encoded bytes, (width, height), and a digest of its RGB pixels."""

    data: bytes
    size: tuple[int, int]
    digest: bytes


class ImageStore:
    """Read image files by their paths in the source, from folders and zip archives, without unpacking to disk.

    Args:
        roots: zip archives, and folders that relative paths start at. Archives in a folder are searched, too, after
            the files of all folders.
    """

    def __init__(self, roots: list[Path]):
        self.folders = list(dict.fromkeys(root.resolve() for root in roots if root.is_dir()))
        self.archives = [root for root in roots if root.is_file()]
        for folder in self.folders:
            self.archives += [archive for archive in sorted(folder.glob("*.zip")) if _is_within(folder, archive)]
        self._open: dict[Path, zipfile.ZipFile] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}

    def read(self, path: str) -> bytes:
        """Return the bytes of one image file.

        Raises:
            DroppedRow: the path is a URL or leads out of the source, or the file is missing, empty or too large.
        """
        if url := URL.match(path):
            raise DroppedRow(
                "image is a URL", f"{path}: download the images, and give their paths ({url['scheme']} is not read)"
            )
        name = PurePosixPath(path.replace("\\", "/"))
        for folder in self.folders:
            if name.is_relative_to(folder):
                name = name.relative_to(folder)
        if _leads_out(name) or "\0" in path:
            raise DroppedRow("image path leads out of the source", path)
        try:
            data = self._from_folders(name, path)
            if data is None:
                data = self._from_archives(name, path)
        except UNREADABLE as error:
            raise DroppedRow("image file is unreadable", f"{path}: {one_line(error)}") from error
        if data is None:
            raise DroppedRow("image file is missing", path)
        if not data:
            raise DroppedRow("image is empty", path)
        return data

    def _from_folders(self, name: PurePosixPath, path: str) -> bytes | None:
        for folder in self.folders:
            if not (folder / name).is_file():
                continue
            file = (folder / name).resolve()
            if not _is_within(folder, file):
                raise DroppedRow("image path leads out of the source", f"{path} is a link to {file}")
            if file.stat().st_size > MAX_IMAGE_BYTES:
                raise DroppedRow("image is too large", f"{path}: {file.stat().st_size} bytes")
            return file.read_bytes()
        return None

    def _from_archives(self, name: PurePosixPath, path: str) -> bytes | None:
        for archive in self.archives:
            if archive not in self._open:
                self._open[archive] = _opened_archive(archive)
        # For a row's images/1.png, images.zip may hold images/1.png or 1.png. When several archives hold the name, the
        # source does not say which one is meant.
        for inner_name in (lambda stem: name, lambda stem: stem / name, lambda stem: _without_folder(name, stem)):
            found = []
            for archive in self.archives:
                with contextlib.suppress(KeyError):
                    found.append((archive, self._open[archive].getinfo(str(inner_name(PurePosixPath(archive.stem))))))
            if len(found) > 1:
                raise DroppedRow("image path is ambiguous", f"{path} is in {', '.join(a.name for a, _ in found)}")
            if found:
                (archive, member) = found[0]
                with self._open[archive].open(member) as stream:
                    # Limit what is read, because the size in the archive's directory may be false.
                    data = stream.read(MAX_IMAGE_BYTES + 1)
                if len(data) > MAX_IMAGE_BYTES:
                    raise DroppedRow("image is too large", f"{path}: more than {MAX_IMAGE_BYTES} bytes unpacked")
                return data
        return None


def _without_folder(name: PurePosixPath, stem: PurePosixPath) -> PurePosixPath:
    """Return the name without its first folder if that is "images" or the archive's own name, else the name."""
    return PurePosixPath(*name.parts[1:]) if name.parts and name.parts[0] in (str(stem), "images") else name


def _is_within(folder: Path, path: Path) -> bool:
    """Return whether a path, after following links, stays in its folder.

    In the hub's cache each file of a snapshot is a link to a blob beside the snapshots, which is allowed, too.
    """
    path = path.resolve()
    snapshot = next((place for place in (folder, *folder.parents) if place.parent.name == "snapshots"), None)
    return path.is_relative_to(folder) or (snapshot is not None and path.is_relative_to(snapshot.parents[1] / "blobs"))


def _leads_out(name: PurePosixPath) -> bool:
    return name.is_absolute() or ".." in name.parts or (bool(name.parts) and name.parts[0].endswith(":"))


def _opened_archive(archive: Path) -> zipfile.ZipFile:
    """Open a zip archive.

    Raises:
        SourceError: it cannot be read, or holds a link or a name that leads out of it.
    """
    try:
        opened = zipfile.ZipFile(archive)
    except (OSError, zipfile.BadZipFile) as error:
        raise SourceError(f"{archive} is not a readable zip archive ({one_line(error)}).") from error
    for member in opened.infolist():
        if _leads_out(PurePosixPath(member.filename.replace("\\", "/"))):
            raise SourceError(f"{archive} holds {member.filename!r}, a name that leads out of it: it is not read.")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise SourceError(f"{archive} holds {member.filename!r}, a symbolic link: it is not read.")
    return opened


def image_entries(images: object) -> list[object]:
    """Return the entries of a row's image column, which holds none, one, or a list, perhaps of lists.

    `{"image": ...}` and `{"image_url": {"url": ...}}` count as what they hold.
    """
    if images is None or images == "":
        return []
    if isinstance(images, (list, tuple)):
        # None or "" in a list is a fault of the row.
        nested = [image_entries(entry) if isinstance(entry, (list, tuple, dict)) else [entry] for entry in images]
        return [entry for entries in nested for entry in entries]
    if isinstance(images, dict) and not images.get("bytes") and not images.get("path"):
        held = [images[key] for key in WRAPPERS if images.get(key)]
        if len(held) == 1:
            return image_entries(held[0])
    return [images]


def image_bytes(entry: object, store: ImageStore, repairs: list[str]) -> tuple[bytes, str]:
    """Return the bytes of an image entry and its file's name for messages; read the file when the entry has no bytes.

    Args:
        entry: bytes, base64, a data URL, a path, or `{"bytes": ..., "path": ...}`.
        store: files that paths name.
        repairs: receives the kind of each repair.

    Raises:
        DroppedRow: there are no bytes, or the file cannot be used.
    """
    if isinstance(entry, bytes) and entry:
        return entry, ""
    if isinstance(entry, str):
        return _decoded_or_read(entry, store, repairs)
    entry = entry if isinstance(entry, dict) else {}
    data, path = entry.get("bytes") or None, entry.get("path") or ""
    if not isinstance(path, str) or not isinstance(data, bytes | str | None):
        raise DroppedRow("image is neither bytes nor path", f"{type(data).__name__}, {type(path).__name__}")
    if isinstance(data, str):
        if (decoded := _from_base64(data)) is None:
            raise DroppedRow("image does not decode", f"{data[:40]}: text that is not the base64 of an image")
        repairs.append(DECODED)
        return decoded, path
    if data:
        return data, path
    if not path:
        raise DroppedRow("image is empty", "neither bytes nor path")
    found, name = _decoded_or_read(path, store, repairs)
    if name:
        repairs.append("image embedded from its path")
    return found, name


def _decoded_or_read(text: str, store: ImageStore, repairs: list[str]) -> tuple[bytes, str]:
    """Return the bytes that base64 or a data URL holds, and ""; or those of a file in the store, and its path."""
    if decoded := _from_base64(text):
        repairs.append(DECODED)
        return decoded, ""
    return store.read(text), text


def _from_base64(text: str) -> bytes | None:
    """Return the bytes of a data URL or of base64; None for any other text, such as a path.

    Raises:
        DroppedRow: a data URL that is not base64.
    """
    url = DATA_URL.match(text)
    encoded = text[url.end() :] if url else text
    data = None
    if (url or len(text) >= MIN_BASE64_CHARS) and BASE64.fullmatch(encoded):
        encoded = "".join(encoded.split()).rstrip("=").translate(str.maketrans("-_", "+/"))
        with contextlib.suppress(ValueError):
            data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    if url and not data:
        raise DroppedRow("image does not decode", f"{text[:40]}: the data URL is not base64")
    # A long path without a full stop consists of base64's letters, too.
    return data if url or (data and _is_image(data)) else None


def _is_image(data: bytes) -> bool:
    try:
        Image.open(BytesIO(data), formats=FORMATS)
    except Exception:  # Pillow raises anything from struct.error to DecompressionBombError
        return False
    return True


def rgb_picture(data: bytes, name: str, repairs: list[str]) -> Picture:
    """Return the picture: unchanged if it is an opaque, upright RGB PNG or JPEG, otherwise encoded again as RGB PNG.

    verl's two image readers differ on all other images. One puts transparency on white; the other drops the alpha
    channel and shows the colour beneath. One applies the EXIF orientation; the other does not. After conversion they
    agree.

    Raises:
        DroppedRow: the image does not decode, has more than `MAX_IMAGE_PIXELS`, or has a shape or pixel format that
            the vision processors cannot process.
    """
    where = f"{name}: " if name else ""
    image, kind, upright = _decoded(data, where)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise DroppedRow("image has an unsupported pixel format", f"{where}{image.mode}: Pillow clips it to white")
    if kind in ("PNG", "JPEG") and image.mode == "RGB" and upright and not image.has_transparency_data:
        return Picture(data, image.size, pixel_digest(image))
    repair = f"{kind} image of mode {image.mode} to RGB PNG" if upright else "image turned upright"
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        repair = "transparency became white"
        alpha = image.getchannel("A")
        if alpha.getextrema() == (255, 255):
            flat = image.convert("RGB")
        else:
            flat = Image.new("RGB", image.size, "white")
            flat.paste(image, mask=alpha)
    else:
        flat = image.convert("RGB")
    buffer = BytesIO()
    flat.save(buffer, "PNG", compress_level=PNG_LEVEL)
    repairs.append(repair)
    return Picture(buffer.getvalue(), flat.size, pixel_digest(flat))


def _decoded(data: bytes, where: str) -> tuple[Image.Image, str, bool]:
    """Return the image, turned upright; its file format; and whether it was upright before."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(data), formats=FORMATS)
        _check_shape(*image.size, where)
        image.load()
        kind = image.format
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return image if upright else ImageOps.exif_transpose(image), kind or "", upright
    except DroppedRow:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DroppedRow("image is too large", where + one_line(error)) from error
    except UnidentifiedImageError as error:
        raise DroppedRow("image does not decode", f"{where}it is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise anything from struct.error to IndexError on broken bytes
        raise DroppedRow("image does not decode", where + one_line(error)) from error


def pixel_digest(image: Image.Image) -> bytes:
    """Return 16 bytes that depend on the size and RGB pixels only, not on the file format."""
    digest = xxhash.xxh3_128(repr(image.size).encode())
    # In strips, because the bytes of a whole image are as large as the image.
    for top in range(0, image.height, DIGEST_ROWS):
        digest.update(image.crop((0, top, image.width, min(top + DIGEST_ROWS, image.height))).tobytes())
    return digest.digest()


def _check_shape(width: int, height: int, where: str) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise DroppedRow("image is too large", f"{where}{width}x{height} pixels, above {MAX_IMAGE_PIXELS:,}")
    if min(width, height) < 1:
        raise DroppedRow("image does not decode", f"{where}{width}x{height} pixels")
    short, long = sorted((width, height))
    ratios = [long / short] + [max(1, round(long / f)) / max(1, round(short / f)) for f in RESIZE_FACTORS]
    # The processors accept a rounded ratio of exactly 200, and refuse an unrounded one.
    if ratios[0] >= MAX_ASPECT_RATIO or max(ratios) > MAX_ASPECT_RATIO:
        raise DroppedRow(f"aspect ratio is not below {MAX_ASPECT_RATIO}", f"{where}{width}x{height} pixels")
