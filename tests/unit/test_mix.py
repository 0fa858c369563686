# SPDX-License-Identifier: Apache-2.0
"""data_prep/mix.py: the rows that it joins, those that it keeps out of training, and failures that change nothing."""

import os
import sys
from collections import Counter
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import mix
from tests.data_files import ROOT, encoded, picture, run_here, write_rows
from verl_gndpo.conversion import ConversionError, SourceError
from verl_gndpo.conversion import write as write_module
from verl_gndpo.conversion.lengths import load_measure
from verl_gndpo.conversion.row import SCHEMA
from verl_gndpo.conversion.verify import import_reader
from verl_gndpo.data_facts import FileFacts, SetFacts, read_facts

TEMPORARY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def row(name: str, number: int, *, image: int | None = None, question: str | None = None, **info) -> dict:
    """A row as a converter writes it; `number` makes its image and its question unless they are given."""
    question = f"<image>What is {number}?" if question is None else question
    return {
        "data_source": f"hub/{name}",
        "prompt": [{"role": "user", "content": f"<image>{question} Box it.".replace("<image><image>", "<image>")}],
        "images": [{"bytes": picture(number if image is None else image), "path": None}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(number)},
        "extra_info": {
            "split": "train",
            "index": number,
            "id": f"{name}-train-{number}",
            "answer": str(number),
            "question": question,
            "answer_type": "number",
            "choices": ["1", "2"],
            "tolerance": 0.5,
            "unmatchable": False,
            "meta": '{"subject": "x"}',
            **info,
        },
    }


def write(path: Path, rows: list[dict], facts: FileFacts | None = None) -> Path:
    return write_rows(path, rows, SCHEMA.with_metadata({**SCHEMA.metadata, **(facts.metadata() if facts else {})}))


def facts_of(name: str, **changes) -> SetFacts:
    return SetFacts(**{"name": name, "hub_id": f"hub/{name}", "license": "MIT", "answer_types": ("number",)} | changes)


def make(folder: Path, name: str, numbers, **changes) -> Path:
    """Write a set as a converter does; `changes` are of its facts."""
    facts = FileFacts(name, (facts_of(name, **changes),))
    return write(folder / name / "train.parquet", [row(name, number) for number in numbers], facts)


def read(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def ids(path: Path) -> list[str]:
    return [found["extra_info"]["id"] for found in read(path)]


def sets(path: Path) -> Counter:
    return Counter(found["data_source"].removeprefix("hub/") for found in read(path))


def files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def two(tmp_path) -> list[Path]:
    return [make(tmp_path, "a", range(30)), make(tmp_path, "b", range(100, 160))]


# Joining


def test_without_weights_every_row_is_joined_in_the_order_of_its_file(two, tmp_path):
    mix.mix(two, tmp_path / "out")
    found = ids(tmp_path / "out" / "train.parquet")
    for name, numbers in (("a", range(30)), ("b", range(100, 160))):
        assert [one for one in found if one[0] == name] == [f"{name}-train-{number}" for number in numbers]
    # Joined evenly, not one file after the other.
    assert 5 <= sum(one[0] == "a" for one in found[:45]) <= 25
    assert files(tmp_path / "out") == ["train.parquet"]


def test_rows_are_joined_unchanged(two, tmp_path):
    mix.mix(two, tmp_path / "out")
    source = {one["extra_info"]["id"]: one for path in two for one in read(path)}
    joined = read(tmp_path / "out" / "train.parquet")
    assert {one["extra_info"]["id"]: one for one in joined} == source


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weights": [1, 2]}, {"a": 30, "b": 60}),
        ({"weights": [1, 1]}, {"a": 30, "b": 30}),
        ({"weights": [0.1, 0.3]}, {"a": 20, "b": 60}),
        ({"weights": [1, 2], "rows": 31}, {"a": 10, "b": 21}),
        ({"counts": [7, 60]}, {"a": 7, "b": 60}),
    ],
)
def test_weights_and_counts_say_how_many_rows_of_each_set(two, tmp_path, options, expected):
    mix.mix(two, tmp_path / "out", **options)
    assert sets(tmp_path / "out" / "train.parquet") == expected
    assert len(set(ids(tmp_path / "out" / "train.parquet"))) == sum(expected.values())


