# SPDX-License-Identifier: Apache-2.0
"""Videos are written as images of their frames, which verl reads back as any other images."""

from dataclasses import replace
from io import BytesIO

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep import mmk12
from tests.data_files import picture, write_rows
from verl_gndpo import conversion
from verl_gndpo.conversion import DroppedRow, Problem
from verl_gndpo.conversion.images import ImageStore
from verl_gndpo.conversion.videos import place_frames, video_frames

needs_h264 = pytest.mark.skipif("libx264" not in av.codecs_available, reason="FFmpeg without an H.264 encoder")


def video(frames: int, *, container="mp4", size=(64, 48), codec="mpeg4", cut=0) -> bytes:
    """Encode a video whose frame k is grey, 10 k + 5 bright. Players skip the first `cut` frames."""
    buffer = BytesIO()
    with av.open(buffer, "w", format=container, options={"avoid_negative_ts": "disabled"}) as output:
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        images = (np.full((size[1], size[0], 3), 10 * number + 5, np.uint8) for number in range(frames))
        shown = [av.VideoFrame.from_ndarray(pixels, format="rgb24") for pixels in images]
        for packet in [packet for frame in (*shown, None) for packet in stream.encode(frame)]:
            start = round(cut / 10 / packet.time_base)
            packet.pts, packet.dts = packet.pts - start, packet.dts - start
            output.mux(packet)
    return buffer.getvalue()


def numbers_of(frames: list[bytes]) -> list[int]:
    """Return which frame of `video` each picture shows, by its brightness."""
    return [round((np.asarray(Image.open(BytesIO(frame))).mean() - 5) / 10) for frame in frames]


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "mpeg4"),
        ("matroska", "mpeg4"),
        ("avi", "mpeg4"),
        # Its frames are stored in another order than they are shown in.
        pytest.param("mp4", "libx264", marks=needs_h264),
        pytest.param("matroska", "libx264", marks=needs_h264),
    ],
)
@pytest.mark.parametrize(
    ("length", "count", "shown"), [(21, 5, [0, 5, 10, 15, 20]), (21, 1, [0]), (3, 8, [0, 1, 2]), (1, 8, [0])]
)
def test_frames_are_spread_evenly(container, codec, length, count, shown):
    frames = video_frames(video(length, container=container, codec=codec), "", count)
    assert numbers_of(frames) == shown
    assert {Image.open(BytesIO(frame)).size for frame in frames} == {(64, 48)}


@needs_h264
def test_a_clip_that_was_cut_without_encoding_it_again():
    assert numbers_of(video_frames(video(21, codec="libx264", cut=5), "", 4)) == [5, 10, 15, 20]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"not a video", "none of MP4"),
        (picture(), "none of MP4"),
        # FFmpeg would open the file that a playlist names.
        (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "none of MP4"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "none of MP4"),
        (video(5)[:200], "clip.mp4: "),
        (b"\x00\x00\x00\x18ftypmp42" + b"\x00" * 50, "clip.mp4: "),
    ],
)
def test_what_is_no_video_is_dropped_with_the_reason(data, words):
    with pytest.raises(DroppedRow) as dropped:
        video_frames(data, "clip.mp4", 4)
    assert dropped.value.reason == "video does not decode" and words in dropped.value.detail


def test_frames_stand_where_their_video_stood():
    clip, image = video(3), picture(9)
    text, entries = place_frames(
        "First <image>, then <video>?", [image], [{"video": {"bytes": clip}}], 3, ImageStore([])
    )
    assert text == "First <image>, then <image><image><image>?"
    assert entries[0] == image and numbers_of(entries[1:]) == [0, 1, 2]
    text, entries = place_frames("Then?", [], [clip, clip], 2, ImageStore([]))
    assert text == "<image>" * 4 + "Then?" and numbers_of(entries) == [0, 2] * 2


@pytest.mark.parametrize(
    ("question", "images", "videos", "reason"),
    [
        ("<video><video>", 0, 1, "placeholders and videos differ"),
        ("<video>", 1, 1, "placeholders and images differ"),
        ("<image1> <video>", 1, 1, "placeholders and images differ"),
    ],
)
def test_placeholders_without_their_medium_are_dropped(question, images, videos, reason):
    with pytest.raises(DroppedRow, match=reason):
        place_frames(question, [picture()] * images, [video(2)] * videos, 2, ImageStore([]))


def test_missing_video_file_is_named(tmp_path):
    with pytest.raises(DroppedRow) as dropped:
        place_frames("<video>", [], ["no.mp4"], 2, ImageStore([tmp_path]))
    assert (dropped.value.reason, dropped.value.detail) == ("video file is missing", "no.mp4")


def test_a_recipe_with_videos_is_read_back_through_verl(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "clip.mp4").write_bytes(video(9))
    row = {"id": "a", "question": "<video>How many?", "answer": "3", "subject": "", "image": "clip.mp4"}
    write_rows(tmp_path / "source" / "train.parquet", [row, row | {"id": "b", "question": "<video>Why <video>?"}])
    recipe = replace(
        mmk12.RECIPE,
        problem=lambda row: Problem(row["question"], row["answer"], None, videos=row["image"]),
        video_frames=3,
    )
    (report,) = conversion.convert(str(tmp_path / "source"), tmp_path / "out", recipe, max_dropped=1.0, preview=2)
    assert report.repaired_by.rows == {"video as images of its frames": 1}
    assert report.reasons == {"placeholders and videos differ in number": 1}
    (written,) = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert written["prompt"][0]["content"].startswith("<image><image><image>How many?")
    assert numbers_of([image["bytes"] for image in written["images"]]) == [0, 4, 8]
    assert (tmp_path / "out" / "preview.html").read_text().count("<img ") == 3


def test_a_recipe_without_frames_is_refused():
    with pytest.raises(ValueError, match="video_frames is 0"):
        replace(mmk12.RECIPE, video_frames=0)
