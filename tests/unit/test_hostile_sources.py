# SPDX-License-Identifier: Apache-2.0
"""More than a thousand damaged rows through the converters: each is dropped with a reason, or converted to what verl
reads, and the rows beside it are converted as ever.

A failure names its seed. `GNDPO_HOSTILE_SOURCES` sets how many rows are drawn.
"""

import importlib
import json
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import geo3k, mmk12
from tests.data_files import picture
from verl_gndpo import conversion
from verl_gndpo.conversion.images import ImageStore
from verl_gndpo.conversion.prompt import load_prompt
from verl_gndpo.conversion.row import ConvertedRow
from verl_gndpo.conversion.split import SourceRow
from verl_gndpo.conversion.write import Converter
from verl_gndpo.doctor.parquet import DataFile

ROWS = int(os.environ.get("GNDPO_HOSTILE_SOURCES", 2_400))
SEEDS = 8
RECIPES = [
    importlib.import_module(f"data_prep.{name}").RECIPE
    for name in (
        *("clevr_count", "dynamath", "geo3k", "geoqa", "logicvista", "mathverse", "mathvision", "mathvista"),
        *("mmk12", "openr1_8k", "virl39k", "wemath"),
    )
]
TEXTS = (
    *(
        "",
        " ",
        "\0",
        "\ud83d",
        "\u202e",
        "x" * 100_000,
        "<image>",
        "<image1><image2>",
        "<video>",
        "<|image_pad|>",
        "$",
        "$$",
    ),
    *(
        "\\boxed{",
        "\\boxed{}",
        "\\frac{1}{",
        "A",
        "(B)",
        "A, B",
        "A. x B. y",
        "1/0",
        "nan",
        "1e999",
        "[",
        '{"a":',
        "None",
    ),
    *(
        "/etc/passwd",
        "../../x.png",
        "file:///etc/passwd",
        "https://example.org/a.png",
        "data:image/png;base64,%%%%",
        "a.png",
    ),
)
VALUES = (
    *(None, True, False, 0, -1, 10**400, 1.5, float("nan"), float("inf"), [], [[]], [None], {}, {"bytes": None}),
    *({"bytes": "text"}, {"path": 5}, {"bytes": [1]}, [["a", None], 3], {"a": {"b": [{}]}}, [{"path": "/etc/passwd"}]),
    *TEXTS,
)


def damaged(row: dict, rng: random.Random) -> dict:
    """Return a row with one to three entries changed, removed or added."""
    row = dict(row)
    for _ in range(rng.choice([1, 1, 2, 3])):
        key = rng.choice(list(row) or ["x"])
        how = rng.choice(["set", "set", "set", "cut", "remove", "add"])
        if how == "remove":
            row.pop(key, None)
        elif how == "add":
            row[rng.choice(["extra", "images", "", "\0"])] = rng.choice(VALUES)
        elif how == "cut" and isinstance(row.get(key), str):
            row[key] = row[key][: rng.randrange(len(row[key]) + 1)] + rng.choice(TEXTS)
        else:
            row[key] = rng.choice(VALUES)
    return row


def whole(recipe, number: int) -> dict:
    """Return a row with a value in each column of a recipe. Most are of no form that the set has."""
    values = {name: f"value {number}" for name in (*recipe.columns, *recipe.optional)}
    for name in values:
        if "image" in name:
            values[name] = {"bytes": picture(number), "path": None}
        elif name == "answer":
            values[name] = str(number)
    return values


@pytest.mark.parametrize("seed", range(SEEDS))
def test_any_row_of_any_set_is_converted_or_dropped_with_a_reason(seed, tmp_path):
    rng = random.Random(seed)
    prompt, images = load_prompt("think_boxed"), ImageStore([tmp_path])
    for number in range(ROWS // SEEDS):
        recipe = rng.choice(RECIPES)
        row = damaged(whole(recipe, number), rng)
        # What a source gives a converter: a value for each of its columns.
        values = {name: row.get(name) for name in (*recipe.columns, *recipe.optional)}
        ((row_id, outcome),) = Converter(recipe, prompt, "train", images, True)([SourceRow(number, number, values)])
        assert row_id.startswith(recipe.id_prefix or recipe.name)
        if isinstance(outcome, ConvertedRow):
            table = pa.Table.from_pylist([outcome.values], schema=conversion.row.SCHEMA)
            assert table.num_rows == 1 and outcome.pictures
        else:
            assert outcome.reason and len(outcome.detail) < 400


def mmk12_row(number: int) -> dict:
    row = {"id": f"r{number}", "question": f"How long is side {number}?", "answer": str(number), "subject": "math"}
    return row | {"image": f"{number}.png"}


@pytest.mark.parametrize("seed", range(SEEDS))
def test_damaged_records_do_not_touch_those_beside_them(seed, tmp_path, capsys):
    rng = random.Random(seed)
    source, lines, good = tmp_path / "source", [], []
    source.mkdir()
    for number in range(40):
        (source / f"{number}.png").write_bytes(picture(number))
        if number % 4 == 0:
            good.append(f"mmk12-train-r{number}")
            lines.append(json.dumps(mmk12_row(number)))
        elif number % 4 == 1:
            lines.append(rng.choice(["{", "[" * 20_000, "null", "5", '"x"', "\0", '{"id": 1}', "{}", '{"id": NaN']))
        else:
            lines.append(json.dumps(damaged(mmk12_row(number), rng)))
    (source / "train.jsonl").write_text("\n".join(lines), errors="surrogatepass")
    (report,) = conversion.convert(str(source), tmp_path / "out", mmk12.RECIPE, skip_verify=True, max_dropped=1.0)
    written = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    ids = [row["extra_info"]["id"] for row in written]
    assert report.read == 40 and report.written == len(ids) and set(good) <= set(ids) and len(set(ids)) == len(ids)
    columns = {"prompt_key": "prompt", "image_key": "images"}
    file = DataFile(tmp_path / "out" / "train.parquet", columns, "data_source", "data_source")
    assert file.summary.rows == len(ids) and not file.why_not_graded() and not file.rows_without_index


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_damaged_parquet_source_ends_in_one_line(seed, tmp_path, capsys):
    rng = random.Random(seed)
    path = tmp_path / "train.parquet"
    rows = [
        {"problem": f"<image>{n}?", "answer": str(n), "images": [{"bytes": picture(n), "path": None}]} for n in range(8)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    whole_file = path.read_bytes()
    for _ in range(10):
        data = bytearray(whole_file)
        for _ in range(rng.choice([1, 20])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        arguments = ["--local_dataset_path", str(path), "--local_save_dir", str(tmp_path / "out")]
        code = conversion.main(geo3k.RECIPE, None, [*arguments, "--skip_verify", "--max_dropped", "1"])
        said = capsys.readouterr().err
        assert code == 0 or (code == 1 and said.rpartition("error: ")[2].count("\n") == 1), said
