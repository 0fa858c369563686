# SPDX-License-Identifier: Apache-2.0
"""The core that all converters share: sources, archives, options, repairs, and runs that are cut short."""

import base64
import json
import os
import signal
import stat
import subprocess
import sys
import time
import warnings
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import mmk12
from tests.data_files import ROOT, picture, run_here, write_rows
from verl_gndpo import conversion
from verl_gndpo.conversion import ConversionError, Problem, SourceError
from verl_gndpo.conversion import images as images_module
from verl_gndpo.conversion.errors import DroppedRow
from verl_gndpo.conversion.images import ImageStore, image_bytes, image_entries
from verl_gndpo.conversion.lengths import load_measure
from verl_gndpo.conversion.pipeline import staging
from verl_gndpo.conversion.prompt import load_prompt
from verl_gndpo.conversion.report import OVERLONG, Report
from verl_gndpo.conversion.row import UNMATCHABLE
from verl_gndpo.conversion.text import place_images, plain_answer, plain_choices, split_choices, typed_answer


def record(number: int, **changes) -> dict:
    return {
        "id": f"r{number}",
        "question": f"How long is side {number}?",
        "answer": str(number),
        "subject": "math",
        "image": {"bytes": picture(number), "path": None},
    } | changes


def convert(source: Path, out: Path, **options) -> list[Report]:
    return conversion.convert(str(source), out, mmk12.RECIPE, **{"skip_verify": True, "max_dropped": 1.0} | options)


def rows_of(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def ids_of(path: Path) -> list[str]:
    return [row["extra_info"]["id"] for row in rows_of(path)]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# JSON sources, with images in a folder or an archive


def by_path(number: int) -> dict:
    return record(number, image=f"images/{number}.png")


def write_records(folder: Path, kind: str, records: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("train.jsonl" if kind == "lines" else "train.json")
    if kind == "lines":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in records))
    elif kind == "list":
        path.write_text(json.dumps(records))
    else:
        path.write_text(json.dumps({row.pop("id"): row for row in map(dict, records)}))
    return path


def put_images(folder: Path, place: str, count: int) -> None:
    if place == "folder":
        (folder / "images").mkdir()
        for number in range(count):
            (folder / "images" / f"{number}.png").write_bytes(picture(number))
        return
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number in range(count):
            archive.writestr(f"images/{number}.png" if place == "zip" else f"{number}.png", picture(number))


@pytest.mark.parametrize("kind", ["lines", "list", "by id"])
@pytest.mark.parametrize("place", ["folder", "zip", "flat zip"])
@pytest.mark.parametrize("whole_folder", [True, False])
def test_json_with_images_beside_it(kind, place, whole_folder, tmp_path):
    source = write_records(tmp_path / "source", kind, [by_path(number) for number in range(3)])
    put_images(tmp_path / "source", place, 3)
    convert(tmp_path / "source" if whole_folder else source, tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "train.parquet")
    assert [row["images"][0]["bytes"] for row in rows] == [picture(number) for number in range(3)]
    assert [row["extra_info"]["id"] for row in rows] == [f"mmk12-train-r{number}" for number in range(3)]


@pytest.mark.parametrize("place", ["folder", "zip"])
def test_images_that_lie_elsewhere_are_found_with_image_path(place, tmp_path):
    source = write_records(tmp_path / "source", "lines", [by_path(0)])
    (tmp_path / "elsewhere").mkdir()
    put_images(tmp_path / "elsewhere", place, 1)
    where = tmp_path / "elsewhere" / ("images.zip" if place == "zip" else "")
    (report,) = convert(source, tmp_path / "out", image_path=where)
    assert (report.written, report.reasons) == (1, {})
    with pytest.raises(SourceError, match=r"--image_path .* does not exist"):
        convert(source, tmp_path / "out", image_path=tmp_path / "nowhere")


def test_a_hub_clone_with_its_images_at_the_top(tmp_path):
    write_records(tmp_path / "clone" / "data", "lines", [by_path(0)])
    put_images(tmp_path / "clone", "folder", 1)
    (report,) = convert(tmp_path / "clone", tmp_path / "out")
    assert report.written == 1


def test_broken_lines_of_json_are_dropped_and_named(tmp_path):
    source = write_records(tmp_path, "lines", [by_path(0)])
    put_images(tmp_path, "folder", 1)
    short = {key: value for key, value in by_path(0).items() if key != "subject"}
    with source.open("a") as stream:
        stream.write('{"id": \n[1, 2]\n' + json.dumps(short) + "\n")
    (report,) = convert(source, tmp_path / "out")
    assert (report.read, report.written) == (4, 1)
    assert report.reasons == {"record is unreadable": 2, "record lacks a column": 1}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train.json", "{", "is not a readable .json file"),
        ("train.json", '"text"', "holds a str, not a list of records"),
        ("train.jsonl", "", "has no rows"),
        ("train.csv", "id,question\n", "none of .parquet, .jsonl, .json"),
    ],
)
def test_an_unreadable_json_source_is_refused(name, content, says, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=says):
        convert(tmp_path / name, tmp_path / "out")


# What must not be read


def write_zip(path: Path, members: dict[str, bytes], link: str | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        if link:
            info = zipfile.ZipInfo(link)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, "/etc/hostname")
    return path


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "a/../../evil.png", "..\\evil.png", "C:\\evil.png"])
def test_an_archive_with_a_name_that_leads_out_is_refused(name, tmp_path):
    source = write_records(tmp_path, "lines", [by_path(0)])
    write_zip(tmp_path / "images.zip", {"images/0.png": picture(), name: picture()})
    with pytest.raises(SourceError, match=r"images\.zip holds .*evil\.png.*leads out of it"):
        convert(source, tmp_path / "out")