@given(
    have=st.lists(st.integers(1, 10**6), min_size=1, max_size=5),
    weights=st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5),
    rows=st.none() | st.integers(1, 10**6),
)
def test_weights_are_kept_but_for_rounding(have, weights, rows):
    weights = weights[: len(have)]
    numbers = mix.shares(have, weights, rows)
    parts = [Fraction(str(weight)) for weight in weights]
    if rows is None:
        size = min(number / part for number, part in zip(have, parts, strict=True)) * sum(parts)
        assert all(number <= most for number, most in zip(numbers, have, strict=True))
        assert any(number == most for number, most in zip(numbers, have, strict=True))
    else:
        size = rows
        assert sum(numbers) == rows
    for number, part in zip(numbers, parts, strict=True):
        assert abs(number - size * part / sum(parts)) < 1


def test_a_seed_fixes_the_file_and_another_gives_other_rows(two, tmp_path):
    for out, seed in (("one", 3), ("again", 3), ("other", 4)):
        mix.mix(two, tmp_path / out, weights=[1, 1], rows=20, seed=seed)
    one, again, other = (tmp_path / out / "train.parquet" for out in ("one", "again", "other"))
    assert one.read_bytes() == again.read_bytes()
    assert set(ids(one)) != set(ids(other))
    mix.mix(two, tmp_path / "all", seed=1)
    mix.mix(two, tmp_path / "all other", seed=2)
    first, second = ids(tmp_path / "all" / "train.parquet"), ids(tmp_path / "all other" / "train.parquet")
    assert first != second and set(first) == set(second)


def test_the_draw_of_a_seed_is_the_same_on_every_machine(two, tmp_path):
    mix.mix(two, tmp_path / "out", counts=[2, 4], seed=0)
    drawn = ["b-102", "b-126", "b-148", "a-12", "b-156", "a-27"]
    assert [one.replace("train-", "") for one in ids(tmp_path / "out" / "train.parquet")] == drawn


# One problem, twice


def test_a_problem_of_an_earlier_file_is_left_out_of_the_later_one(tmp_path):
    first = make(tmp_path, "a", [1, 2, 3])
    second = make(tmp_path, "b", [3, 4, 4])
    report = mix.mix([first, second], tmp_path / "out")
    assert sorted(ids(tmp_path / "out" / "train.parquet")) == ["a-train-1", "a-train-2", "a-train-3", "b-train-4"]
    assert "left out 2 x problem of an earlier row: b-train-3 (a-train-3), b-train-4 (b-train-4)" in report
    mix.mix([second, first], tmp_path / "out")
    assert sorted(ids(tmp_path / "out" / "train.parquet")) == ["a-train-1", "a-train-2", "b-train-3", "b-train-4"]


SAME = {
    "placeholder elsewhere": row("b", 1, question="What is 1?<image>"),
    "white space and case": row("b", 1, question="<image>\n what  IS\t1? "),
    "Unicode's compatibility forms": row("b", 1, question="<image>Ｗｈａｔ is １?"),
    "encoded again": row("b", 1) | {"images": [{"bytes": picture(1, compress_level=0), "path": None}]},
    "other format": row("b", 1) | {"images": [{"bytes": picture(1, kind="BMP"), "path": None}]},
    "with a palette": row("b", 1)
    | {"images": [{"bytes": encoded(Image.open(BytesIO(picture(1))).quantize(2)), "path": None}]},
    "other answer": row("b", 1) | {"reward_model": {"style": "rule", "ground_truth": "one"}},
}
OTHER = {
    "other image": row("b", 1, image=2),
    "other question": row("b", 1, question="<image>What is 1.0?"),
    "one more image": row("b", 1) | {"images": [{"bytes": picture(1), "path": None}] * 2},
    "no image": row("b", 1) | {"images": []},
}


@pytest.mark.parametrize(("other", "written"), [(name, 1) for name in SAME] + [(name, 2) for name in OTHER])
def test_what_counts_as_the_same_problem(tmp_path, other, written):
    second = write(tmp_path / "b" / "train.parquet", [(SAME | OTHER)[other]])
    mix.mix([make(tmp_path, "a", [1]), second], tmp_path / "out")
    assert len(ids(tmp_path / "out" / "train.parquet")) == written


