# SPDX-License-Identifier: Apache-2.0
"""`verl-gndpo data`: the converters' own code, command lines and exit codes."""

import json
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.data_files import ROOT, geo3k_row, run, run_here, write_rows
from verl_gndpo.cli import app
from verl_gndpo.conversion import sets

SLOW = {"torch", "verl", "ray", "transformers", "datasets", "vllm"}
POOL_ROWS = 260  # enough for worker processes, which import the converter by its name


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "train.parquet"
    return write_rows(path, [geo3k_row(number) for number in range(POOL_ROWS)])


def test_a_clone_on_the_path_runs_its_own_converters(source, tmp_path):
    """Whatever is installed: worker processes import the converter again, and find the clone's."""
    clone = tmp_path / "clone"
    for name in ("verl_gndpo", "data_prep"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    changed = clone / "data_prep" / "geo3k.py"
    changed.write_text(changed.read_text().replace('license="MIT"', 'license="of the clone"'))
    command = [sys.executable, "-m", "verl_gndpo.cli", "data"]
    arguments = ["--local_dataset_path", source, "--skip_verify", "--num_proc", "2", "--local_save_dir", tmp_path]
    converted = run([*command, "geo3k", *arguments], tmp_path, PYTHONPATH=str(clone))
    assert converted.returncode == 0, converted.stderr
    stated = json.loads(pq.read_schema(tmp_path / "train.parquet").metadata[b"verl_gndpo"])
    assert stated["sets"][0]["license"] == "of the clone"


def test_help_and_list_import_nothing_that_takes_long(tmp_path):
    code = f"""
import sys
from verl_gndpo.cli import app

for arguments in (["--help"], [], ["list"], ["geo3k", "--help"], ["mix", "--help"]):
    try:
        app(["data", *arguments])
    except SystemExit as ended:
        assert ended.code == 0, arguments
print({SLOW} & set(sys.modules), file=sys.stderr)
"""
    shown = run_here([sys.executable, "-c", code], tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "set()\n")


def called(arguments: list[str]) -> int:
    """Call `verl-gndpo data` in this process; return its exit code."""
    with pytest.raises(SystemExit) as ended:
        app(["data", *arguments])
    return ended.value.code


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_names_every_command_with_its_first_line(arguments, capsys):
    assert called(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, module in sets.converters().items():
        assert f" {name} {module.__doc__.splitlines()[0]}" in text
    assert " list print the table" in text and " mix Join converted sets" in text


@pytest.mark.parametrize("name", [*sets.converters(), "mix"])
def test_options_are_those_of_the_script(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # so that no hub id is wrapped
    script = run_here([sys.executable, f"data_prep/{name}.py", "--help"])
    assert script.returncode == 0 and called([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: verl-gndpo data {name} ")
    assert shown.partition("\n\n")[2] == script.stdout.partition("\n\n")[2]
    if name != "mix":
        assert "--local_dataset_path" in shown and sets.converters()[name].RECIPE.hub_id in " ".join(shown.split())
        assert ("--include_unlicensed" in shown) == (name == "logicvista")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["geo3k", "--local_dataset_path", "nowhere.parquet"], 1, "error: nowhere.parquet does not exist"),
        (["geo3k", "--limit", "0"], 2, "0 is not 1 or more"),
        (["mix", "--train", "nowhere.parquet"], 1, "nowhere.parquet does not exist"),
        (["mix"], 2, "--train"),
        (["geo4k"], 2, "invalid choice: 'geo4k'"),
        (["list", "geo3k"], 2, "unrecognized arguments: geo3k"),
    ],
)
def test_exit_codes_are_those_of_the_scripts(arguments, code, says, capsys):
    assert called(arguments) == code
    assert says in capsys.readouterr().err


def test_the_list_says_what_may_not_be_trained_on(capsys):
    assert called(["list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == {"name", *sets.converters()}
    assert [name for name, line in lines.items() if line.endswith("validation only")] == ["mathvista"]
    assert "train 2,101, validation 300, test 601" in lines["geo3k"]
    assert "sample_variant1 to sample_variant10: 501 each" in lines["dynamath"]


def test_the_list_in_markdown_is_the_table_of_the_docs(capsys):
    assert called(["list", "--markdown"]) == 0
    assert capsys.readouterr().out in (ROOT / "docs" / "data.md").read_text()