def test_an_archive_with_a_symbolic_link_is_refused(tmp_path):
    source = write_records(tmp_path, "lines", [by_path(0)])
    write_zip(tmp_path / "images.zip", {"images/0.png": picture()}, link="images/link.png")
    with pytest.raises(SourceError, match=r"images\.zip holds 'images/link\.png', a symbolic link"):
        convert(source, tmp_path / "out")


def test_an_archive_that_is_none_is_refused(tmp_path):
    source = write_records(tmp_path, "lines", [by_path(0)])
    (tmp_path / "images.zip").write_bytes(b"PK no archive")
    with pytest.raises(SourceError, match=r"images\.zip is not a readable zip archive"):
        convert(source, tmp_path / "out")


def test_of_several_archives_the_one_that_is_named_is_read(tmp_path):
    write_zip(tmp_path / "train.zip", {"1.png": picture(0)})
    write_zip(tmp_path / "test.zip", {"1.png": picture(1)})
    write_zip(tmp_path / "more.zip", {"1.png": picture(2), "only.png": picture(9)})
    images = ImageStore([tmp_path])
    assert images.read("train/1.png") == picture(0) and images.read("test/1.png") == picture(1)
    assert images.read("only.png") == images.read("images/only.png") == picture(9)
    for path, reason in (("1.png", "ambiguous"), ("images/1.png", "ambiguous"), ("val/1.png", "missing")):
        with pytest.raises(DroppedRow, match=reason):
            images.read(path)


def test_an_archive_that_is_a_link_out_of_the_folder_is_not_read(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "images.zip").symlink_to(write_zip(tmp_path / "secret.zip", {"1.png": picture()}))
    with pytest.raises(DroppedRow, match="missing"):
        ImageStore([tmp_path / "source"]).read("1.png")


def test_a_member_that_unpacks_to_more_than_an_image_may_have_is_dropped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images_module, "MAX_IMAGE_BYTES", 1 << 20)
    source = write_records(tmp_path, "lines", [by_path(0), by_path(1)])
    write_zip(tmp_path / "images.zip", {"images/0.png": b"\0" * (8 << 20), "images/1.png": picture(1)})
    assert (tmp_path / "images.zip").stat().st_size < 1 << 20
    (report,) = convert(source, tmp_path / "out")
    assert (report.written, report.reasons) == (1, {"image is too large": 1})
    assert "images/0.png" in capsys.readouterr().err


def test_a_broken_member_is_dropped(tmp_path):
    source = write_records(tmp_path, "lines", [by_path(0), by_path(1)])
    archive = write_zip(tmp_path / "images.zip", {f"images/{number}.png": os.urandom(3000) for number in range(2)})
    data = bytearray(archive.read_bytes())
    data[200:260] = b"\xff" * 60
    archive.write_bytes(data)
    with pytest.raises(ConversionError, match="all 2 rows dropped"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../secret.png", "image path leads out of the source"),
        ("images/../../secret.png", "image path leads out of the source"),
        ("{outside}/secret.png", "image path leads out of the source"),
        ("images/link.png", "image path leads out of the source"),
        ("images/none.png", "image file is missing"),
        ("images", "image file is missing"),
        ("images/text.png", "image does not decode"),
        ("images/bomb.png", "image is too large"),
        ("images/nul\0.png", "image path leads out of the source"),
        ("x" * 5000, "image file is unreadable"),
    ],
)
def test_a_file_that_is_no_image_of_the_source_is_dropped_by_name(path, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    (tmp_path / "secret.png").write_bytes(picture())
    path = path.replace("{outside}", str(tmp_path))
    folder = tmp_path / "source"
    source = write_records(folder, "lines", [by_path(0), record(1, image=path)])
    put_images(folder, "folder", 1)
    (folder / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "images" / "text.png").write_text("no image")
    (folder / "images" / "bomb.png").write_bytes(picture(size=(200, 100)))
    (report,) = convert(source, tmp_path / "out")
    assert (report.written, report.reasons) == (1, {reason: 1})
    assert path[:200] in capsys.readouterr().err.replace("\\x00", "\0")


def test_links_inside_the_source_and_in_the_hubs_cache_are_followed(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture())
    (folder / "b.png").symlink_to("a.png")
    assert ImageStore([folder]).read("b.png") == picture()
    snapshot = tmp_path / "hub" / "snapshots" / "main"
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "blobs" / "abc").write_bytes(picture(1))
    (snapshot / "a.png").symlink_to(tmp_path / "hub" / "blobs" / "abc")
    assert ImageStore([snapshot]).read("a.png") == picture(1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PPM", {}),
        ("PPM", {"mode": "L"}),
        ("PPM", {"mode": "1"}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("MPO", {"save_all": True, "append_images": [Image.new("RGB", (40, 30))]}),
    ],
)
def test_every_format_that_is_listed_is_read(kind, options, tmp_path):
    data = picture(1, kind=kind, **options)
    source = write_rows(tmp_path / "train.parquet", [record(1, image={"bytes": data, "path": None})])
    (report,) = convert(source, tmp_path / "out")
    assert (report.written, report.repaired) == (1, 1)
    (row,) = rows_of(tmp_path / "out" / "train.parquet")
    assert Image.open(BytesIO(row["images"][0]["bytes"])).format == "PNG"


