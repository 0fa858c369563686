# SPDX-License-Identifier: Apache-2.0
"""A run that could start, for the doctor's tests to spoil."""

import json
import shutil

import pytest
from omegaconf import OmegaConf

from examples.quickstart.tiny_vlm import build_tiny_vlm
from tests.helpers import verl_config
from tests.unit.doctor.helpers import CPU_RUN, write


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    return build_tiny_vlm(tmp_path_factory.mktemp("models") / "student", seed=0)


@pytest.fixture
def teacher(student, tmp_path):
    """A copy of the student's folder, for a test to change."""
    return shutil.copytree(student, tmp_path / "teacher")


@pytest.fixture
def text_model(student, tmp_path):
    """A text-only model with the student's tokenizer."""
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(student / name, folder)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 448, **shape}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    return folder


@pytest.fixture(scope="session")
def run_config():
    config = verl_config(*CPU_RUN)
    OmegaConf.set_struct(config, False)
    return config


@pytest.fixture
def make_config(run_config, student, tmp_path):
    """Builds verl's own config for a run that could start; the overrides, `key=value`, come last."""

    def build(*overrides, teacher=student, rows=4):
        for split in ("train", "test"):
            if not (tmp_path / f"{split}.parquet").exists():
                write(tmp_path / f"{split}.parquet", [("<image>How many?", 1)] * rows)
        own = [
            f"actor_rollout_ref.model.path={student}",
            f"teacher.model.path={teacher}",
            f"data.train_files={tmp_path / 'train.parquet'}",
            f"data.val_files={tmp_path / 'test.parquet'}",
        ]
        return OmegaConf.merge(run_config, OmegaConf.from_dotlist([*own, *overrides]))

    return build


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr("verl_gndpo.doctor.environment.without_accelerator", lambda: True)
    monkeypatch.setattr("verl_gndpo.doctor.settings.without_accelerator", lambda: True)
