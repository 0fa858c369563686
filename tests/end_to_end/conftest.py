# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from examples.quickstart import diagrams
from examples.quickstart.tiny_vlm import build_tiny_vlm

# verl's rollout never samples from the padded tail of a vocabulary, nor an image placeholder. A trained model gives
# them next to no probability, and one with random weights does, so that the rollout's probabilities could not equal the
# actor's. Hence as many tokens as need no padding, and placeholders made improbable.
VOCAB = 370
PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>")


def build_random_vlm(path: Path, **sizes) -> None:
    build_tiny_vlm(path, vocab=VOCAB, **sizes)
    tokenizer = AutoTokenizer.from_pretrained(path)
    weights = load_file(path / "model.safetensors")
    assert len(weights["lm_head.weight"]) == len(tokenizer)
    weights["lm_head.weight"][tokenizer.convert_tokens_to_ids(PLACEHOLDERS)] = 0.0
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Folder with `student` and `teacher`, random weights, the teacher deeper."""
    path = tmp_path_factory.mktemp("models")
    build_random_vlm(path / "student", seed=0)
    build_random_vlm(path / "teacher", seed=1, layers=3)
    return path


@pytest.fixture(scope="session")
def dice(tmp_path_factory) -> Path:
    """Folder with train.parquet and test.parquet of the quickstart's problems."""
    path = tmp_path_factory.mktemp("dice")
    diagrams.write_dataset(path)
    return path