@pytest.mark.parametrize(
    "data",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        picture(kind="AVIF"),
        picture(kind="JPEG2000"),
        picture(kind="ICO"),
        b"%PDF-1.4",
    ],
    ids=["svg", "avif", "jp2", "ico", "pdf"],
)
def test_a_file_of_another_format_is_dropped_with_those_that_are_read(data, tmp_path, capsys):
    (tmp_path / "a.image").write_bytes(data)
    source = write_records(tmp_path, "lines", [record(0, image="a.image"), record(1, image="b.png")])
    (tmp_path / "b.png").write_bytes(picture())
    (report,) = convert(source, tmp_path / "out")
    assert (report.written, report.reasons) == (1, {"image does not decode": 1})
    assert "a.image: it is none of PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM" in capsys.readouterr().err


def base64_of(data: bytes, wrapped: bool = False) -> str:
    return (base64.encodebytes if wrapped else base64.b64encode)(data).decode()


@pytest.mark.parametrize(
    "entry",
    [
        base64_of(picture(5)),
        base64_of(picture(5), wrapped=True),
        base64.urlsafe_b64encode(picture(5)).decode().rstrip("="),
        f"data:image/png;base64,{base64_of(picture(5))}",
        {"bytes": base64_of(picture(5)), "path": None},
        {"bytes": base64_of(picture(5)), "path": "a.png"},
        {"path": f"data:image/png;base64,{base64_of(picture(5))}"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_of(picture(5))}"}},
    ],
)
def test_a_base64_image_is_decoded(entry, tmp_path):
    (report,) = convert(write_records(tmp_path, "lines", [record(0, image=entry)]), tmp_path / "out")
    assert report.repaired_by.rows == {"image decoded from base64": 1}
    (row,) = rows_of(tmp_path / "out" / "train.parquet")
    assert row["images"][0]["bytes"] == picture(5)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("A" * 4_000_000, "image file is unreadable"),
        ("/9j/" + "A" * 4_000_000, "image path leads out of the source"),
        ("iVBORw0KGgo" + "A" * 4_000_000, "image file is unreadable"),
        ("data:image/png;base64,?" + "A" * 4_000_000, "image does not decode"),
        ("data:image/svg+xml,<svg/>" + "A" * 4_000_000, "image does not decode"),
        ({"bytes": "?" + "A" * 4_000_000}, "image does not decode"),
        ({"bytes": None, "path": "a" * 4_000_000}, "image file is unreadable"),
    ],
)
def test_broken_base64_is_not_printed_whole(entry, reason, tmp_path, capfd):
    (tmp_path / "0.png").write_bytes(picture())
    source = write_records(tmp_path, "lines", [record(0, image="0.png"), record(1, image=entry)])
    (report,) = convert(source, tmp_path / "out")
    assert (report.written, report.reasons) == (1, {reason: 1})
    assert sum(map(len, capfd.readouterr())) < 5_000


@pytest.mark.parametrize(
    "url", ["https://example.com/a/1.png", "HTTP://example.com/../1.png", "s3://bucket/1.png", "file:///etc/hostname"]
)
@pytest.mark.parametrize("wrap", [str, lambda url: {"path": url}, lambda url: {"image_url": {"url": url}}])
def test_a_url_is_named_as_one(url, wrap, tmp_path, capsys):
    (tmp_path / "0.png").write_bytes(picture())
    source = write_records(tmp_path, "lines", [record(0, image="0.png"), record(1, image=wrap(url))])
    (report,) = convert(source, tmp_path / "out")
    assert (report.written, report.reasons) == (1, {"image is a URL": 1})
    assert f"{url}: download the images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("images", "numbers"),
    [
        ({"image": {"bytes": picture(1), "path": None}}, [1]),
        ({"image": {"bytes": None, "path": "2.png"}}, [2]),
        ({"type": "image", "image": "2.png"}, [2]),
        ([{"image": "1.png"}, {"image": "2.png"}], [1, 2]),
        ([["1.png"], ["2.png"]], [1, 2]),
        ([[["2.png"]]], [2]),
        ({"image": ["1.png", "2.png"]}, [1, 2]),
        ([["1.png", {"bytes": picture(2)}]], [1, 2]),
    ],
)
def test_images_in_lists_and_dictionaries_are_found(images, numbers, tmp_path):
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    repairs: list[str] = []
    found = [image_bytes(entry, ImageStore([tmp_path]), repairs)[0] for entry in image_entries(images)]
    assert found == [picture(number) for number in numbers]


@pytest.mark.parametrize("images", [None, "", [], [[]], [[], []]])
def test_a_row_without_images(images):
    assert image_entries(images) == []


@pytest.mark.parametrize("images", [[None], [""], [["0.png"], None], {"image": None}, {"text": "0.png"}, {}])
def test_an_empty_entry_is_not_skipped(images, tmp_path):
    (tmp_path / "0.png").write_bytes(picture())
    with pytest.raises(DroppedRow):
        [image_bytes(entry, ImageStore([tmp_path]), []) for entry in image_entries(images)]


