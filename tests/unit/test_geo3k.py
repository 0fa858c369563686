# SPDX-License-Identifier: Apache-2.0
"""data_prep/geo3k.py: sources that it reads or refuses, rows that it drops, and verl reading every row back."""

import json
import os
import sys
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import geo3k
from tests.data_files import ROOT, encoded, geo3k_row, picture, run_here, write_rows
from verl_gndpo import conversion
from verl_gndpo.conversion import ConversionError, SourceError
from verl_gndpo.conversion import images as images_module
from verl_gndpo.conversion import row as row_module
from verl_gndpo.conversion import source as source_module
from verl_gndpo.conversion import text as text_module
from verl_gndpo.conversion.lengths import load_measure
from verl_gndpo.conversion.prompt import STYLES
from verl_gndpo.conversion.report import Report
from verl_gndpo.conversion.verify import import_reader, verify

REAL = ROOT.parent / "shared" / "data" / "geometry3k"
SOURCE_SCHEMA = pa.schema(
    [
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("problem", pa.string()),
        ("answer", pa.string()),
    ]
)


def write_source(path: Path, rows: list[dict], schema: pa.Schema = SOURCE_SCHEMA) -> Path:
    return write_rows(path, rows, schema)


def converted(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def rgb(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data)).convert("RGB")


def pixels(data: bytes) -> tuple[tuple[int, int], bytes]:
    """Size and pixels; Pillow's own == also compares colour profiles and resolution."""
    image = rgb(data)
    return image.size, image.tobytes()


def convert(source: Path | str | None, out: Path, **options) -> list[Report]:
    options = {"max_dropped": 1.0, "skip_verify": True} | options
    return conversion.convert(None if source is None else str(source), out, geo3k.RECIPE, **options)


def main(arguments: list[str]) -> int:
    return conversion.main(geo3k.RECIPE, "", arguments)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# Sources

SPLIT_SIZES = {"train": 3, "validation": 2, "test": 1}


def split_rows(split: str) -> list[dict]:
    start = 10 * list(SPLIT_SIZES).index(split)
    return [geo3k_row(start + number) for number in range(SPLIT_SIZES[split])]


def make_parquet_folder(root: Path) -> Path:
    for split in SPLIT_SIZES:
        write_source(root / f"{split}.parquet", split_rows(split))
    write_source(root / "training_notes.parquet", [geo3k_row(99)])
    return root


def make_hub_clone(root: Path) -> Path:
    first, *rest = split_rows("train")
    write_source(root / "data" / "train-00000-of-00002.parquet", [first])
    write_source(root / "data" / "train-00001-of-00002.parquet", rest)
    for split in ("validation", "test"):
        write_source(root / "data" / f"{split}-00000-of-00001.parquet", split_rows(split))
    return root


def dataset_dict():
    import datasets

    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "problem": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(split_rows(split), features=features) for split in SPLIT_SIZES}
    )


def make_saved(root: Path) -> Path:
    dataset_dict().save_to_disk(str(root))
    return root


