# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from examples.quickstart import diagrams
from examples.quickstart.tiny_vlm import build_tiny_vlm

# So many tokens that the vocabulary needs no padding: verl never samples from the padded tail, which a model with
# random weights would, and the rollout's probabilities could not equal the actor's.
VOCAB = 370


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Folder with `student` and `teacher`, random weights, the teacher deeper."""
    path = tmp_path_factory.mktemp("models")
    build_tiny_vlm(path / "student", seed=0, vocab=VOCAB)
    build_tiny_vlm(path / "teacher", seed=1, vocab=VOCAB, layers=3)
    return path


@pytest.fixture(scope="session")
def dice(tmp_path_factory) -> Path:
    """Folder with train.parquet and test.parquet of the quickstart's problems."""
    path = tmp_path_factory.mktemp("dice")
    diagrams.write_dataset(path)
    return path
