# SPDX-License-Identifier: Apache-2.0
"""Write a video as images of its frames, because verl 0.9.1 trains on wrong positions of a video's tokens."""

from __future__ import annotations

import itertools
import re
from io import BytesIO

from .errors import DroppedRow, one_line
from .images import MAX_IMAGE_PIXELS, PNG_LEVEL, ImageStore, image_bytes
from .text import IMAGE_PLACEHOLDER, NUMBERED_PLACEHOLDER

VIDEO_PLACEHOLDER = "<video>"
# Each is named to FFmpeg, which would also follow playlists to other files and to URLs.
SIGNATURES = (
    (re.compile(rb"....ftyp", re.DOTALL), "mp4"),
    (re.compile(rb"\x1a\x45\xdf\xa3"), "matroska"),
    (re.compile(rb"RIFF....AVI ", re.DOTALL), "avi"),
)


def place_frames(
    question: str, images: list[object], videos: list[object], count: int, store: ImageStore
) -> tuple[str, list[object]]:
    """Replace each `<video>` of a question with one `<image>` for each of `count` frames.

    Videos without a placeholder go before the question.

    Args:
        question: question, with an `<image>` for each image.
        images: images of the row.
        videos: videos of the row; each is bytes, a path in the source, or `{"bytes": ..., "path": ...}`.
        count: frames of a video, spread evenly over it; a shorter video gives all of its frames.
        store: files that paths name.

    Returns:
        The question, and images and frames in the order of their placeholders.

    Raises:
        DroppedRow: placeholders and images or videos differ in number, or a video can't be decoded.
    """
    found = question.count(VIDEO_PLACEHOLDER)
    if found > len(videos):
        raise DroppedRow("placeholders and videos differ in number", f"{found} placeholders, {len(videos)} videos")
    question = VIDEO_PLACEHOLDER * (len(videos) - found) + question
    if NUMBERED_PLACEHOLDER.search(question) or question.count(IMAGE_PLACEHOLDER) != len(images):
        raise DroppedRow("placeholders and images differ in number", "a row with videos needs one <image> per image")
    parts, entries = [], []
    left_images, left_videos = iter(images), iter(videos)
    for part in re.split(f"({IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER})", question):
        if part == IMAGE_PLACEHOLDER:
            entries.append(next(left_images))
        elif part == VIDEO_PLACEHOLDER:
            frames = video_frames(*_video_bytes(next(left_videos), store), count)
            entries += frames
            part = IMAGE_PLACEHOLDER * len(frames)
        parts.append(part)
    return "".join(parts), entries


def _video_bytes(video: object, store: ImageStore) -> tuple[bytes, str]:
    """Return the bytes of a video and its file's name. verl's own form, `{"video": ...}`, counts as what it holds."""
    try:
        return image_bytes(video["video"] if isinstance(video, dict) and "video" in video else video, store, [])
    except DroppedRow as error:
        raise DroppedRow(error.reason.replace("image", "video"), error.detail) from error


def video_frames(data: bytes, name: str, count: int) -> list[bytes]:
    """Return frames of a video as PNG files: the first, the last and those between them at equal distances.

    Args:
        data: the video file.
        name: its name for messages; "" if it has none.
        count: number of frames, at least 1; a shorter video gives all of its frames.

    Raises:
        DroppedRow: it is neither MP4, Matroska (WebM) nor AVI, doesn't decode, is rotated or too large.
    """
    # Few sets have videos, so that few workers need FFmpeg's memory.
    import av

    where = f"{name}: " if name else ""
    kind = next((kind for signature, kind in SIGNATURES if signature.match(data)), None)
    if kind is None:
        raise DroppedRow("video does not decode", f"{where}it is none of MP4, Matroska, WebM and AVI")
    try:
        with av.open(BytesIO(data), format=kind) as container:
            # A clip that was cut without encoding it again holds frames that players skip.
            total = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(video=0))
        count = min(count, total)
        wanted = {round(place * (total - 1) / max(count - 1, 1)) for place in range(count)}
        with av.open(BytesIO(data), format=kind) as container:
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_IMAGE_PIXELS:
                raise DroppedRow("video is too large", f"{where}{stream.width}x{stream.height} pixels")
            frames = []
            for number, frame in enumerate(itertools.islice(container.decode(stream), max(wanted, default=-1) + 1)):
                if getattr(frame, "rotation", 0):
                    raise DroppedRow("video is rotated", f"{where}by {frame.rotation} degrees; encode it upright")
                if number in wanted:
                    buffer = BytesIO()
                    frame.to_image().save(buffer, "PNG", compress_level=PNG_LEVEL)
                    frames.append(buffer.getvalue())
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise DroppedRow("video does not decode", where + one_line(error)) from error
    if not frames or len(frames) < len(wanted):
        raise DroppedRow("video does not decode", f"{where}{len(frames)} of {len(wanted)} frames")
    return frames