def make_problem(folder: Path, row: dict, **changes) -> Path:
    """A problem folder of InterGPS; a change of None removes the key."""
    folder.mkdir(parents=True)
    record = {
        "id": 0,
        "problem_text": "plain text that the hub's set does not use",
        "annotat_text": row["problem"].removeprefix("<image>"),
        "choices": ["wrong", "wrong too", row["answer"], "also wrong"],
        "precise_value": [1.0, 2.0, 3.0, 4.0],
        "answer": "C",
    } | changes
    record = {key: value for key, value in record.items() if value is not None}
    (folder / "data.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "img_diagram.png").write_bytes(row["images"][0]["bytes"])
    (folder / "img_diagram_point.png").write_bytes(picture(77))
    (folder / "logic_form.json").write_text("{}")
    return folder


def make_intergps(root: Path) -> Path:
    for split, folder in (("train", "train"), ("validation", "val"), ("test", "test")):
        for number, row in enumerate(split_rows(split)):
            # 9, 10, 11: in this order by number, in another by name.
            make_problem(root / folder / str(9 + number), row)
    (root / "train" / ".DS_Store").touch()
    return root


def make_intergps_repository(root: Path) -> Path:
    make_intergps(root / "data" / "geometry3k")
    return root


LAYOUTS = [make_parquet_folder, make_hub_clone, make_saved, make_intergps, make_intergps_repository]


@pytest.mark.parametrize("make", LAYOUTS)
def test_every_layout_gives_the_same_rows(make, tmp_path):
    reports = convert(make(tmp_path / "source"), tmp_path / "out")
    assert names(tmp_path / "out") == ["test.parquet", "train.parquet", "validation.parquet"]
    assert {report.split: (report.read, report.written) for report in reports} == {
        split: (size, size) for split, size in SPLIT_SIZES.items()
    }
    for split in SPLIT_SIZES:
        expected = split_rows(split)
        rows = converted(tmp_path / "out" / f"{split}.parquet")
        assert [row["reward_model"]["ground_truth"] for row in rows] == [row["answer"] for row in expected]
        assert [row["extra_info"]["question"] for row in rows] == [row["problem"] for row in expected]
        assert [pixels(row["images"][0]["bytes"]) for row in rows] == [
            pixels(row["images"][0]["bytes"]) for row in expected
        ]


def test_a_row_has_verls_schema(tmp_path):
    convert(write_source(tmp_path / "test.parquet", [geo3k_row(1), geo3k_row(2)]), tmp_path / "out")
    (_, row) = converted(tmp_path / "out" / "test.parquet")
    assert row == {
        "data_source": "hiyouga/geometry3k",
        "prompt": [{"role": "user", "content": STYLES["think_boxed"].replace("{question}", "<image>Find $x_{2}$.")}],
        "images": [{"bytes": picture(2), "path": None}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "\\frac { 2 } { 7 }"},
        "extra_info": {
            "split": "test",
            "index": 1,
            "id": "geometry3k-test-1",
            "answer": "\\frac { 2 } { 7 }",
            "question": "<image>Find $x_{2}$.",
            "answer_type": "math",
            "choices": [],
            "tolerance": 0.0,
            "unmatchable": False,
            "meta": "{}",
        },
    }


def test_a_parquet_file_without_a_splits_name_is_train(tmp_path):
    convert(write_source(tmp_path / "rows.parquet", [geo3k_row()]), tmp_path / "out")
    assert names(tmp_path / "out") == ["train.parquet"]


def test_the_hub_is_asked_for_the_default_set(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **_: asked.append(name))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: asked.append(name) or dataset_dict())
    convert(None, tmp_path)
    assert asked == ["hiyouga/geometry3k"] * 2
    assert len(converted(tmp_path / "train.parquet")) == SPLIT_SIZES["train"]