def test_images_in_another_order_make_another_problem(tmp_path):
    images = [{"bytes": picture(number), "path": None} for number in (1, 2)]
    rows = [row("a", 1) | {"images": images}, row("a", 1, id="a-2") | {"images": images[::-1]}]
    mix.mix([write(tmp_path / "a" / "train.parquet", rows)], tmp_path / "out")
    assert len(ids(tmp_path / "out" / "train.parquet")) == 2


@pytest.mark.parametrize("missing", [None, ""])
def test_the_message_stands_in_for_a_missing_question(tmp_path, missing):
    rows = [row("a", 1, id="a-1"), row("a", 1, id="a-2"), row("a", 1, question="<image>Other", id="a-3")]
    for one in rows:
        one["extra_info"]["question"] = missing
    mix.mix([write(tmp_path / "a" / "train.parquet", rows)], tmp_path / "out")
    assert sorted(ids(tmp_path / "out" / "train.parquet")) == ["a-1", "a-3"]


# Validation


def test_a_problem_of_validation_is_kept_out_of_train_and_reported(tmp_path):
    train = [make(tmp_path, "a", range(4)), make(tmp_path, "b", [10, 11, 12, 3])]
    val = [make(tmp_path, "v", [2, 3, 3, 90]), make(tmp_path, "w", [11, 3])]
    report = mix.mix(train, tmp_path / "out", val=val)
    assert sorted(ids(tmp_path / "out" / "train.parquet")) == ["a-train-0", "a-train-1", "b-train-10", "b-train-12"]
    # Validation is never changed: not even by its own duplicates.
    assert ids(tmp_path / "out" / "val.parquet") == [
        *(f"v-train-{n}" for n in (2, 3, 3, 90)),
        "w-train-11",
        "w-train-3",
    ]
    lines = [line.split() for line in report.splitlines()]
    assert lines[0] == ["file", "read", "duplicate", "in", "val", "val", "image", "written"]
    assert ["train:", "a/train.parquet", "4", "0", "2", "0", "2"] in lines
    assert ["train:", "b/train.parquet", "4", "0", "2", "0", "2"] in lines
    assert ["val:", "v/train.parquet", "4", "0", "0", "0", "4"] in lines
    assert "  left out 2 x problem of v/train.parquet: a-train-2 (v-train-2), a-train-3 (v-train-3)" in report
    assert "  left out 1 x problem of w/train.parquet: a-train-3 (w-train-3)" in report
    assert "  left out 2 x problem of w/train.parquet: b-train-11 (w-train-11), b-train-3 (w-train-3)" in report
    assert [line for line in lines if line[0].startswith("hub/")] == [
        ["hub/a", "2", "0"],
        ["hub/b", "2", "0"],
        ["hub/v", "0", "4"],
        ["hub/w", "0", "2"],
    ]


@pytest.mark.parametrize("drop", [False, True])
def test_rows_that_share_an_image_with_validation_are_left_out_on_demand(tmp_path, drop):
    rows = [row("a", 1), row("a", 2, question="<image>Another question"), row("a", 3)]
    train = write(tmp_path / "a" / "train.parquet", [*rows, row("a", 9, image=2, question="<image>A third")])
    report = mix.mix([train], tmp_path / "out", val=[make(tmp_path, "v", [2, 3])], drop_shared_images=drop)
    kept = ["a-train-1"] if drop else ["a-train-1", "a-train-2", "a-train-9"]
    assert ids(tmp_path / "out" / "train.parquet") == kept
    verb = "left out" if drop else "kept"
    image = "image of v/train.parquet, with another question"
    assert f"  {verb} 2 x {image}: a-train-2 (v-train-2), a-train-9 (v-train-2)" in report
    assert ["train:", "a/train.parquet", "4", "0", "1", "2", str(len(kept))] in [
        line.split() for line in report.splitlines()
    ]


problems = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=12)


def from_problems(folder: Path, name: str, made: list[tuple[int, int]]) -> Path:
    """A set whose rows have the given pairs of image and question."""
    rows = [
        row(name, place, image=image, question=f"<image>Question {question}")
        for place, (image, question) in enumerate(made)
    ]
    return write(folder / name / "train.parquet", rows)


