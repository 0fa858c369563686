# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from examples.quickstart import diagrams
from tests.tiny_models import build_tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Folder with `student` and `teacher`, random weights, the teacher deeper."""
    path = tmp_path_factory.mktemp("models")
    build_tiny("qwen2_5_vl", path / "student", seed=0)
    build_tiny("qwen2_5_vl", path / "teacher", seed=1, layers=3)
    return path


@pytest.fixture(scope="session")
def dice(tmp_path_factory) -> Path:
    """Folder with train.parquet and test.parquet of the quickstart's problems."""
    path = tmp_path_factory.mktemp("dice")
    diagrams.write_dataset(path)
    return path