def test_without_the_hub_its_cache_is_still_asked(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    def unreachable(self, name, **_):
        raise ConnectionError("no network")

    offline = []

    def load_dataset(name, config):
        offline.append((datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE))
        return dataset_dict()

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    before = datasets.config.HF_HUB_OFFLINE
    convert("someone/some-set", tmp_path)
    assert offline == [(True, True)]
    assert before == datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("make", [make_parquet_folder, make_intergps])
def test_ids_are_the_same_in_every_run_whatever_is_dropped(make, tmp_path):
    source = make(tmp_path / "source")
    convert(source, tmp_path / "one")
    if make is make_intergps:
        (source / "train" / "10" / "data.json").write_text("{")
    else:
        rows = split_rows("train")
        rows[1]["answer"] = None
        write_source(source / "train.parquet", rows)
    convert(source, tmp_path / "two")
    one = [row["extra_info"] for row in converted(tmp_path / "one" / "train.parquet")]
    two = [row["extra_info"] for row in converted(tmp_path / "two" / "train.parquet")]
    assert two == [one[0], one[2]]
    numbers = (9, 10, 11) if make is make_intergps else (0, 1, 2)
    assert [info["id"] for info in one] == [f"geometry3k-train-{number}" for number in numbers]
    assert [info["index"] for info in one] == list(numbers)


def test_intergps_without_annotated_text_uses_the_plain_one(tmp_path):
    make_problem(tmp_path / "source" / "test" / "1", geo3k_row(), annotat_text=None, problem_text="Find x.")
    convert(tmp_path / "source", tmp_path / "out")
    assert converted(tmp_path / "out" / "test.parquet")[0]["extra_info"]["question"] == "<image>Find x."


# Sources that are refused


def no_parquet(root: Path) -> Path:
    path = root / "train.parquet"
    path.write_bytes(b"PAR1 and then something else")
    return path


def wrong_columns(root: Path) -> Path:
    return write_source(root / "train.parquet", [{"question": "x"}], pa.schema([("question", pa.string())]))


def no_rows(root: Path) -> Path:
    return write_source(root / "train.parquet", [])


def unknown_folder(root: Path) -> Path:
    (root / "readme.txt").touch()
    return root


def missing_shard(root: Path) -> Path:
    write_source(root / "train-00001-of-00003.parquet", [geo3k_row()])
    return root


def packed_intergps(root: Path) -> Path:
    (root / "train.zip").touch()
    return root


def broken_saved(root: Path) -> Path:
    (root / "dataset_dict.json").write_text('{"splits": ["train"]}')
    return root


def cut_parquet(root: Path) -> Path:
    """Opens, since the footer is whole, and breaks off in the middle."""
    path = root / "train.parquet"
    rows = pa.Table.from_pylist([geo3k_row(number) for number in range(64)], schema=SOURCE_SCHEMA)
    pq.write_table(rows, path, row_group_size=16, compression="gzip")
    chunk = pq.ParquetFile(path).metadata.row_group(2).column(0)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (no_parquet, "is not a readable parquet file"),
        (wrong_columns, "no column problem, images, answer: expected problem, images, answer, found question"),
        (no_rows, "has no rows"),
        (unknown_folder, "an unknown layout .*it holds readme.txt"),
        (missing_shard, "1 of 3 parquet files"),
        (packed_intergps, "train.zip still packed"),
        (broken_saved, "is not a readable save_to_disk folder"),
        (cut_parquet, "split train of .* breaks off after row"),
        (lambda root: root / "nowhere.parquet", "does not exist"),
    ],
)
def test_an_unreadable_source_is_refused_in_one_line(make, says, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    source = make(tmp_path / "source")
    out = tmp_path / "out"
    code = main(["--local_dataset_path", str(source), "--local_save_dir", str(out), "--skip_verify"])
    assert code == 1
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    with pytest.raises(SourceError, match=says):
        convert(source, out)
    assert str(tmp_path) in message
    assert not out.exists() or names(out) == []


def test_the_source_is_not_overwritten(tmp_path):
    source = write_source(tmp_path / "train.parquet", [geo3k_row()])
    before = source.read_bytes()
    with pytest.raises(ConversionError, match="is the source itself"):
        convert(tmp_path, tmp_path)
    assert source.read_bytes() == before


# Rows that are dropped


def with_image(data: bytes | None, path: str | None = None) -> dict:
    return geo3k_row() | {"images": [{"bytes": data, "path": path}]}


def palette_with_bad_chunk() -> bytes:
    data = bytearray(picture(mode="P"))
    data[40] ^= 0xFF
    return bytes(data)


BROKEN = {
    "no question": [geo3k_row() | {"problem": text} for text in (None, "", "<image> \n")],
    "no answer": [geo3k_row() | {"answer": text} for text in (None, "", " \n\t")],
    "no image": [geo3k_row() | {"images": images, "problem": "Find x."} for images in (None, [])],
    "placeholders and images differ in number": [
        geo3k_row() | {"problem": "<image> or <image>?"},
        geo3k_row() | {"problem": "<image1> or <image2>?", "images": geo3k_row()["images"] * 3},
        geo3k_row() | {"problem": "Find <image1>", "images": []},
        geo3k_row() | {"images": []},
    ],
    "question holds a special token": [geo3k_row() | {"problem": "<image>What is <|image_pad|>?"}],
    "question has a video or audio placeholder": [geo3k_row() | {"problem": "<image> <video>"}],
    "image is empty": [with_image(None), with_image(b""), geo3k_row() | {"images": [None]}],
    "image file is missing": [with_image(None, "absent.png"), with_image(b"", ".")],
    "image path leads out of the source": [
        with_image(None, path) for path in ("../secret.png", "a/../../secret.png", "/etc/hostname", "C:\\secret.png")
    ],
    "box of the answer is not closed": [geo3k_row() | {"answer": "\\boxed{\\left\\{ 3 \\right."}],
    "image does not decode": [
        with_image(b"no image at all"),
        with_image(picture(size=(400, 300))[:-200]),
        with_image(encoded(Image.effect_noise((64, 64), 60), "JPEG")[:-300]),
        with_image(palette_with_bad_chunk()),
    ],
    "image has an unsupported pixel format": [with_image(encoded(Image.new("I;16", (30, 30), 40000)))],
    # 41x8199 is below 200 itself, and 293 once the sides are multiples of 28.
    "aspect ratio is not below 200": [with_image(picture(size=size)) for size in ((5600, 28), (2, 401), (41, 8199))],
}


@pytest.mark.parametrize(("reason", "row"), [(reason, row) for reason, rows in BROKEN.items() for row in rows])
def test_a_broken_row_is_dropped_and_named(reason, row, tmp_path, capsys):
    source = write_source(tmp_path / "train.parquet", [geo3k_row(1), row, geo3k_row(2)])
    (report,) = convert(source, tmp_path / "out")
    assert (report.read, report.written, report.reasons) == (3, 2, {reason: 1})
    assert [row["extra_info"]["index"] for row in converted(tmp_path / "out" / "train.parquet")] == [0, 2]
    output = capsys.readouterr()
    assert f"dropped geometry3k-train-1: {reason}" in output.err
    assert f"1 x {reason}: geometry3k-train-1" in output.out


def test_a_decompression_bomb_is_dropped(tmp_path, monkeypatch):
    bomb = with_image(picture(size=(40, 30)))
    for limit in (1000, 100):  # Pillow warns above its limit, and raises above twice its limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        source = write_source(tmp_path / "train.parquet", [bomb, with_image(picture(size=(8, 8)))])
        (report,) = convert(source, tmp_path / "out")
        assert report.reasons == {"image is too large": 1}


def test_an_answer_that_is_no_text_is_dropped(tmp_path):
    schema = SOURCE_SCHEMA.set(2, pa.field("answer", pa.list_(pa.int64())))
    source = write_source(tmp_path / "train.parquet", [geo3k_row() | {"answer": [7]}], schema)
    with pytest.raises(ConversionError, match="all 1 rows dropped"):
        convert(source, tmp_path / "out")
    assert names(tmp_path / "out") == []


def test_text_that_is_no_utf8_is_dropped(tmp_path):
    rows = pa.Table.from_pylist([geo3k_row(), geo3k_row()], schema=SOURCE_SCHEMA)
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"\xff\xfe7")]
    )
    path = tmp_path / "train.parquet"
    pq.write_table(rows.set_column(2, "answer", broken), path)
    (report,) = convert(path, tmp_path / "out")
    assert (report.written, report.reasons) == (1, {"text is not valid Unicode": 1})


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("answer names no choice", {"answer": "E"}),
        ("answer names no choice", {"answer": "AB"}),
        ("answer names no choice", {"answer": 2}),
        ("answer names no choice", {"choices": []}),
        ("no answer", {"answer": None}),
        ("no answer", {"choices": ["1", "2", " ", "4"]}),
        ("answer is not text", {"choices": [[1], [2], [3], [4]]}),
        ("no question", {"annotat_text": None, "problem_text": None}),
        ("question is not text", {"annotat_text": ["Find x."]}),
        ("text is not valid Unicode", {"annotat_text": "Find \ud800."}),
    ],
)
def test_a_broken_intergps_record_is_dropped(reason, changes, tmp_path):
    make_problem(tmp_path / "source" / "train" / "0", geo3k_row())
    make_problem(tmp_path / "source" / "train" / "1", geo3k_row(), **changes)
    (report,) = convert(tmp_path / "source", tmp_path / "out")
    assert (report.written, report.reasons) == (1, {reason: 1})
    assert report.dropped_by.first_ids == {reason: ["geometry3k-train-1"]}