def test_an_image_with_too_many_pixels_is_dropped_before_it_is_decoded(tmp_path, capsys):
    assert images_module.MAX_IMAGE_PIXELS <= 40_000_000
    huge = picture(size=(9400, 9400), mode="1")
    source = write_rows(tmp_path / "train.parquet", [record(0), record(1, image={"bytes": huge, "path": "huge.png"})])
    (report,) = convert(source, tmp_path / "out")
    assert (report.written, report.reasons) == (1, {"image is too large": 1})
    assert "huge.png: 9400x9400 pixels, above 36,000,000" in capsys.readouterr().err
    stated = (ROOT / "docs" / "data.md").read_text()
    assert f"{images_module.MAX_IMAGE_PIXELS // 1_000_000} million pixels" in stated


def test_the_digest_of_pixels_is_that_of_the_whole_image():
    image = Image.effect_noise((33, 700), 90).convert("RGB")
    digest = xxhash.xxh3_128(repr(image.size).encode() + image.tobytes()).digest()
    assert images_module.pixel_digest(image) == digest


# Repairs


@pytest.mark.parametrize(
    ("question", "images", "placed", "order"),
    [
        ("Find x.", 1, "<image>Find x.", [0]),
        ("Find x.", 2, "<image><image>Find x.", [0, 1]),
        ("Is <image> it?", 2, "<image>Is <image> it?", [0, 1]),
        ("<image1> and <image2>", 2, "<image> and <image>", [0, 1]),
        ("<image2> before <image 1>", 2, "<image> before <image>", [1, 0]),
        ("<image_1>", 1, "<image>", [0]),
        ("see <image3>", 1, "see <image>", [0]),
        ("<image1>, <image2>", 1, "<image>[image 1], [image 2]", [0]),
    ],
)
def test_placeholders_with_one_right_repair(question, images, placed, order):
    repairs: list[str] = []
    assert place_images(question, list(range(images)), repairs) == (placed, order)
    assert repairs


@pytest.mark.parametrize(
    ("question", "images"),
    [
        ("<image> <image>", 1),
        ("<image>", 0),
        ("<image1>", 0),
        ("Find x.", 0),
        ("<image1> <image3>", 2),
        ("<image> <image1>", 2),
        ("<video>", 1),
    ],
)
def test_placeholders_without_one(question, images):
    with pytest.raises(DroppedRow):
        place_images(question, list(range(images)), [])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.sampled_from(["<image>", "<image1>", "<image2>", "<image 3>", "text", "<", ">", "<video>"])),
    images=st.integers(0, 4),
)
def test_whatever_is_placed_has_as_many_placeholders_as_images(parts, images):
    try:
        question, placed = place_images(" ".join(parts), list(range(images)), [])
    except DroppedRow:
        return
    assert question.count("<image>") == len(placed) == images
    assert sorted(placed) == list(range(images))
    assert not any(mark in question for mark in ("<video>", "<image1>", "<image2>", "<image 3>"))


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("6", "6"),
        (" $$6$$ ", "6"),
        ("$\\frac{2}{5}$.", "\\frac{2}{5}"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("So it is \\boxed{5}.", "5"),
        ("<answer> $\\boxed{B}$ </answer>", "B"),
        ("\\(x\\)", "x"),
        ("\\[x\\]", "x"),
        ("$a$ and $b$", "$a$ and $b$"),
        ("\\(a\\) or \\(b\\)", "\\(a\\) or \\(b\\)"),
        ("1.5", "1.5"),
        ("and so on...", "and so on..."),
        ("\\boxed{3} and \\boxed{4}", "3 and 4"),
        ("x = \\boxed{3}, y = \\boxed{4}.", "x = 3, y = 4"),
        ("\\boxed{\\left\\{1,2\\right.}", "\\left\\{1,2\\right."),
        ("\\left\\{ 1,2 \\right.", "\\left\\{ 1,2 \\right."),
        ("\\boxed{x\\}}", "x\\}"),
        (1.100000023841858, "1.1"),
        (10**20, str(10**20)),
        (7, "7"),
        (7.0, "7"),
        (0.25, "0.25"),
        (-3, "-3"),
        ("y" * 70 + ".\nTherefore, it is: 25°.", "25°"),
        ("y" * 70 + ". Therefore, the correct options are 2, 3, 4.", "2, 3, 4"),
        ("y" * 70 + ". So the answer is $$\\frac{1}{2}$$.", "$$\\frac{1}{2}$$"),
        ("y" * 70 + ". Therefore, it is a square.", "y" * 70 + ". Therefore, it is a square"),
    ],
)
def test_answers_are_unwrapped(answer, plain):
    repairs: list[str] = []
    assert plain_answer(answer, repairs) == plain
    assert bool(repairs) == (not isinstance(answer, str) or plain != answer.strip())


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "",
        " ",
        ".",
        ";",
        "$$ $$",
        "\\boxed{}",
        "<answer></answer>",
        10**400,
        float("nan"),
        float("inf"),
        True,
        [1],
        {},
        b"6",
        "\\boxed{6",
    ],
)
def test_answers_that_are_none(answer):
    with pytest.raises(DroppedRow):
        plain_answer(answer, [])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(alphabet="$\\{}boxed().<>/answer 12x\n", max_size=30))
