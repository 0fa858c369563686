# SPDX-License-Identifier: Apache-2.0
"""More than a thousand damaged rows: the doctor never raises, and names file and row of what would stop a run.

A failure names its seed and number. `GNDPO_HOSTILE_FILES` sets how many files are drawn; each has several damaged rows.
"""

import json
import os
import random
import struct
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data_files import encoded, picture
from tests.unit.doctor.helpers import OURS, errors, expect
from verl_gndpo.conversion.row import HF_METADATA, SCHEMA
from verl_gndpo.doctor.check import FINDING_CHARS
from verl_gndpo.doctor.data import check_data, check_indices, check_rewards, check_routing, check_rows
from verl_gndpo.doctor.inputs import Inputs

FILES = int(os.environ.get("GNDPO_HOSTILE_FILES", 400))
SEEDS = 8
ROWS = 5
HUGE = "x" * 100_000
INVALID = b"\xff\xfe(\xc3"


def png_header(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes that says it has so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def animated() -> bytes:
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def base_row(number):
    return {
        "data_source": "hiyouga/geometry3k",
        "prompt": [{"role": "user", "content": f"<image>Find x_{number}."}],
        "images": [{"bytes": picture(number), "path": None}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "7"},
        "extra_info": {
            "split": "train",
            "index": number,
            "id": str(number),
            "answer": "7",
            "question": "Find x.",
            "answer_type": "math",
            "choices": [],
            "tolerance": 0.0,
            "unmatchable": False,
            "meta": "{}",
        },
    }


def set_at(*path_and_value):
    *path, last, value = path_and_value

    def change(row):
        place = row
        for key in path:
            place = place[key]
        place[last] = value

    return change


def image(data, path=None):
    return set_at("images", 0, {"bytes": data, "path": path})


def prompt(*contents):
    return set_at("prompt", [{"role": "user", "content": content} for content in contents])


def text_only(images):
    def change(row):
        row["images"] = images
        row["prompt"][0]["content"] = "Two plus two?"

    return change


FINE = {
    "nothing": lambda row: None,
    "gif": image(animated()),
    "cmyk": image(picture(mode="CMYK", kind="JPEG")),
    "grey": image(picture(mode="L")),
    "16 bit": image(encoded(Image.new("I;16", (40, 30), 3))),
    "palette": image(picture(mode="P")),
    "tiff": image(picture(kind="TIFF")),
    "lying path": image(picture(), "/etc/passwd\0"),
    "no images": text_only([]),
    "null images": text_only(None),
    "nul": prompt("<image>a\0b"),
    "surrogate pair": prompt("<image>\U0001f600"),
    "two messages": prompt("<image>", "and now?"),
    "no answer": set_at("reward_model", "ground_truth", None),
    "no reward": set_at("reward_model", None),
    "null info": set_at("extra_info", None),
    "nested meta": set_at("extra_info", "meta", "[" * 10_000),
    "huge index": set_at("extra_info", "index", 2**63 - 1),
    "tool calls of the assistant": lambda row: row["prompt"].append({"role": "assistant", "content": None}),
    "no tolerance": set_at("extra_info", "tolerance", None),
    "no number": set_at("extra_info", "tolerance", float("nan")),
    "huge choice": set_at("extra_info", "choices", [HUGE, None, ""]),
    "no source": set_at("data_source", None),
    "huge meta": set_at("extra_info", "meta", HUGE * 10),
    "huge answer": set_at("reward_model", "ground_truth", HUGE),
    "infinite tolerance": set_at("extra_info", "tolerance", float("-inf")),
}
BAD = {
    "no bytes": image(None, "/nowhere/a.png"),
    "lying bytes": image(b"GIF89a" + b"\0" * 8),
    "null image": set_at("images", 0, None),
    "null bytes and path": image(None),
    "empty": image(b""),
    "text": image(b"not an image"),
    "svg": image(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "truncated png": image(picture(size=(200, 200))[:-60]),
    "truncated jpeg": image(picture(kind="JPEG", size=(200, 200))[:300]),
    "bomb": image(png_header(100_000, 100_000)),
    "bomb that pillow lets through": image(png_header(8_000, 8_000)),
    "no pixels": image(png_header(0, 5)),
    "a line": image(picture(size=(300, 1))),
    "a column": image(picture(size=(1, 900))),
    "program": image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n(x) print\n%%EOF\n"),
    "placeholder without image": lambda row: row.update(images=[]),
    "image without placeholder": prompt("Find it."),
    "two placeholders": prompt("<image><image>Find it."),
    "html": prompt("<image>the <video> tag"),
    "special token": prompt("<image>Find the <|image_pad|>."),
    "video placeholder": prompt("<image><video>Find it."),
    "null prompt": set_at("prompt", None),
    "no messages": set_at("prompt", []),
    "null message": set_at("prompt", [None, {"role": "user", "content": "<image>"}]),
    "null content": prompt("<image>", None),
    "huge": prompt("<image>" + HUGE),
    "unknown answer type": set_at("extra_info", "answer_type", "nonsense"),
    "huge answer type": set_at("extra_info", "answer_type", HUGE),
    "answer type that controls the terminal": set_at("extra_info", "answer_type", "\x1b[2J\0\u202e\n"),
    "no source and no type": lambda row: row.update(data_source=None) or row["extra_info"].update(answer_type=None),
}


def of_type(column, kind, value):
    """Return a change of a table: a column of another type, with the same value in every row."""

    def change(table):
        return table.set_column(table.schema.get_field_index(column), column, pa.array([value] * len(table), kind))

    return change


def messages(content, value):
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", content)]))
    return of_type("prompt", kind, [{"role": "user", "content": value}])


def images(kind, value):
    return of_type("images", pa.list_(kind), [value])


def without(column):
    return lambda table: table.drop_columns([column])


def twice(column):
    return lambda table: table.append_column(column, table[column])


def information(**fields):
    """Return a change of a table: `extra_info` with these fields, each a pair of type and value."""
    kind = pa.struct([(name, kind) for name, (kind, _) in fields.items()])
    return of_type("extra_info", kind, {name: value for name, (_, value) in fields.items()})


def invalid(column):
    """Return a change of a table: a text in its row 2 that is not UTF-8, which parquet does not check."""

    def change(table):
        values = [value.as_py().encode() for value in table[column]]
        values[2] = INVALID
        texts = pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())
        return table.set_column(table.schema.get_field_index(column), column, texts)

    return change


def invalid_message(table):
    texts = pa.Array.from_buffers(pa.string(), 1, pa.array([b"<image>" + INVALID], pa.binary()).buffers())
    roles = pa.array(["user"])
    message = pa.ListArray.from_arrays([0, 1], pa.StructArray.from_arrays([roles, texts], ["role", "content"]))
    prompts = [
        pa.concat_arrays([table["prompt"].chunk(0).slice(row, 1) if row != 2 else message for row in range(ROWS)])
    ]
    return table.set_column(1, "prompt", pa.chunked_array(prompts))


TEXT, BYTES, NUMBER = pa.string(), pa.binary(), pa.int64()
PARTS = pa.list_(pa.struct([("type", TEXT), ("text", TEXT)]))
FINE_TABLES = {
    "large texts": messages(pa.large_string(), "<image>Find it."),
    "a dictionary of texts": messages(pa.dictionary(pa.int32(), TEXT), "<image>Find it."),
    "no extra_info": without("extra_info"),
    "null extra_info": of_type("extra_info", pa.null(), None),
    "null reward_model": of_type("reward_model", pa.null(), None),
    "text of numbers in extra_info": information(index=(TEXT, "7"), answer_type=(TEXT, "math")),
    "no ability": without("ability"),
    "further column": lambda table: table.append_column("more", pa.array([[{"a": None}]] * len(table))),
}
BAD_TABLES = {
    "no prompt": without("prompt"),
    "prompt of text": of_type("prompt", TEXT, "<image>Find it."),
    "prompt of texts": of_type("prompt", pa.list_(TEXT), ["<image>Find it."]),
    "one message": of_type("prompt", pa.struct([("role", TEXT), ("content", TEXT)]), {"role": "user", "content": ""}),
    "message without role": of_type("prompt", pa.list_(pa.struct([("content", TEXT)])), [{"content": "<image>?"}]),
    "message without content": of_type("prompt", pa.list_(pa.struct([("role", TEXT)])), [{"role": "user"}]),
    "number as content": messages(NUMBER, 5),
    "bytes as content": messages(BYTES, b"<image>Find it."),
    "null prompt": of_type("prompt", pa.null(), None),
    "structured content beside images": messages(PARTS, [{"type": "text", "text": "<image>?"}]),
    "no images": without("images"),
    "text as images": of_type("images", TEXT, "a.png"),
    "bytes as images": of_type("images", BYTES, picture()),
    "one image": of_type("images", pa.struct([("bytes", BYTES)]), {"bytes": picture()}),
    "images of numbers": images(NUMBER, 5),
    "images of lists": images(pa.list_(NUMBER), [1, 2]),
    "images of text bytes": images(pa.struct([("bytes", TEXT)]), {"bytes": "a.png"}),
    "images of null": images(pa.null(), None),
    "paths that lead nowhere": images(TEXT, "/nowhere/\0"),
    "device": images(TEXT, "/dev/zero"),
    "text as extra_info": of_type("extra_info", TEXT, json.dumps({"index": 1})),
    "list as extra_info": of_type("extra_info", pa.list_(TEXT), ["a"]),
    "map as extra_info": of_type("extra_info", pa.map_(TEXT, TEXT), [("a", "b")]),
    "text as reward_model": of_type("reward_model", TEXT, "7"),
    "number as truth": of_type("reward_model", pa.struct([("ground_truth", NUMBER)]), {"ground_truth": 7}),
    "list as truth": of_type("reward_model", pa.struct([("ground_truth", pa.list_(TEXT))]), {"ground_truth": ["7"]}),
    "struct as answer type": information(answer_type=(pa.struct([("a", TEXT)]), {"a": "math"})),
    "list as answer type": information(answer_type=(pa.list_(TEXT), ["math"])),
    "text as choices": information(answer_type=(TEXT, "choice"), choices=(TEXT, "a, b")),
    "text as tolerance": information(answer_type=(TEXT, "math"), tolerance=(TEXT, "0.1")),
    "list as source": of_type("data_source", pa.list_(TEXT), ["geometry3k"]),
    "prompt twice": twice("prompt"),
    "images twice": twice("images"),
    "info twice": twice("extra_info"),
    "text that is not UTF-8": invalid("data_source"),
    "ability that is not UTF-8": invalid("ability"),
    "message that is not UTF-8": invalid_message,
}


@pytest.fixture(scope="module")
def measured(run_config, student):
    """The measure of prompts, loaded once for all files."""
    config = run_config.copy()
    config.actor_rollout_ref.model.path = str(student)
    return Inputs(config).measure


@pytest.fixture
def find(make_config, measured, tmp_path):
    """A function that runs all checks of data on a training file: (path, overrides) -> findings of a proper form."""

    def run(path, *overrides):
        config = make_config(f"data.train_files={path}", "data.val_files=null", *OURS, *overrides)
        config.data.val_files = str(tmp_path / "test.parquet")
        inputs = Inputs(config)
        inputs.__dict__["measure"] = measured
        checks = [
            c for run in (check_data, check_rows, check_rewards, check_routing, check_indices) for c in run(inputs)
        ]
        for check in checks:
            assert str(check).isprintable() and len(str(check)) <= 3 * FINDING_CHARS, repr(str(check)[:1000])
            assert check.remedy or check.status != "error", str(check)
        return checks

    return run


def draw_file(rng: random.Random, path: Path) -> tuple[list[str], str, int]:
    """Write a file with damage in most of its rows. Returns the damage, and kind and row of the one that matters."""
    rows = [base_row(number) for number in range(ROWS)]
    chosen = [rng.choice(list(FINE)) for _ in rows]
    at, kind = rng.randrange(ROWS), rng.choice([*BAD, *BAD, ""])
    if kind:
        chosen[at] = kind
    for row, name in zip(rows, chosen, strict=True):
        (BAD | FINE)[name](row)
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    if rng.random() < 0.5:
        # Without it verl decodes the images, and not `datasets`.
        table = table.replace_schema_metadata(None)
    pq.write_table(table, path, row_group_size=rng.choice([1, 2, 100]), compression=rng.choice(["none", "zstd"]))
    return chosen, kind, at


@pytest.mark.parametrize("seed", range(SEEDS))
def test_each_damaged_row_is_named_and_no_other(seed, find, tmp_path):
    rng = random.Random(seed)
    for number in range(FILES // SEEDS):
        chosen, kind, at = draw_file(rng, tmp_path / "train.parquet")
        try:
            found = [check for check in find(tmp_path / "train.parquet") if check.status != "ok"]
            text = "\n".join(map(str, found))
            assert bool(found) == bool(kind), text
            if kind:
                assert len(found) == 1 and "train.parquet" in text, text
                assert f"row {at}" in text or f"rows {at}" in text, text
                assert not any(f"row {row}:" in text for row in range(ROWS) if row != at), text
        except BaseException:
            print(f"seed {seed}, file {number}: {chosen}, row {at}: {kind or 'nothing bad'}")
            raise


@pytest.mark.parametrize("kind", FINE_TABLES)
def test_columns_that_verl_takes(kind, find, tmp_path):
    table = FINE_TABLES[kind](pa.Table.from_pylist([base_row(number) for number in range(ROWS)], schema=SCHEMA))
    pq.write_table(table, tmp_path / "train.parquet")
    assert not errors(find(tmp_path / "train.parquet"))


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("kind", BAD_TABLES)
def test_columns_that_verl_does_not_take(kind, declared, find, tmp_path):
    table = BAD_TABLES[kind](pa.Table.from_pylist([base_row(number) for number in range(ROWS)], schema=SCHEMA))
    metadata = {"huggingface": json.dumps(HF_METADATA)} if declared else None
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "train.parquet")
    found = errors(find(tmp_path / "train.parquet"))
    assert found and all("train.parquet" in str(check) for check in found), found
    if "UTF-8" in kind:
        assert "row 2" in str(found[0])


def test_bytes_alone_are_images_only_where_datasets_decodes_them(find, tmp_path):
    table = images(BYTES, picture())(pa.Table.from_pylist([base_row(0)] * ROWS, schema=SCHEMA))
    pq.write_table(table, tmp_path / "train.parquet")
    assert not errors(find(tmp_path / "train.parquet"))
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "train.parquet")
    expect(find(tmp_path / "train.parquet"), "error", "row 0: image 0: ValueError: it is bytes alone")


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_file_with_damaged_bytes_is_named_or_read(seed, find, tmp_path):
    rng = random.Random(seed)
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist([base_row(number) for number in range(ROWS)], schema=SCHEMA), path)
    whole = path.read_bytes()
    for number in range(FILES // SEEDS // 4):
        data = bytearray(whole)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        else:
            # The footer, without which nothing is found, is most of the interest.
            start = rng.choice([0, len(data) - 4000])
            for _ in range(rng.choice([1, 3, 30])):
                data[rng.randrange(start, len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            found = find(path)
            assert any("train.parquet" in str(check) for check in found)
        except BaseException:
            (tmp_path / "kept.parquet").write_bytes(data)
            print(f"seed {seed}, file {number}, kept as {tmp_path / 'kept.parquet'}")
            raise


@pytest.mark.parametrize("name", ["pipe", "folder", "loop", "empty", "nobody", "number", "nothing", "bytes", "json"])
def test_names_that_lead_to_no_file(name, find, tmp_path):
    path = tmp_path / "no.parquet"
    if name == "pipe":
        os.mkfifo(path)
    elif name == "folder":
        path.mkdir()
    elif name == "loop":
        path.symlink_to(path)
    elif name in ("empty", "json"):
        path.write_text("" if name == "empty" else "[" * 100_000)
    given = {"nobody": "~nobody-of-this-name/a.parquet", "number": 5, "nothing": "[null]", "bytes": "'\\0.parquet'"}
    assert errors(find(given.get(name, path)))


@pytest.mark.parametrize(
    "metadata", ["", "[", "[1]", "null", '{"version": 1, "sets": 5}', '{"version": 1, "sets": [[]]}']
)
def test_damaged_facts_are_named(metadata, find, tmp_path):
    table = pa.Table.from_pylist([base_row(number) for number in range(ROWS)], schema=SCHEMA)
    table = table.replace_schema_metadata({"verl_gndpo": metadata, "huggingface": metadata})
    pq.write_table(table, tmp_path / "train.parquet")
    expect(find(tmp_path / "train.parquet"), "error", "train.parquet", "metadata verl_gndpo", "convert the set again")


def test_rows_that_share_their_seeds_are_a_warning(find, tmp_path):
    path = tmp_path / "train.parquet"
    rows = [base_row(number) for number in range(ROWS)]
    rows[1]["extra_info"]["index"] = rows[2]["extra_info"] = None
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    seeded = "algorithm.gndpo.rollout_seed=5"
    expect(find(path, seeded), "warning", "train.parquet: 2 rows lack extra_info.index", "rollout_seed=5")
    assert not [check for check in find(path) if check.status != "ok"]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA).drop_columns(["extra_info"]), path)
    expect(find(path, seeded), "warning", f"{ROWS} rows lack extra_info.index")