@pytest.mark.parametrize(
    ("reason", "file", "content"),
    [
        ("data.json is unreadable", "data.json", b"{"),
        ("data.json is unreadable", "data.json", b"[1, 2]"),
        ("data.json is unreadable", "data.json", b"\xff\xfe"),
        ("data.json is unreadable", "data.json", None),
        ("image file is missing", "img_diagram.png", None),
        ("image is empty", "img_diagram.png", b""),
    ],
)
def test_a_broken_intergps_folder_is_dropped(reason, file, content, tmp_path):
    make_problem(tmp_path / "source" / "train" / "0", geo3k_row())
    broken = make_problem(tmp_path / "source" / "train" / "1", geo3k_row()) / file
    broken.unlink()
    if content is not None:
        broken.write_bytes(content)
    (report,) = convert(tmp_path / "source", tmp_path / "out")
    assert (report.written, report.reasons) == (1, {reason: 1})


def test_too_many_dropped_rows_write_nothing(tmp_path, capsys):
    rows = [geo3k_row(number) for number in range(9)] + [geo3k_row() | {"answer": None}]
    source = write_source(tmp_path / "source" / "train.parquet", rows)
    write_source(tmp_path / "source" / "test.parquet", [geo3k_row()])
    out = tmp_path / "out"
    arguments = ["--local_dataset_path", str(source.parent), "--local_save_dir", str(out), "--skip_verify"]
    assert main(arguments) == 1
    output = capsys.readouterr()
    assert "error: split train: 1 of 10 rows dropped, above --max_dropped 0.01" in output.err
    assert "1 x no answer: geometry3k-train-9" in output.out
    assert names(out) == []
    assert main([*arguments, "--max_dropped", "0.1"]) == 0
    assert names(out) == ["test.parquet", "train.parquet"]


