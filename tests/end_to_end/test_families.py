# SPDX-License-Identifier: Apache-2.0
"""The real loop with a Qwen3-VL student and teacher, the student as LoRA adapters beside a frozen model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.harness import Run
from tests.end_to_end.test_training import assert_healthy, assert_moved, overrides, reference_log_probs, settings
from tests.tiny_models import build_tiny


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("qwen3_vl")
    build_tiny("qwen3_vl", path / "student", seed=0)
    build_tiny("qwen3_vl", path / "teacher", seed=1, layers=3)
    return path


@pytest.fixture(scope="module")
def run(qwen3_vl, dice, tmp_path_factory):
    """Two steps, at a rate at which one update of the adapters moves log-probs by tenths of a nat."""
    out = tmp_path_factory.mktemp("run")
    arguments = overrides(2, out / "checkpoints", "trainer.save_freq=2", "trainer.resume_mode=disable")
    # All linear layers have adapters, but the vision tower is frozen, so the trainer leaves it out.
    return Run(out / "run", settings(qwen3_vl, dice, LR="3e-2", RANK="8"), arguments, "run_lora_1gpu.sh").finish()


def test_every_step_is_healthy(run):
    assert_healthy(run, [1, 2])


def test_the_teacher_knows_nothing_of_the_students_adapters(run, qwen3_vl):
    for step in (1, 2):
        for row in run.captured(step)[:4]:
            assert row["multi_modal_inputs"]["pixel_values"].numel()
            expected = reference_log_probs(qwen3_vl / "teacher", row)
            np.testing.assert_allclose(row["teacher_log_probs"].numpy(), expected, atol=1e-4, rtol=0)


def test_the_student_begins_as_its_base_model_and_then_moves(run, qwen3_vl):
    """So step 2 is rolled out by the adapters that vLLM has been sent: its correlation with the actor says so."""
    for row in run.captured(1)[:4]:
        expected = reference_log_probs(qwen3_vl / "student", row)
        np.testing.assert_allclose(row["old_log_probs"].numpy(), expected, atol=1e-4, rtol=0)
    assert_moved(run.captured(2), qwen3_vl / "student")


def test_only_adapters_of_the_language_model_are_trained(run, qwen3_vl):
    before = load_file(qwen3_vl / "student" / "model.safetensors")
    checkpoint = run.out.parent / "checkpoints" / "global_step_2" / "actor" / "model_world_size_1_rank_0.pt"
    after = torch.load(checkpoint, weights_only=False)
    after = {name: getattr(value, "_local_tensor", value) for name, value in after.items()}
    frozen = {n.removeprefix("base_model.model.").replace(".base_layer", ""): v for n, v in after.items()}
    assert all(torch.equal(frozen[name], value) for name, value in before.items())
    adapters = {name: value for name, value in after.items() if "lora_B" in name}
    # Seven projections a layer.
    assert len(adapters) == 7 * 2 and all(value.abs().max() > 0 for value in adapters.values())
    assert not any("lora" in name and "visual" in name for name in after)