def test_unwrapping_ends_and_changes_nothing_twice(text):
    try:
        plain = plain_answer(text, [])
    except DroppedRow:
        return
    assert plain and plain_answer(plain, []) == plain


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("Select. (A) True (B)False (C)Not known", ("True", "False", "Not known")),
        ("A. 80°;B. 100° ;C. a; b;D. 270°; E. None", ("80°", "100°", "a; b", "270°", "None")),
        ("What?\nA:40°\nB:60°", ("40°", "60°")),
        ("What?\nA.2.3.\nB.5", ("2.3.", "5")),
        ("Which is it? A) 10 B) 12", ("10", "12")),
        ("Choose from A. B. C. (A) one (B) two", ("one", "two")),
        ("(A) from A. to C. (B) from B. to D.", ("from A. to C.", "from B. to D.")),
        ("(A) point P. (B) point Q. of M. (C) none", ("point P.", "point Q. of M.", "none")),
        (
            "".join(f"({letter}) {letter.lower()}{letter.lower()} " for letter in "ABCDEFGHIJKL"),
            tuple(letter * 2 for letter in "abcdefghijkl"),
        ),
        ("Choose (A) one (C) two", ()),
        ("Choose (A) one (B) two (D) three", ()),
        ("Is angle (A) right?", ()),
        ("Nothing to choose", ()),
        ("Angle A. Point B.", ()),
        ("The vertices are A. B. C. D. Find it.", ()),
        ("", ()),
    ],
)
def test_choices_in_a_text(text, choices):
    assert split_choices(text) == choices


@pytest.mark.parametrize(
    ("answer", "choices", "kind", "typed"),
    [
        ("B", ("5", "6"), None, ("B", "choice")),
        ("(B)", ("5", "6"), None, ("B", "choice")),
        ("B. 6", ("5", "6"), None, ("B", "choice")),
        ("b", ("5", "6"), None, ("B", "choice")),
        ("6", ("5", "6"), None, ("B", "choice")),
        ("Yes", ("yes", "no"), None, ("A", "choice")),
        ("B", ("B", "A"), None, ("B", "choice")),
        ("b", ("b", "a"), None, ("A", "choice")),
        ("AC", ("1", "2", "3"), None, ("A, C", "multi_choice")),
        ("A and C", ("1", "2", "3"), None, ("A, C", "multi_choice")),
        ("7", ("5", "6"), None, ("7", "choice")),
        ("7", ("5", "6"), "choice", ("7", "choice")),
        ("\\text{B}", (), None, ("B", "choice")),
        ("(C)", (), None, ("C", "choice")),
        ("AC", (), None, ("AC", "math")),
        ("b", (), None, ("b", "math")),
        ("B. 6", (), None, ("B. 6", "math")),
        ("(B)", (), "choice", ("B", "choice")),
        ("A, C", (), "multi_choice", ("A, C", "multi_choice")),
        ("B", ("5", "6"), "text", ("B", "text")),
        ("K", tuple("123456789abc"), None, ("K", "choice")),
        ("B, L", tuple("123456789abc"), None, ("B, L", "multi_choice")),
        ("Y", ("X", "Y", "Z"), None, ("B", "choice")),
        ("K", (), None, ("K", "math")),
    ],
)
def test_how_an_answer_is_graded(answer, choices, kind, typed):
    assert typed_answer(answer, choices, kind) == typed


@pytest.mark.parametrize("answer", ["C", "(D)", "C. 7"])
def test_a_letter_beyond_the_choices_is_dropped(answer):
    with pytest.raises(DroppedRow, match="answer names no choice"):
        typed_answer(answer, ("5", "6"), None)


@pytest.mark.parametrize("count", [27, 28, 29, 40, 300])
def test_a_row_with_more_choices_than_letters_is_dropped(count, tmp_path, capsys):
    """A converter for rows with choices, whatever their number."""
    folder = tmp_path / "source"
    rows = [record(number, subject="") for number in range(2)]
    source = write_rows(folder / "train.parquet", rows)

    def problem(row):
        many = row["id"] == "r1"
        return Problem(row["question"], "B", row["image"], tuple(map(str, range(count if many else 26))), True)

    recipe = replace(mmk12.RECIPE, problem=problem)
    (report,) = conversion.convert(str(source), tmp_path / "out", recipe, skip_verify=True, max_dropped=1.0)
    assert (report.written, report.reasons) == (1, {"more choices than letters": 1})
    (row,) = rows_of(tmp_path / "out" / "train.parquet")
    assert row["extra_info"]["question"].endswith("\n(Y) 24\n(Z) 25")
    assert f"mmk12-train-r1: more choices than letters ({count} choices)" in capsys.readouterr().err


@pytest.mark.parametrize("broken", [{"choices": (None,)}, {"tolerance": "x"}, {"meta": {(1,): 2}}, {"meta": 5}])
def test_a_value_that_no_set_has_drops_its_row_and_not_the_conversion(broken, tmp_path):
    source = write_rows(tmp_path / "train.parquet", [record(number) for number in range(2)])

    def problem(row):
        return Problem(row["question"], row["answer"], row["image"], **(broken if row["id"] == "r1" else {}))

    recipe = replace(mmk12.RECIPE, problem=problem)
    (report,) = conversion.convert(str(source), tmp_path / "out", recipe, skip_verify=True, max_dropped=1.0)
    assert (report.written, report.dropped) == (1, 1)


def test_letters_repeated_in_choices_are_taken_off():
    assert plain_choices(("A. 5", "(B) 6", "C:7", "D", "Ant")) == ("5", "6", "7", "D", "Ant")


def test_choices_may_be_numbers():
    assert plain_choices((1234567, 0.1, 2.0)) == ("1234567", "0.1", "2")