def broken_or_good() -> st.SearchStrategy:
    broken = st.sampled_from([(reason, row) for reason, rows in BROKEN.items() for row in rows])
    return st.one_of(st.integers(0, 255).map(lambda number: (None, geo3k_row(number))), broken)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(mix=st.lists(broken_or_good(), min_size=1, max_size=40))
def test_whatever_the_mix_every_row_is_written_or_dropped(mix, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mix")
    source = write_source(folder / "train.parquet", [geo3k_row(), *(row for _, row in mix)])
    (report,) = convert(source, folder / "out")
    expected: dict[str, int] = {}
    for reason, _ in mix:
        if reason is not None:
            expected[reason] = expected.get(reason, 0) + 1
    assert report.read == len(mix) + 1 == report.written + report.dropped
    assert report.reasons == expected
    rows = converted(folder / "out" / "train.parquet")
    assert [row["extra_info"]["index"] for row in rows] == [
        0,
        *(index for index, (reason, _) in enumerate(mix, start=1) if reason is None),
    ]


# Images


def test_an_rgb_image_keeps_its_bytes():
    noise = Image.merge("RGB", [Image.effect_noise((50, 40), 80)] * 3)
    for data in (encoded(noise), encoded(noise, "JPEG"), encoded(noise, "JPEG", quality=20)):
        assert images_module.rgb_picture(data, "", []).data is data


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "L", "1", "CMYK"])
def test_other_modes_become_rgb_png_with_the_same_pixels(mode):
    image = Image.new("RGB", (20, 10), "black")
    image.paste("white", (0, 0, 10, 10))
    data = encoded(image.convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    result = Image.open(BytesIO(images_module.rgb_picture(data, "", []).data))
    assert (result.format, result.mode) == ("PNG", "RGB")
    assert result.tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_becomes_white_whatever_lies_beneath(mode):
    """The trap: verl drops the alpha channel, and a diagram on transparent black turns into a black square."""
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (4, 4), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
        image.putpixel((1, 1), (0, 0, 0, 255) if mode == "RGBA" else (0, 255))
        data = encoded(image)
    else:
        image = Image.new("RGB", (4, 4), (0, 0, 9))
        image.putpixel((1, 1), (0, 0, 0))
        image = image.quantize(2) if mode == "P" else image
        data = encoded(image, transparency=image.getpixel((0, 0)))
    result = rgb(images_module.rgb_picture(data, "", []).data)
    assert result.getpixel((1, 1)) == (0, 0, 0)
    assert {result.getpixel((x, y)) for x in range(4) for y in range(4) if (x, y) != (1, 1)} == {(255, 255, 255)}


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)
    assert rgb(images_module.rgb_picture(data, "", []).data).size == (10, 20)