@TEMPORARY
@given(first=problems, second=problems, held=problems, drop=st.booleans())
def test_every_row_is_accounted_for_and_none_of_validation_is_trained_on(tmp_path, first, second, held, drop):
    held_images = {image for image, _ in held}
    left = [
        pair for pair in dict.fromkeys([*first, *second]) if pair not in held and not (drop and pair[0] in held_images)
    ]
    train = [from_problems(tmp_path, "a", first), from_problems(tmp_path, "b", second)]
    val = [from_problems(tmp_path, "v", held)]
    out = tmp_path / "out" / "train.parquet"
    if not left:
        with pytest.raises(ConversionError, match="no row is left"):
            mix.mix(train, out.parent, val=val, drop_shared_images=drop)
        return
    report = mix.mix(train, out.parent, val=val, drop_shared_images=drop)
    sources = dict(zip("ab", (first, second), strict=True))
    written = [sources[name[0]][int(name.split("-")[-1])] for name in ids(out)]
    assert sorted(written) == sorted(left)
    assert not set(written) & set(held)
    assert len(ids(out.parent / "val.parquet")) == len(held)
    for line in report.splitlines():
        if line.startswith("train: "):
            read_rows, duplicate, contaminated, shared, kept = map(int, line.split()[2:])
            assert kept == read_rows - duplicate - contaminated - (shared if drop else 0)


# Ids and metadata


def test_one_id_for_two_rows_names_both_files(tmp_path):
    a, b = make(tmp_path, "a", [1]), write(tmp_path / "b" / "train.parquet", [row("b", 2, id="a-train-1")])
    with pytest.raises(ConversionError, match=rf"{a} and {b} have rows that differ under one id, a-train-1"):
        mix.mix([a, b], tmp_path / "out")
    with pytest.raises(ConversionError, match="differ under one id"):
        mix.mix([make(tmp_path, "c", [7])], tmp_path / "out", val=[a, b])
    assert not (tmp_path / "out").exists()
    # In validation the same row may stand in two files.
    mix.mix([b], tmp_path / "out", val=[a, write(tmp_path / "d" / "train.parquet", [row("a", 1)])])
    assert ids(tmp_path / "out" / "val.parquet") == ["a-train-1"] * 2


def facts_in(path: Path) -> FileFacts:
    return read_facts(pq.read_schema(path).metadata)


def test_a_mix_keeps_the_facts_of_each_set_and_names_no_machine(two, tmp_path):
    val = make(tmp_path, "v", [500], license="CC", validation_only="evaluation only.", answer_types=("choice", "text"))
    mix.mix(two, tmp_path / "out", weights=[1, 2], rows=9, seed=5, val=[val])
    for name in ("train", "val"):
        metadata = pq.ParquetFile(tmp_path / "out" / f"{name}.parquet").schema_arrow.metadata
        assert metadata[b"huggingface"] == SCHEMA.metadata[b"huggingface"]
        assert str(tmp_path).encode() not in metadata[b"verl_gndpo"]
    options = {"seed": 5, "weights": [1, 2], "validation": ["v/train.parquet"]}
    files = [{"file": "a/train.parquet", "rows": 3}, {"file": "b/train.parquet", "rows": 6}]
    assert facts_in(tmp_path / "out" / "train.parquet") == FileFacts(
        "mix", (facts_of("a"), facts_of("b")), options | {"files": files}
    )
    assert facts_in(tmp_path / "out" / "val.parquet") == FileFacts(
        "mix", facts_in(val).sets, options | {"files": [{"file": "v/train.parquet", "rows": 1}]}
    )


def test_a_mix_of_mixes_states_each_set_once_and_only_those_that_it_has_rows_of(tmp_path):
    a, b = make(tmp_path, "a", [1, 2]), make(tmp_path, "b", [1, 3])
    mix.mix([a, b], tmp_path / "ab")
    mix.mix([make(tmp_path, "c", [4]), a], tmp_path / "ca")
    mix.mix([tmp_path / "ab" / "train.parquet", tmp_path / "ca" / "train.parquet"], tmp_path / "out")
    assert facts_in(tmp_path / "out" / "train.parquet").sets == (facts_of("a"), facts_of("b"), facts_of("c"))
    mix.mix([a, make(tmp_path, "d", [2])], tmp_path / "out")
    assert facts_in(tmp_path / "out" / "train.parquet").sets == (facts_of("a"),)


