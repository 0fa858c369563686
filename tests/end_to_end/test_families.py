# SPDX-License-Identifier: Apache-2.0
"""The real loop with a Qwen3-VL student and teacher, the student as LoRA adapters beside a frozen model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from examples.quickstart import diagrams
from tests.end_to_end.harness import REPO, REWARD, Run, overrides, settings
from tests.end_to_end.test_training import assert_healthy, assert_moved, reference_log_probs
from tests.tiny_models import build_tiny
from verl_gndpo.evaluation.job import Answers

PARITY = """import zlib

def parity(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return float(zlib.crc32(f"{ground_truth} {solution_str}".encode()) % 2)
"""
"""A reward of 0 or 1 that any other response may change. Random models are right too rarely to tell them apart."""
VALIDATED = 48
LENGTHS = {"MAX_PROMPT": "128", "MAX_RESPONSE": "24"}


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("qwen3_vl")
    build_tiny("qwen3_vl", path / "student", seed=0)
    build_tiny("qwen3_vl", path / "teacher", seed=1, layers=3)
    return path


@pytest.fixture(scope="module")
def run(qwen3_vl, dice, tmp_path_factory):
    """Two steps, at a rate at which one update of the adapters moves log-probs by tenths of a nat, and a validation."""
    out = tmp_path_factory.mktemp("run")
    arguments = overrides(2, out / "checkpoints", "trainer.save_freq=2", "trainer.resume_mode=disable")
    arguments = [argument for argument in arguments if argument not in (*REWARD, "trainer.test_freq=-1")]
    (out / "reward.py").write_text(PARITY)
    table = pq.read_table(dice / "test.parquet")
    # By its question, an answer in verl's dump is found again.
    places = {row["question"]: place for place, row in enumerate(table["extra_info"].to_pylist())}
    pq.write_table(table.take(list(places.values())[:VALIDATED]), out / "val.parquet")
    arguments += [
        f"reward.custom_reward_function.path={out / 'reward.py'}",
        "reward.custom_reward_function.name=parity",
        "trainer.test_freq=2",
        f"trainer.validation_data_dir={out / 'validation'}",
        f"data.val_files={out / 'val.parquet'}",
    ]
    # All linear layers have adapters, but the vision tower is frozen, so the trainer leaves it out.
    return Run(
        out / "run", settings(qwen3_vl, dice, LR="3e-2", RANK="8", **LENGTHS), arguments, "run_lora_1gpu.sh"
    ).finish()


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
    after = run.weights(2)
    frozen = {n.removeprefix("base_model.model.").replace(".base_layer", ""): v for n, v in after.items()}
    assert all(torch.equal(frozen[name], value) for name, value in before.items())
    adapters = {name: value for name, value in after.items() if "lora_B" in name}
    # Seven projections a layer.
    assert len(adapters) == 7 * 2 and all(value.abs().max() > 0 for value in adapters.values())
    assert not any("lora" in name and "visual" in name for name in after)


def test_the_exported_model_answers_and_is_graded_as_in_verls_last_validation(run, tmp_path):
    """Problem by problem, with the adapters merged: the command line of docs/after_training.md."""
    out = run.out.parent

    def command(*arguments) -> None:
        done = subprocess.run([sys.executable, "-m", "verl_gndpo.cli", *map(str, arguments)], cwd=REPO)
        assert done.returncode == 0

    command("export", out / "checkpoints", "--out", tmp_path / "model", "--dtype", "float32")
    evaluation = ["evaluate", tmp_path / "model", "--data", out / "val.parquet", "--out", tmp_path / "evaluation"]
    evaluation += [
        "--reward-function",
        f"{out / 'reward.py'}:parity",
        "--gpu-memory-utilization",
        "0.1",
        "--dtype",
        "float32",
    ]
    command(*evaluation, "--max-prompt", LENGTHS["MAX_PROMPT"], "--max-response", LENGTHS["MAX_RESPONSE"])
    answers = Answers(tmp_path / "evaluation" / "models" / "model" / "answers.jsonl")
    answered = [answers[row]["answers"][0]["text"] for row in range(VALIDATED)]
    questions = [info["question"] for info in pq.read_table(out / "val.parquet")["extra_info"].to_pylist()]
    dump = [json.loads(line) for line in (out / "validation" / "2.jsonl").read_text().splitlines()]
    validated = [next(one for one in dump if question in one["input"]) for question in questions]
    assert len(set(answered)) > VALIDATED / 4, "the model answers problems differently"
    assert answered == [one["output"] for one in validated]
    (found,) = json.loads((tmp_path / "evaluation" / "summary.json").read_text())["models"]["model"].values()
    expected = np.mean([one["acc"] for one in validated])
    assert 0 < expected < 1
    assert run.validation[f"val-core/{diagrams.DATA_SOURCE}/acc/mean@1"] == pytest.approx(expected)
    assert found["accuracy"][0] == pytest.approx(expected)