def test_an_image_path_is_read_beside_the_source_and_embedded(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture(5))
    source = write_source(tmp_path / "train.parquet", [with_image(None, "pictures/a.png")])
    convert(source, tmp_path / "out")
    (row,) = converted(tmp_path / "out" / "train.parquet")
    assert row["images"] == [{"bytes": picture(5), "path": None}]


# Writing


def test_a_failure_leaves_no_parquet_and_an_older_file_untouched(tmp_path, monkeypatch):
    source = make_parquet_folder(tmp_path / "source")
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.parquet").write_bytes(b"older")

    def full_disk(self, table):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full_disk)
        assert main(["--local_dataset_path", str(source), "--local_save_dir", str(out), "--skip_verify"]) == 1
    assert names(out) == ["train.parquet"]
    assert (out / "train.parquet").read_bytes() == b"older"
    convert(source, out)
    assert names(out) == ["test.parquet", "train.parquet", "validation.parquet"]
    assert len(converted(out / "train.parquet")) == SPLIT_SIZES["train"]


def test_a_split_that_fails_late_keeps_the_others_from_being_published(tmp_path):
    source = make_parquet_folder(tmp_path / "source")
    cut_parquet(source)  # train: converted after test
    with pytest.raises(SourceError, match="breaks off"):
        convert(source, tmp_path / "out")
    assert names(tmp_path / "out") == []


def test_reading_holds_a_small_part_of_the_file(tmp_path):
    noise = [{"bytes": os.urandom(30_000), "path": None}]
    rows = pa.Table.from_pylist([geo3k_row() | {"images": noise} for _ in range(320)], schema=SOURCE_SCHEMA)
    path = tmp_path / "train.parquet"
    # Dictionary pages would store the one picture once.
    pq.write_table(rows, path, row_group_size=16, use_dictionary=False)
    del rows
    assert path.stat().st_size > 9_000_000
    (split,) = source_module.open_source(str(path), geo3k.RECIPE)
    before = pa.total_allocated_bytes()
    peak = max(pa.total_allocated_bytes() - before for _ in split.rows())
    assert peak < 3_000_000


def test_row_groups_stay_small(tmp_path):
    """The writer holds one group of rows, whatever the size of the set."""
    source = write_source(tmp_path / "train.parquet", [geo3k_row(number) for number in range(150)])
    convert(source, tmp_path / "out")
    metadata = pq.ParquetFile(tmp_path / "out" / "train.parquet").metadata
    assert [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)] == [64, 64, 22]


# Reading back through verl


@pytest.fixture(scope="session")
def reader():
    rlhf_dataset, why = import_reader()
    assert rlhf_dataset is not None, f"verl's RLHFDataset cannot be imported: {why}"
    return rlhf_dataset