def test_ids_that_a_source_repeats_get_stable_numbers(tmp_path):
    rows = [record(1), record(2), record(1), record(1), record(0, id="r1.2"), record(0, id="r1.2")]
    source = write_rows(tmp_path / "train.parquet", rows)
    (report,) = convert(source, tmp_path / "out")
    expected = [f"mmk12-train-{key}" for key in ("r1", "r2", "r1.2", "r1.3", "r1.2.2", "r1.2.3")]
    assert ids_of(tmp_path / "out" / "train.parquet") == expected
    assert report.repaired_by.rows == {"id that an earlier row has": 4}
    # Whatever is drawn, and whatever is dropped, a row's id stays.
    convert(source, tmp_path / "drawn", limit=3, seed=5)
    assert set(ids_of(tmp_path / "drawn" / "train.parquet")) < set(expected)
    write_rows(tmp_path / "train.parquet", [rows[0] | {"answer": None}, *rows[1:]])
    convert(source, tmp_path / "dropped")
    assert ids_of(tmp_path / "dropped" / "train.parquet") == expected[1:]


def test_a_row_that_is_not_as_the_set_has_it_is_dropped_not_fatal(tmp_path):
    (tmp_path / "0.png").write_bytes(picture())
    rows = [
        record(1, image={"path": 5}),
        record(2, question={"a": 1}, image="0.png"),
        record(3, subject=["x"], image="0.png"),
    ]
    source = write_records(tmp_path, "lines", [*rows, record(4, answer=["1"], image="0.png")])
    with source.open("a") as stream:
        stream.write("[" * 100_000 + "\n")
        stream.write('{"id": "\\ud800", "question": "?", "answer": "1", "subject": "", "image": "0.png"}\n')
    (report,) = convert(source, tmp_path / "out")
    assert (report.read, report.written) == (6, 2)
    assert ids_of(tmp_path / "out" / "train.parquet") == ["mmk12-train-r3", "mmk12-train-?"]


def test_answers_that_no_grader_can_match_are_kept_and_each_is_named(tmp_path, capsys):
    unmatchable = [record(number, answer="Because of this, " * 20) for number in range(2, 14)]
    source = write_rows(tmp_path / "train.parquet", [record(1), *unmatchable])
    (report,) = convert(source, tmp_path / "out")
    assert report.noted_by.rows == {UNMATCHABLE: 12} and report.written == 13
    names = ", ".join(f"mmk12-train-r{number}" for number in range(2, 14))
    assert f"kept 12 x {UNMATCHABLE}: {names}\n" in capsys.readouterr().out


def test_an_answer_type_that_the_recipe_does_not_state_is_an_error_of_the_converter(tmp_path):
    source = write_rows(tmp_path / "train.parquet", [record(1), record(2, answer="3; 4")])
    narrower = replace(mmk12.RECIPE, answer_types=("math", "choice"))
    with pytest.raises(ConversionError, match=r"mmk12-train-r2 has the answer type list, .* math, choice\."):
        conversion.convert(str(source), tmp_path / "out", narrower, skip_verify=True)
    with pytest.raises(ValueError, match="mmk12: answer_types essay not among number, math"):
        replace(mmk12.RECIPE, answer_types=("math", "essay"))


# Options


def test_splits_limits_and_seeds(tmp_path):
    for split in ("train", "test"):
        write_rows(tmp_path / "source" / f"{split}.parquet", [record(number) for number in range(50)])
    source = tmp_path / "source"
    convert(source, tmp_path / "one", splits=["test"], limit=5)
    assert names(tmp_path / "one") == ["test.parquet"]
    assert ids_of(tmp_path / "one" / "test.parquet") == [f"mmk12-test-r{number}" for number in range(5)]
    drawn = []
    for seed, out in ((1, "a"), (1, "b"), (2, "c")):
        convert(source, tmp_path / out, splits=["train"], limit=5, seed=seed)
        drawn.append(ids_of(tmp_path / out / "train.parquet"))
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == sorted(drawn[0], key=lambda name: int(name.rpartition("r")[2]))
    with pytest.raises(SourceError, match="--split dev: not in the source, which has test, train"):
        convert(source, tmp_path / "out", splits=["dev"])


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    source = write_rows(tmp_path / "train.parquet", [record(0)])
    (report,) = convert(source, tmp_path / "out", dry_run=True, skip_verify=False)
    assert report.written == 1 and names(tmp_path / "out") == []
    output = capsys.readouterr().out
    assert "nothing written: --dry_run" in output and "1 rows came back from verl" in output


def test_shards(tmp_path):
    source = write_rows(tmp_path / "train.parquet", [record(number) for number in range(150)])
    convert(source, tmp_path / "out", rows_per_shard=70, skip_verify=False)
    files = names(tmp_path / "out")
    assert files == [f"train-0000{number}-of-00003.parquet" for number in range(3)]
    assert [len(ids_of(tmp_path / "out" / file)) for file in files] == [70, 70, 10]
    assert [name for file in files for name in ids_of(tmp_path / "out" / file)] == [
        f"mmk12-train-r{number}" for number in range(150)
    ]


def test_files_of_an_earlier_run_are_not_left_beside_new_ones(tmp_path):
    """A pattern such as train*.parquet would find rows twice."""
    source = write_rows(tmp_path / "source" / "train.parquet", [record(number) for number in range(10)])
    out = tmp_path / "out"
    write_rows(out / "train-00000-of-00009.parquet", [{"mine": 1}])
    for rows_per_shard, count in ((3, 4), (5, 2), (None, 1), (5, 2)):
        convert(source, out, rows_per_shard=rows_per_shard)
        assert len(names(out)) == count + 1
    assert "train-00000-of-00009.parquet" in names(out)  # no converter wrote that one


