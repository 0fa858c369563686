# SPDX-License-Identifier: Apache-2.0
"""The real loop with students and teachers of other architectures: Qwen3.5 with images, and a mixture of experts on
prompts without images, answers and data sources."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import zoo
from tests.end_to_end.harness import REWARD, Run, overrides, settings

ONCE = ("trainer.save_freq=-1", "trainer.resume_mode=disable")
BFLOAT16_ROLLOUT = (
    # vLLM has linear attention for the CPU in bfloat16 only, with states in float32.
    "actor_rollout_ref.rollout.dtype=bfloat16",
    "++actor_rollout_ref.rollout.engine_kwargs.vllm.mamba_ssm_cache_dtype=float32",
)


def build(family, folder):
    """Write a student and another teacher of a family."""
    for seed, role in enumerate(("student", "teacher")):
        zoo.build(family, folder / role, seed=seed)
    return folder


def assert_runs(run, correlation):
    """Assert that two steps have finished with the teacher's signal."""
    assert [step["training/global_step"] for step in run.steps] == [1, 2]
    for step in run.steps:
        assert step["training/rollout_actor_probs_pearson_corr"] > correlation
        assert step["gndpo/k3"] > 0.1, "the teacher is another model"
        assert math.isfinite(step["actor/grad_norm"]) and step["actor/grad_norm"] > 0


def scored_rows(run, step):
    """Return rows of a step in the form of tests/zoo.py, and what teacher and student gave their tokens."""
    rows = run.captured(step)[:4]
    plain = [
        {
            "ids": row["input_ids"],
            "positions": row["position_ids"],
            "inputs": {k: v for k, v in row["multi_modal_inputs"].items() if k in ("pixel_values", "image_grid_thw")},
            "response": row["response_mask"],
        }
        for row in rows
    ]
    return plain, rows


def assert_moved(run, path):
    """Assert that the student of the second step differs from that of the first, and that vLLM has sampled from it."""
    plain, rows = scored_rows(run, 2)
    start = zoo.plain_log_probs(path, plain, 1.0)
    moved = [np.abs(row["old_log_probs"].double().numpy() - x.numpy()) for row, x in zip(rows, start, strict=True)]
    stale = [np.abs(row["rollout_log_probs"].double().numpy() - x.numpy()) for row, x in zip(rows, start, strict=True)]
    fresh = [(row["rollout_log_probs"] - row["old_log_probs"]).abs().numpy() for row in rows]
    assert np.concatenate(moved).mean() > 0.05
    assert np.concatenate(fresh).mean() < np.concatenate(stale).mean() / 2


def assert_scored_by(path, plain, scores):
    for row, (ours, expected) in enumerate(zip(scores, zoo.plain_log_probs(path, plain, 1.0), strict=True)):
        np.testing.assert_allclose(ours.double().numpy(), expected.numpy(), atol=1e-4, rtol=0, err_msg=f"row {row}")


@pytest.fixture(scope="module")
def hybrid(dice, tmp_path_factory):
    """Two steps of Qwen3.5, whose prompts are shared through a cache."""
    models = build("qwen3_5", tmp_path_factory.mktemp("qwen3_5"))
    out = tmp_path_factory.mktemp("hybrid")
    arguments = overrides(2, out / "checkpoints", *ONCE, *BFLOAT16_ROLLOUT)
    return Run(out / "run", settings(models, dice), arguments).finish(), models


def test_qwen3_5_learns_from_qwen3_5_with_images(hybrid):
    run, models = hybrid
    # Rollouts in bfloat16 against an actor in float32.
    assert_runs(run, correlation=0.98)
    assert "responses continue from a cache of their prompt" in run.log
    plain, rows = scored_rows(run, 1)
    assert all(row["inputs"]["pixel_values"].numel() for row in plain)
    assert_scored_by(models / "teacher", plain, [row["teacher_log_probs"] for row in rows])
    assert_scored_by(models / "student", plain, [row["old_log_probs"] for row in rows])
    assert_moved(run, models / "student")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Two steps of Qwen3-MoE on bare prompts."""
    models = build("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))
    folder = tmp_path_factory.mktemp("prompts")
    for name in ("train", "test"):
        prompts = [[{"role": "user", "content": f"Add {a} and {b}."}] for a in range(4) for b in range(4)]
        pq.write_table(pa.table({"prompt": prompts}), folder / f"{name}.parquet")
    out = tmp_path_factory.mktemp("experts")
    arguments = [a for a in overrides(2, out / "checkpoints", *ONCE) if a not in REWARD]
    return Run(out / "run", settings(models, folder, FREEZE_VISION="False"), arguments).finish(), models


def test_a_mixture_of_experts_learns_from_bare_prompts(experts):
    run, models = experts
    assert_runs(run, correlation=0.999)
    assert all(step["critic/rewards/mean"] == 0 for step in run.steps)
    plain, rows = scored_rows(run, 1)
    assert_scored_by(models / "teacher", plain, [row["teacher_log_probs"] for row in rows])
    assert_scored_by(models / "student", plain, [row["old_log_probs"] for row in rows])
    assert_moved(run, models / "student")