@pytest.fixture(scope="session")
def tiny_model(reader, tmp_path_factory) -> Path:
    """Return a folder with a Qwen2.5-VL processor whose tokens are bytes: no download, and every text fits."""
    from transformers import Qwen2_5_VLConfig

    folder = tmp_path_factory.mktemp("model")
    load_measure(None).processor.save_pretrained(folder)
    Qwen2_5_VLConfig().save_pretrained(folder)
    return folder


def test_every_written_row_comes_back_from_verl_with_a_processor(tiny_model, reader, tmp_path, capsys):
    rows = [
        geo3k_row(),
        with_image(picture(mode="RGBA")),
        with_image(picture(mode="P")),
        with_image(encoded(Image.new("RGB", (30, 20)), "JPEG")),
        with_image(picture(size=(1, 1))),
        with_image(picture(size=(1, 199))),
        with_image(picture(size=(41, 5599))),
        {
            "images": [{"bytes": picture(number), "path": None} for number in (1, 2)],
            "problem": "Is <image> like <image>?\r\nWrite $\\angle$ as ∠.",
            "answer": " 5 \\sqrt { 3 } ",
        },
        *(row for rows in BROKEN.values() for row in rows),
    ]
    source = write_source(tmp_path / "train.parquet", rows)
    arguments = ["--local_dataset_path", str(source), "--local_save_dir", str(tmp_path / "out"), "--max_dropped", "1"]
    assert main([*arguments, "--model", str(tiny_model)]) == 0
    assert "train: 8 rows came back from verl" in capsys.readouterr().out

    # The same once more without the converter's own comparison.
    from omegaconf import OmegaConf
    from verl.utils import hf_processor, hf_tokenizer

    config = OmegaConf.create(
        {"max_prompt_length": 4096, "filter_overlong_prompts_workers": None, "cache_dir": str(tmp_path / "cache")}
    )
    dataset = reader(
        str(tmp_path / "out" / "train.parquet"), hf_tokenizer(tiny_model), config, processor=hf_processor(tiny_model)
    )
    assert len(dataset) == 8
    parts = dataset[7]["raw_prompt"][0]["content"]
    assert [part["type"] for part in parts] == ["text", "image", "text", "image", "text"]
    assert [part["image"].getpixel((0, 0)) for part in parts if part["type"] == "image"] == [(255, 1, 0), (255, 2, 0)]
    assert dataset[7]["reward_model"]["ground_truth"] == "5 \\sqrt { 3 }"


def test_verls_reward_accepts_an_answer_in_the_form_that_the_instruction_asks_for(reader):
    from verl.utils.reward_score import default_compute_score

    answer = geo3k_row(3)["answer"]
    response = f"<think>Seven parts, three taken.</think> \\boxed{{{answer}}}"
    assert default_compute_score(geo3k.RECIPE.hub_id, response, answer) == pytest.approx(1.0)
    assert default_compute_score(geo3k.RECIPE.hub_id, "<think></think> \\boxed{8}", answer) == pytest.approx(0.1)
    for mark in ("<think>", "</think>", "\\boxed{"):
        assert mark in STYLES["think_boxed"]


def test_verify_fails_when_a_row_does_not_come_back(reader, tmp_path):
    (report,) = convert(write_source(tmp_path / "train.parquet", [geo3k_row(1), geo3k_row(2)]), tmp_path / "out")
    path, measure = tmp_path / "out" / "train.parquet", load_measure(None)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert verify(reader, [path], report, scratch, measure).endswith("2 of them through tokenizer and processor")
    assert len(report.prompt_tokens) == 2

    class Framing(type(measure)):
        """As of a model that frames each image with two tokens that its processor doesn't count."""

        def __call__(self, messages, sizes):
            prompt, image = super().__call__(messages, sizes)
            return prompt - 2 * len(sizes), image

    framing = Framing(measure.tokenizer, measure.processor, measure.name)
    assert "lengths off by up to 2 tokens" in verify(reader, [path], report, scratch, framing)
    with pytest.raises(ConversionError, match="reads 2 of the 3 rows"):
        verify(reader, [path], Report("train", read=3, written=3, digests=report.digests), scratch, measure)
    rows = converted(path)
    for broken, says in ((picture(2)[:-60], "does not come back"), (picture(3), "image 0 has other pixels")):
        rows[1]["images"][0]["bytes"] = broken
        wrong = tmp_path / "wrong.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=row_module.SCHEMA), wrong)
        with pytest.raises(ConversionError, match=f"geometry3k-train-1 .*{says}"):
            verify(reader, [wrong], report, scratch, measure)