def test_files_that_are_not_read_are_named(tmp_path, capsys):
    write_rows(tmp_path / "source" / "data" / "train.parquet", [record(0)])
    (tmp_path / "source" / "dataset_infos.json").write_text("{}")
    (tmp_path / "source" / "test.jsonl").write_text("")
    write_rows(tmp_path / "source" / "test.parquet", [record(1)])
    write_rows(tmp_path / "source" / "examples.parquet", [record(2)])
    convert(tmp_path / "source", tmp_path / "out")
    assert names(tmp_path / "out") == ["test.parquet"]
    errors = capsys.readouterr().err
    for name in ("data/train.parquet", "dataset_infos.json", "test.jsonl", "examples.parquet"):
        assert f"note: {name} is not read, beside test.parquet" in errors


def test_worker_processes_give_the_same_file(tmp_path):
    """More rows than the pool is worth starting for; broken ones among them come back from the workers, too."""
    rows = [record(number, **({"answer": None} if number % 50 == 7 else {})) for number in range(300)]
    source = write_rows(tmp_path / "train.parquet", rows)
    reports = [convert(source, tmp_path / out, num_proc=workers)[0] for out, workers in (("a", 1), ("b", 2))]
    assert reports[0].reasons == reports[1].reasons == {"no answer": 6}
    assert (tmp_path / "a" / "train.parquet").read_bytes() == (tmp_path / "b" / "train.parquet").read_bytes()


def test_prompt_styles(tmp_path):
    source = write_rows(tmp_path / "train.parquet", [record(0)])
    style = tmp_path / "style.yaml"
    style.write_text("system: Be brief.\nuser: |-\n  {question}\n  Put it in \\boxed{}.\n")
    written = {}
    for name in ("think_boxed", "boxed", "plain", str(style)):
        convert(source, tmp_path / "out", prompt_style=name, skip_verify=False)
        (row,) = rows_of(tmp_path / "out" / "train.parquet")
        written[name] = [(message["role"], message["content"]) for message in row["prompt"]]
    question = "<image>How long is side 0?"
    assert written["plain"] == [("user", question)]
    assert written["boxed"][0][1].startswith(question) and "\\boxed" in written["boxed"][0][1]
    assert "<think>" in written["think_boxed"][0][1]
    assert written[str(style)] == [("system", "Be brief."), ("user", f"{question}\nPut it in \\boxed{{}}.")]


@pytest.mark.parametrize(
    ("name", "content", "messages"),
    [
        ("style.txt", "Solve: {question}\nAnswer: \\boxed{}\n", [("user", "Solve: Q\nAnswer: \\boxed{}")]),
        ("style.txt", "Answer with a number: 5, say.", [("user", "Q\nAnswer with a number: 5, say.")]),
        ("style.yaml", "user: Box it.\n", [("user", "Q\nBox it.")]),
        ("style.yml", "system: Be brief.\n", [("system", "Be brief."), ("user", "Q")]),
    ],
)
def test_prompt_styles_from_files(name, content, messages, tmp_path):
    (tmp_path / name).write_text(content)
    made = load_prompt(str(tmp_path / name)).messages("Q")
    assert [(message["role"], message["content"]) for message in made] == messages


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "neither one of think_boxed, boxed, plain nor a file"),
        ("user: [", "is not a readable file"),
        ("- a\n", "expected the keys user and system, found list"),
        ("user: '{question}'\nassistant: x\n", "found user, assistant"),
        ("user: '{question} {question}'\n", "{question} once in user"),
        ("user: [1]\n", "have to be text"),
        ("system: 5\n", "have to be text"),
        ("user: Say <|im_end|>\n", "is a special token"),
        ("user: '<image>{question}'\n", "<image> would be read as a placeholder"),
    ],
)
def test_a_prompt_style_that_cannot_work_is_refused(content, says, tmp_path):
    path = tmp_path / "style.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConversionError, match=says):
        load_prompt(str(path))


def test_over_long_prompts_are_dropped_by_the_models_tokens(tmp_path):
    measure = load_measure(None)
    measure.processor.save_pretrained(tmp_path / "model")
    from transformers import Qwen2_5_VLConfig

    Qwen2_5_VLConfig().save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    source = write_rows(tmp_path / "train.parquet", [record(0), record(1, question="long " * 200), record(2)])
    (report,) = convert(source, tmp_path / "all", skip_verify=False, model=model)
    lengths = list(report.prompt_tokens)
    assert lengths[1] > max(lengths[0], lengths[2])
    (report,) = convert(
        source, tmp_path / "out", skip_verify=False, model=model, max_prompt_length=lengths[0], max_dropped=0.0
    )
    assert report.reasons == {OVERLONG: 1} and report.dropped_by.first_ids == {OVERLONG: ["mmk12-train-r1"]}
    assert list(report.prompt_tokens) == [lengths[0], lengths[2]]
    with pytest.raises(ConversionError, match="give --model"):
        convert(source, tmp_path / "out", max_prompt_length=10)


