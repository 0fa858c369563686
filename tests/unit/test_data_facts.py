# SPDX-License-Identifier: Apache-2.0
"""verl_gndpo/data_facts.py: facts survive a parquet file, and damaged ones are an error."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl_gndpo.data_facts import KEY, FactsError, FileFacts, SetFacts, read_facts

ROOT = Path(__file__).resolve().parents[2]
GEO = SetFacts("geo", "me/geo", "MIT", answer_types=("math", "choice"), split="train", prompt_style="plain")
EXAM = SetFacts("exam", "me/exam", "not stated", validation_only="for exams only.")


@pytest.mark.parametrize(
    "facts", [FileFacts("geo", (GEO,)), FileFacts("mix", (GEO, EXAM), {"seed": 3, "files": [{"file": "a", "rows": 1}]})]
)
def test_facts_survive_a_parquet_file_that_is_read_and_written_again(facts, tmp_path):
    schema = pa.schema([("row", pa.int64())], metadata={"huggingface": "{}", **facts.metadata()})
    pq.write_table(pa.table({"row": [1, 2]}, schema=schema), tmp_path / "a.parquet")
    pq.write_table(pq.read_table(tmp_path / "a.parquet").slice(1), tmp_path / "b.parquet")
    metadata = pq.read_schema(tmp_path / "b.parquet").metadata
    assert read_facts(metadata) == facts
    assert metadata[b"huggingface"] == b"{}"


def test_the_metadata_is_json_that_others_can_read():
    stated = json.loads(FileFacts("mix", (GEO, EXAM)).metadata()[b"verl_gndpo"])
    assert (stated["version"], stated["written_by"]) == (1, "mix")
    assert [facts["hub_id"] for facts in stated["sets"]] == ["me/geo", "me/exam"]
    assert stated["sets"][0]["license"] == "MIT" and stated["sets"][0]["answer_types"] == ["math", "choice"]


def test_a_file_may_not_be_trained_on_when_one_of_its_sets_may_not():
    assert FileFacts("geo", (GEO,)).validation_only == ""
    assert FileFacts("mix", (GEO, EXAM)).validation_only == "for exams only."


@pytest.mark.parametrize("metadata", [None, {}, {b"huggingface": b"{}"}])
def test_a_file_of_another_program_states_none(metadata):
    assert read_facts(metadata) is None


VALID = json.loads(FileFacts("geo", (GEO,)).metadata()[KEY])


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        (VALID | {"version": 2}, "has version 2, expected 1"),
        ({key: value for key, value in VALID.items() if key != "version"}, "has version None"),
        ({key: value for key, value in VALID.items() if key != "sets"}, "is damaged .*sets"),
        (VALID | {"more": 1}, "is damaged .*more"),
        (VALID | {"sets": [{"name": "geo"}]}, "is damaged .*answer_types"),
        (VALID | {"sets": [VALID["sets"][0] | {"more": 1}]}, "is damaged .*more"),
        (VALID | {"sets": 5}, "is damaged"),
        ([1], "is damaged"),
        ("text", "is damaged"),
    ],
)
def test_facts_that_cannot_be_read_are_an_error(stated, says):
    with pytest.raises(FactsError, match=says):
        read_facts({KEY: json.dumps(stated).encode()})


@pytest.mark.parametrize("raw", [b"{", b"\xff\xfe"])
def test_metadata_that_is_not_json_is_an_error(raw):
    with pytest.raises(FactsError, match="is damaged"):
        read_facts({KEY: raw})


def test_reading_facts_imports_nothing_heavy():
    code = "import sys, verl_gndpo.data_facts; print({'pyarrow', 'numpy', 'torch', 'verl'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "set()", run.stderr