def test_a_set_for_validation_only_is_not_trained_on(tmp_path):
    val = make(tmp_path, "v", [1], validation_only="its authors allow evaluation only.")
    with pytest.raises(SourceError, match="must not be trained on: its authors"):
        mix.mix([val], tmp_path / "out")
    mix.mix([make(tmp_path, "a", [2])], tmp_path / "out", val=[make(tmp_path, "w", [3]), val])
    # The reason stays with the rows when they are joined with others.
    with pytest.raises(SourceError, match="must not be trained on: its authors"):
        mix.mix([tmp_path / "out" / "val.parquet"], tmp_path / "again")


def test_a_file_with_facts_of_another_version_is_refused(tmp_path):
    path = write_rows(tmp_path / "a.parquet", [row("a", 1)], SCHEMA.with_metadata({"verl_gndpo": '{"version": 2}'}))
    with pytest.raises(SourceError, match=rf"{path}: .* version 2, expected 1\. Convert the set again"):
        mix.mix([path], tmp_path / "out")


def test_a_file_without_facts_is_mixed_and_adds_none(tmp_path):
    mix.mix([write(tmp_path / "n" / "train.parquet", [row("n", 1)]), make(tmp_path, "a", [2])], tmp_path / "out")
    assert sets(tmp_path / "out" / "train.parquet") == {"n": 1, "a": 1}
    assert facts_in(tmp_path / "out" / "train.parquet").sets == (facts_of("a"),)


# Sources


def info_schema(**changes: pa.DataType | None) -> pa.Schema:
    """Return `SCHEMA` with other types in extra_info; None removes the field."""
    place = SCHEMA.get_field_index("extra_info")
    types = {inner.name: inner.type for inner in SCHEMA.field("extra_info").type} | changes
    return SCHEMA.set(place, pa.field("extra_info", pa.struct([(name, kind) for name, kind in types.items() if kind])))


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (SCHEMA.remove(SCHEMA.get_field_index("images")), "column images is missing, expected: list"),
        (SCHEMA.append(pa.field("video", pa.string())), "column video is string, expected: no such column"),
        (info_schema(id=None), "column extra_info.id is missing, expected: string"),
        (info_schema(answer_type=None), "column extra_info.answer_type is missing, expected: string"),
        (info_schema(tolerance=pa.string()), "column extra_info.tolerance is string, expected: double"),
        (pa.schema([("extra_info", pa.string())]), "column data_source is missing"),
    ],
)
def test_other_columns_are_an_error_that_names_file_and_column(tmp_path, schema, says):
    path = tmp_path / "wrong" / "train.parquet"
    path.parent.mkdir()
    pq.write_table(schema.empty_table(), path)
    with pytest.raises(SourceError, match=rf"{path}: {says}.*Convert the set again"):
        mix.mix([make(tmp_path, "a", [1]), path], tmp_path / "out")


BROKEN_ROWS = {
    "image does not decode": row("a", 1) | {"images": [{"bytes": picture(1)[:-30], "path": None}]},
    "row 1 has no images": row("a", 1) | {"images": None},
    "row 1 has no extra_info.id": row("a", 1, id=None),
}


@pytest.mark.parametrize("says", BROKEN_ROWS)
def test_a_broken_row_is_an_error_that_names_the_file(tmp_path, says):
    path = write(tmp_path / "a" / "train.parquet", [row("a", 0), BROKEN_ROWS[says]])
    with pytest.raises(SourceError, match=rf"{path}: .*{says}"):
        mix.mix([path], tmp_path / "out")


def test_a_file_that_breaks_off_is_an_error(tmp_path):
    path = tmp_path / "train.parquet"
    table = pa.Table.from_pylist([row("a", number) for number in range(64)], schema=SCHEMA)
    pq.write_table(table, path, row_group_size=16, compression="gzip")
    chunk = pq.ParquetFile(path).metadata.row_group(2).column(0)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(SourceError, match=rf"{path} breaks off after row 32"):
        mix.mix([path], tmp_path / "out")