def test_lengths_are_those_of_the_processor():
    """Computed from sizes, for shapes that are enlarged, reduced and kept."""
    measure = load_measure(None)
    from qwen_vl_utils import process_vision_info

    for size in ((1, 1), (28, 28), (30, 900), (640, 480), (3000, 20)):
        messages = [{"role": "user", "content": "<image>What is it? <image>"}]
        image = Image.new("RGB", size)
        parts = [{"type": "image", "image": image}, {"type": "text", "text": "What is it? "}]
        structured = [{"role": "user", "content": [*parts, {"type": "image", "image": image}]}]
        images, _ = process_vision_info(structured, image_patch_size=14)
        text = measure.processor.apply_chat_template(structured, add_generation_prompt=True, tokenize=False)
        inputs = measure.processor(text=[text], images=images)["input_ids"][0]
        pad = measure.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        assert measure(messages, [size, size]) == (len(inputs), sum(token == pad for token in inputs))


def test_a_model_without_a_processor_is_refused(tmp_path):
    source = write_rows(tmp_path / "train.parquet", [record(0)])
    with pytest.raises(ConversionError, match=r"--model .*nowhere cannot be loaded"):
        convert(source, tmp_path / "out", skip_verify=False, model=str(tmp_path / "nowhere"))
    assert names(tmp_path / "out") == []


def test_the_preview_shows_rows_and_lets_no_markup_through(tmp_path):
    rows = [record(number, question=f"Is <b>{number}</b> & <script>alert(1)</script>?") for number in range(20)]
    convert(write_rows(tmp_path / "train.parquet", rows), tmp_path / "out", preview=4, skip_verify=False)
    page = (tmp_path / "out" / "preview.html").read_text()
    assert page.count("<article>") == page.count("data:image/png;base64,") == 4
    assert "train: 4 of 20 rows" in page and "mmk12-train-r15" in page
    assert "&lt;script&gt;" in page and "<script>" not in page and "http" not in page
    assert "tokens<dd>" in page


@pytest.mark.parametrize(("rows", "preview", "shown"), [(12, 40, 12), (12, 12, 12), (12, 5, 5), (1, 9, 1), (7, 6, 6)])
def test_the_preview_shows_as_many_rows_as_there_are(rows, preview, shown, tmp_path):
    source = write_rows(tmp_path / "train.parquet", [record(number) for number in range(rows)])
    convert(source, tmp_path / "out", preview=preview)
    page = (tmp_path / "out" / "preview.html").read_text()
    assert page.count("<article>") == shown and f"train: {shown} of {rows} rows" in page


# Runs that are cut short


def test_a_killed_run_leaves_no_parquet_and_the_next_one_completes(tmp_path):
    slow = {"bytes": picture(0, (400, 400), "RGBA"), "path": None}
    rows = [record(number, image=slow) for number in range(300)]
    source = write_rows(tmp_path / "source" / "train.parquet", rows)
    out = tmp_path / "out"
    command = [
        sys.executable, "data_prep/mmk12.py", "--local_dataset_path", str(source), "--local_save_dir", str(out),
        "--skip_verify", "--num_proc", "2",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    started = time.monotonic()
    while not (list(out.glob(".mmk12-*/train/*.parquet")) if out.exists() else []):
        assert run.poll() is None and time.monotonic() - started < 60
        time.sleep(0.02)
    time.sleep(0.5)
    workers = psutil.Process(run.pid).children(recursive=True)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=20)[1]
    assert not list(out.glob("*.parquet")) and list(out.glob(".mmk12-*"))
    again = run_here(command)
    assert again.returncode == 0, again.stderr
    assert names(out) == ["train.parquet"]
    assert len(ids_of(out / "train.parquet")) == 300


def test_a_run_that_is_still_going_keeps_its_folder(tmp_path):
    source = write_rows(tmp_path / "source" / "train.parquet", [record(0)])
    with staging(tmp_path / "out", "mmk12") as folder:
        convert(source, tmp_path / "out")
        assert folder.is_dir()
    assert names(tmp_path / "out") == ["train.parquet"]


# Whatever goes in

BREAKS = {
    "question": [None, "", "<image> <image>", "<image2> <image3> <image>", "<video>", "\x00", "x" * 20_000],
    "answer": [None, "", "\\boxed{", "$$ $$", "."],
    "image": [
        None,
        {"bytes": None, "path": None},
        {"bytes": b"", "path": "../../etc/passwd"},
        {"bytes": b"junk", "path": None},
        {"bytes": picture()[:-20], "path": None},
        {"bytes": picture(size=(600, 2)), "path": None},
        {"bytes": picture(mode="P"), "path": None},
        {"bytes": picture(mode="RGBA"), "path": None},
        {"bytes": None, "path": "nowhere.png"},
    ],
    "id": [None, "", "r0", "odd / id"],
}


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.one_of(
            st.just({}),
            st.sampled_from([{name: value} for name, values in BREAKS.items() for value in values]),
        ),
        max_size=25,
    )
)
def test_whatever_goes_in_every_row_is_accounted_for_and_verl_reads_the_rest(changes):
    import tempfile

    schema = pa.schema(
        [
            ("id", pa.string()),
            ("question", pa.string()),
            ("answer", pa.string()),
            ("subject", pa.string()),
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ]
    )
    rows = [record(1000), *(record(number, **change) for number, change in enumerate(changes))]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = Path(folder) / "train.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), source)
        (report,) = convert(source, Path(folder) / "out", skip_verify=False)  # reads back, or raises
        written = rows_of(Path(folder) / "out" / "train.parquet")
    assert report.read == len(rows) == report.written + report.dropped
    assert len(written) == report.written == len(report.prompt_tokens)
    assert len({row["extra_info"]["id"] for row in written}) == len(written)
    for row in written:
        assert row["prompt"][0]["content"].count("<image>") == len(row["images"]) >= 1
        assert row["reward_model"]["ground_truth"].strip()