@pytest.mark.parametrize(
    ("module", "check", "row"),
    [
        (text_module, "FOREIGN_PLACEHOLDERS", geo3k_row() | {"problem": "<image> <video>"}),
        # verl's prompt filter swallows what the image processor raises, and leaves the row out.
        (images_module, "RESIZE_FACTORS", with_image(picture(size=(41, 8199)))),
    ],
)
def test_what_a_missing_check_lets_through_is_caught_and_not_published(module, check, row, tmp_path, monkeypatch):
    monkeypatch.setattr(module, check, ())
    source = write_source(tmp_path / "train.parquet", [geo3k_row(1), row])
    with pytest.raises(ConversionError, match="geometry3k-train-1 does not come back"):
        convert(source, tmp_path / "out", skip_verify=False)
    assert names(tmp_path / "out") == []


def test_without_verl_the_files_are_written_and_the_gap_is_stated(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "verl.utils.dataset.rl_dataset", None)
    convert(write_source(tmp_path / "train.parquet", [geo3k_row()]), tmp_path / "out", skip_verify=False)
    assert "verl cannot be imported here (ModuleNotFoundError" in (output := capsys.readouterr().out)
    assert "NOT read back through verl" in output
    assert names(tmp_path / "out") == ["train.parquet"]


def test_reading_back_leaves_nothing_behind(reader, tmp_path):
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    convert(make_parquet_folder(tmp_path / "source"), tmp_path / "out", skip_verify=False)
    assert names(tmp_path / "out") == ["test.parquet", "train.parquet", "validation.parquet"]
    assert before == datasets.config.HF_DATASETS_CACHE


@pytest.mark.skipif(not REAL.is_dir(), reason="the real Geometry3K samples lie outside the repository")
def test_real_rows_keep_their_images_and_answers(reader, tmp_path):
    convert(REAL, tmp_path, skip_verify=False, max_dropped=0.0)
    for split, size in (("train", 192), ("validation", 32), ("test", 32)):
        rows, source = converted(tmp_path / f"{split}.parquet"), converted(REAL / f"{split}.parquet")
        assert len(rows) == len(source) == size
        for row, original in zip(rows, source, strict=True):
            assert row["reward_model"]["ground_truth"] == original["answer"]
            assert row["prompt"][0]["content"].startswith(original["problem"].rstrip())
            # Every real diagram is opaque, so that laying it on white must not change a pixel.
            assert pixels(row["images"][0]["bytes"]) == pixels(original["images"][0]["bytes"])


# The script

SCRIPT = [sys.executable, ROOT / "data_prep" / "geo3k.py"]


def test_the_plain_script_converts_and_says_what_it_dropped(tmp_path):
    source = write_source(tmp_path / "test.parquet", [geo3k_row(1), geo3k_row() | {"answer": ""}])
    arguments = ["--local_dataset_path", source, "--local_save_dir", tmp_path / "out", "--skip_verify"]
    run = run_here([*SCRIPT, *arguments, "--max_dropped", "0.5"])
    assert run.returncode == 0, run.stderr
    assert "1 x no answer: geometry3k-test-1" in run.stdout
    assert "test: converting" in run.stderr
    assert len(converted(tmp_path / "out" / "test.parquet")) == 1


def test_the_plain_script_fails_in_one_line_without_the_hub(tmp_path):
    command = [*SCRIPT, "--local_save_dir", tmp_path / "out"]
    run = run_here(command, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert run.returncode == 1
    (error,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert "hiyouga/geometry3k" in error and "--local_dataset_path" in error
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()