# Command line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--train A B --weights 1", "--weights has 1 numbers, --train 2 files"),
        ("--train A B --counts 1 2 3", "--counts has 3 numbers, --train 2 files"),
        ("--train A B --weights 1 -2", "above 0, -2 is not"),
        ("--train A B --weights 1 nan", "above 0, nan is not"),
        ("--train A B --weights 1 1 --rows 0", "above 0, 0 is not"),
        ("--train A B --counts 1 1 --rows 5", "leave --weights and --rows out"),
        ("--train A B --counts 1 1 --weights 1 2", "leave --weights and --rows out"),
        ("--train A B --rows 5", "give --weights too"),
        ("--train A none.parquet", "none.parquet does not exist"),
        ("--train A .", "is not a file"),
        ("--train A text.parquet", "text.parquet is not a readable parquet file"),
        ("--train A B --val none.parquet", "none.parquet does not exist"),
        ("--train A B --counts 30 61", "has 60 of its 60 rows left after de-duplication, but 61 are wanted"),
        ("--train A B --weights 1 2 --rows 100", "has 30 of its 30 rows left after de-duplication, but 33 are wanted"),
        ("--train A A B --weights 1 1 1", "has no row left after de-duplication: leave the file out"),
        ("--train A B --weights 1 1000 --rows 20", "gets no row by its weight"),
        ("--train A --val A", "no row is left to train on"),
        ("--train train.parquet A", "train.parquet would be overwritten"),
        ("--train A --val val.parquet", "val.parquet would be overwritten"),
    ],
)
def test_errors_are_one_line_and_change_nothing(two, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.parquet").write_text("text")
    for name in ("train", "val"):
        write(tmp_path / f"{name}.parquet", [row("c", 900)])
    before = files(tmp_path), (tmp_path / "train.parquet").read_bytes()
    named = {"A": str(two[0]), "B": str(two[1])}
    assert mix.main([named.get(word, word) for word in arguments.split()] + ["--local_save_dir", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert says in line and captured.err.rstrip().endswith(line)
    assert before == (files(tmp_path), (tmp_path / "train.parquet").read_bytes())


def test_a_folder_that_cannot_be_written_is_a_one_line_error(two, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert mix.main(["--train", str(two[0]), "--local_save_dir", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: cannot write to")


def test_it_runs_as_a_plain_script(two, tmp_path):
    script = [sys.executable, str(ROOT / "data_prep" / "mix.py"), "--train", *map(str, two)]
    more = ["--weights", "1", "0.5", "--rows", "12", "--local_save_dir", str(tmp_path / "out")]
    result = run_here([*script, *more], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"wrote to {tmp_path / 'out'}"
    assert sets(tmp_path / "out" / "train.parquet") == {"a": 8, "b": 4}


def test_dry_run_reports_and_writes_nothing(two, tmp_path, capsys):
    arguments = ["--train", *map(str, two), "--local_save_dir", str(tmp_path / "out")]
    assert mix.main([*arguments, "--dry_run"]) == 0
    dry = capsys.readouterr().out.splitlines()
    assert dry[-1] == "nothing written: --dry_run"
    assert not (tmp_path / "out").exists()
    assert mix.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == dry[:-1]


# Writing


def test_row_groups_stay_small(tmp_path, monkeypatch):
    many = make(tmp_path, "a", range(150))

    def groups(out: str) -> list[int]:
        mix.mix([many], tmp_path / out)
        metadata = pq.ParquetFile(tmp_path / out / "train.parquet").metadata
        return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]

    assert groups("rows") == [64, 64, 22]
    monkeypatch.setattr(write_module, "ROW_GROUP_BYTES", 50 * len(picture(1)))
    assert max(groups("bytes")) <= 50


def test_memory_does_not_grow_with_the_images(tmp_path, monkeypatch):
    sources = []
    for name in ("a", "b"):
        rows = [row(name, number) for number in range(320)]
        for one in rows:
            noise = Image.frombytes("RGB", (100, 100), os.urandom(30_000))
            one["images"][0]["bytes"] = encoded(noise, compress_level=0)
        sources.append(tmp_path / name / "train.parquet")
        sources[-1].parent.mkdir()
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sources[-1], row_group_size=16)
        del rows, one
    assert sum(path.stat().st_size for path in sources) > 18_000_000
    monkeypatch.setattr(write_module, "ROW_GROUP_BYTES", 500_000)
    before, peaks = pa.total_allocated_bytes(), []

    def watched(function):
        def call(*arguments, **options):
            peaks.append(pa.total_allocated_bytes() - before)
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(mix.Source, "digest", watched(mix.Source.digest))
    monkeypatch.setattr(pq.ParquetWriter, "write_table", watched(pq.ParquetWriter.write_table))
    mix.mix(sources, tmp_path / "out")
    assert len(peaks) >= 640 + 40
    assert max(peaks) < 6_000_000


KILLED = """
import os, signal, sys
from pathlib import Path
import pyarrow.parquet as pq
from data_prep import mix

write_table, written = pq.ParquetWriter.write_table, []

def dying(self, table):
    write_table(self, table)
    written.append(table)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

pq.ParquetWriter.write_table = dying
mix.main(sys.argv[1:])
"""


def test_a_killed_run_leaves_the_older_file_and_the_next_one_clears_up(tmp_path):
    source, out = make(tmp_path, "a", range(150)), tmp_path / "out"
    out.mkdir()
    (out / "train.parquet").write_bytes(b"older")
    arguments = ["--train", str(source), "--local_save_dir", str(out)]
    result = run_here([sys.executable, "-c", KILLED, *arguments])
    assert result.returncode == -9, result.stderr
    assert (out / "train.parquet").read_bytes() == b"older"
    assert len(files(out)) == 2  # the unfinished file is in a hidden folder
    assert mix.main(arguments) == 0
    assert files(out) == ["train.parquet"]
    assert len(ids(out / "train.parquet")) == 150


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failure_replaces_neither_file(two, tmp_path, monkeypatch, capsys, failing):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("train", "val"):
        (out / f"{name}.parquet").write_bytes(b"older")
    write_table, calls = pq.ParquetWriter.write_table, []

    def full_disk(self, table):
        calls.append(table)
        if len(calls) == failing:
            raise OSError("No space left on device")
        write_table(self, table)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full_disk)
    assert mix.main(["--train", str(two[0]), "--val", str(two[1]), "--local_save_dir", str(out)]) == 1
    assert f"error: cannot write to {out} (OSError: No space left" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == dict.fromkeys(
        ("train.parquet", "val.parquet"), b"older"
    )


# Reading back through verl


def test_verl_reads_every_row_of_a_mix(two, tmp_path):
    from omegaconf import OmegaConf

    reader, why = import_reader()
    assert reader is not None, f"verl's RLHFDataset cannot be imported: {why}"
    mix.mix(two, tmp_path / "out", val=[make(tmp_path, "v", [1, 400])])
    measure = load_measure(None)
    config = OmegaConf.create(
        {"max_prompt_length": 4096, "filter_overlong_prompts_workers": None, "cache_dir": str(tmp_path / "cache")}
    )
    for name in ("train", "val"):
        path = tmp_path / "out" / f"{name}.parquet"
        dataset = reader(str(path), measure.tokenizer, config, processor=measure.processor)
        stored = read(path)
        assert len(dataset) == len(stored) == {"train": 89, "val": 2}[name]
        for place in (0, len(stored) - 1):
            parts = dataset[place]["raw_prompt"][0]["content"]
            assert [part["type"] for part in parts] == ["image", "text"]
            assert parts[0]["image"].tobytes() == Image.open(BytesIO(stored[place]["images"][0]["bytes"])).tobytes()
            for key in ("data_source", "reward_model", "extra_info"):
                assert dataset[place][key] == stored[place][key]


def test_rows_that_must_not_be_trained_on_are_known_without_metadata(tmp_path):
    """A file that was rewritten since, so that only its rows say where they come from."""
    rewritten = write(tmp_path / "a.parquet", [row("v", 1) | {"data_source": "AI4Math/MathVista"}])
    with pytest.raises(SourceError, match=r"a\.parquet holds rows of AI4Math/MathVista: .* --val"):
        mix.mix([rewritten], tmp_path / "out")
