# SPDX-License-Identifier: Apache-2.0
"""A wheel, built as for a release and installed into an empty environment, holds and runs the converters."""

import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.data_files import ROOT, geo3k_row, run, run_here, write_rows
from verl_gndpo.conversion import sets

POOL_ROWS = 260  # enough for worker processes, which import the converter by its name


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "train.parquet"
    return write_rows(path, [geo3k_row(number) for number in range(POOL_ROWS)])


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """A wheel, built from a source archive as a release is, without network or build isolation."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    for name in ("verl_gndpo", "data_prep", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    built = run([sys.executable, "-c", code], folder)
    assert built.returncode == 0, built.stderr
    (archive,) = (folder / "dist").glob("*.tar.gz")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        "dist",
        archive,
    ]
    built = run(pip, folder)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of an environment that has the wheel; its dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("environment")
    made = run([sys.executable, "-m", "venv", "--without-pip", folder], folder)
    assert made.returncode == 0, made.stderr
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    made = run(pip, folder)
    assert made.returncode == 0, made.stdout + made.stderr
    (packages,) = folder.glob("lib/python*/site-packages")
    # A line of a .pth file adds a folder without running that folder's own .pth files, such as an editable install's.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_a_wheel_holds_the_converters_and_the_types_and_no_tests(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        stands_for = archive.read("verl_gndpo/data_prep/__init__.py").decode()
    assert {f"verl_gndpo/data_prep/{name}.py" for name in (*sets.converters(), "mix")} <= names
    assert stands_for == (ROOT / "data_prep" / "__init__.py").read_text()
    assert {"verl_gndpo/py.typed", "verl_gndpo/conversion/pipeline.py"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"verl_gndpo"}
    assert not [name for name in names if "test" in name or "benchmark" in name]


def test_a_wheel_runs_the_converters(installed, source, tmp_path):
    where = run([installed / "python", "-c", "import verl_gndpo; print(verl_gndpo.__file__)"], tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(installed.parent), where.stderr
    command = [installed / "verl-gndpo", "data"]
    shown = run([*command, "--help"], tmp_path)
    assert shown.returncode == 0 and "geo3k" in shown.stdout, shown.stderr
    listed = run([*command, "list"], tmp_path)
    assert (listed.returncode, listed.stdout) == (0, sets.plain_table() + "\n"), listed.stderr
    arguments = ["--local_dataset_path", source, "--skip_verify", "--num_proc", "2", "--local_save_dir"]
    converted = run([*command, "geo3k", *arguments, tmp_path / "wheel"], tmp_path)
    assert converted.returncode == 0, converted.stderr
    script = [sys.executable, ROOT / "data_prep" / "geo3k.py", *arguments, tmp_path / "script"]
    assert run_here(script, tmp_path).returncode == 0
    files = [tmp_path / folder / "train.parquet" for folder in ("wheel", "script")]
    assert pq.read_metadata(files[0]).num_rows == POOL_ROWS
    assert files[0].read_bytes() == files[1].read_bytes()
    mixed = run([*command, "mix", "--train", files[0], "--local_save_dir", tmp_path / "mixed"], tmp_path)
    assert mixed.returncode == 0, mixed.stderr
    assert pq.read_metadata(tmp_path / "mixed" / "train.parquet").num_rows == POOL_ROWS
