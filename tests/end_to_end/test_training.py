# SPDX-License-Identifier: Apache-2.0
"""The real loop: verl's trainer, Ray, FSDP2, vLLM rollouts with images, the teacher worker, checkpoints.

An exit code proves nothing here; the numbers are asserted. A run costs minutes, so that a few runs carry all
assertions.
"""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.end_to_end.harness import REPO, Run
from tests.end_to_end.replay import replay
from tests.integration.helpers import hugging_face_log_probs

REAL_SETS = REPO.parent / "shared" / "data"
REWARD = [
    f"reward.custom_reward_function.path={REPO / 'examples' / 'quickstart' / 'reward.py'}",
    "reward.custom_reward_function.name=compute_score",
]
PUBLISHED_METRICS = [
    *(f"gndpo/log_ratio/{name}" for name in ("mean", "std", "min", "max", "p01", "p99")),
    *("gndpo/effective_sample_share", "gndpo/token/digits/share", "gndpo/response/truncated_share"),
    *("gndpo/position/0/k1", "gndpo/warning/correlation", "timing_s/gndpo_diagnostics"),
    *("gndpo/clipped_low_share", "gndpo/clipped_high_share", "gndpo/mu", "gndpo/sigma", "gndpo/gain"),
    *("gndpo/advantage_abs_max", "gndpo/sign_flip_share", "gndpo/k3", "actor/grad_norm", "timing_s/teacher_log_prob"),
]


def settings(models: Path, data: Path, **more: str) -> dict[str, str]:
    base = {"STUDENT": str(models / "student"), "TEACHER": str(models / "teacher"), "DATA_DIR": str(data)}
    return base | {"BATCH": "4", "N": "4", "LR": "1e-3"} | more


def overrides(steps: int, checkpoints: Path, *more: str) -> list[str]:
    return [
        f"trainer.total_training_steps={steps}",
        f"trainer.default_local_dir={checkpoints}",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        *REWARD,
        *more,
    ]


def assert_healthy(run: Run, steps: list[int], gain: bool = True) -> None:
    """What must hold for every step of any run; `gain`: one for all tokens."""
    assert [step["training/global_step"] for step in run.steps] == steps
    for step in run.steps:
        # Both are in float32: measured at least 1 - 2e-7.
        assert step["training/rollout_actor_probs_pearson_corr"] > 0.999
        assert math.isfinite(step["actor/grad_norm"]) and step["actor/grad_norm"] > 0
        assert all(math.isfinite(step[name]) for name in PUBLISHED_METRICS if gain or name != "gndpo/gain")
        assert step["timing_s/teacher_log_prob"] < step["timing_s/step"]
        if gain:
            assert step["gndpo/gain"] == pytest.approx(1 / math.hypot(step["gndpo/sigma"], 1e-4), rel=1e-4)


def prompts(rows: list[dict]) -> list[list[int]]:
    """The distinct prompts of a step's batch, sorted."""
    return sorted({tuple(row["input_ids"][: -len(row["response_mask"])].tolist()) for row in rows})


def reference_log_probs(path: Path, row: dict, **options) -> np.ndarray:
    """Log-probs of a row's response by a plain Hugging Face forward with its own positions, in float64.

    `options` are those of `hugging_face_log_probs`.
    """
    inputs = {k: v for k, v in row["multi_modal_inputs"].items() if k in ("pixel_values", "image_grid_thw")}
    plain = {"ids": row["input_ids"], "inputs": inputs, "response": row["response_mask"]}
    return hugging_face_log_probs(path, [plain], temperature=1.0, **options)[0].numpy()


def assert_moved(rows: list[dict], start: Path) -> None:
    """Assert that the student of these rows has other log-probs than the checkpoint that it began with.

    Uses the largest change over all tokens: a response may be one token long, and its log-prob may hardly have moved.
    One update of the tiny InternVL moved each row by 0.35 to 3.3 nats.
    """
    moves = [np.abs(row["old_log_probs"].numpy() - reference_log_probs(start, row)).max() for row in rows]
    assert max(moves) > 0.05, moves


@pytest.fixture(scope="module")
def killed_and_resumed(models, dice, tmp_path_factory):
    """A run that is killed after step 3 with a checkpoint of step 2, and one that resumes it to step 4.

    The second one loses its teacher after its first step.
    """
    out = tmp_path_factory.mktemp("runs")
    arguments = overrides(4, out / "checkpoints", "trainer.save_freq=2", "trainer.resume_mode=auto")
    arguments.append("algorithm.gndpo.rollout_seed=5")
    first = Run(out / "killed", settings(models, dice), arguments).kill_after(step=3)
    second = Run(out / "resumed", settings(models, dice), arguments).finish_without("ray::TeacherWorker", step=1)
    return first, second


def test_every_step_is_healthy(killed_and_resumed):
    first, second = killed_and_resumed
    assert_healthy(first, [1, 2, 3])
    assert_healthy(second, [3, 4])


def test_resumes_at_the_checkpoint_as_if_it_had_not_been_killed(killed_and_resumed):
    """The same prompts in the same order, the same responses, and the same update."""
    first, second = killed_and_resumed
    for killed, resumed in zip(first.captured(3), second.captured(3), strict=True):
        assert torch.equal(killed["input_ids"], resumed["input_ids"])
        torch.testing.assert_close(killed["old_log_probs"], resumed["old_log_probs"], atol=1e-6, rtol=0)
    logged = [next(step for step in run.steps if step["training/global_step"] == 3) for run in (first, second)]
    assert logged[0]["actor/grad_norm"] == pytest.approx(logged[1]["actor/grad_norm"], rel=1e-5)
    # The responses to a prompt differ.
    assert len({str(row["input_ids"].tolist()) for row in first.captured(3)}) > len(prompts(first.captured(3)))
    order = [
        prompts(first.captured(1)),
        prompts(first.captured(2)),
        prompts(first.captured(3)),
        prompts(second.captured(4)),
    ]
    assert len({str(step) for step in order}) == 4, "each step has prompts of its own"


def test_teacher_and_student_log_probs_are_those_of_hugging_face(killed_and_resumed, models):
    rows = killed_and_resumed[0].captured(1)
    assert all(row["multi_modal_inputs"]["pixel_values"].numel() for row in rows)
    for row in rows[:4]:
        for key, name in (("teacher_log_probs", "teacher"), ("old_log_probs", "student")):
            np.testing.assert_allclose(row[key].numpy(), reference_log_probs(models / name, row), atol=1e-4, rtol=0)


def test_a_teacher_that_was_killed_is_replaced_and_scores_as_before(killed_and_resumed, models):
    _, second = killed_and_resumed
    assert [step["gndpo/teacher_restarts"] for step in second.steps] == [0, 1]
    assert "the teacher was lost and is replaced (1 of 3 times): ActorDiedError" in second.log
    for row in second.captured(4)[:4]:
        expected = reference_log_probs(models / "teacher", row)
        np.testing.assert_allclose(row["teacher_log_probs"].numpy(), expected, atol=1e-4, rtol=0)


def test_the_advantages_of_a_step_are_the_published_formula(killed_and_resumed):
    rows = killed_and_resumed[0].captured(1)
    k = [np.clip(row["teacher_log_probs"].double() - row["old_log_probs"].double(), -5, 5).numpy() for row in rows]
    valid = np.concatenate([ki[row["response_mask"].numpy() != 0] for ki, row in zip(k, rows, strict=True)])
    mu, gain = valid.mean(), 1 / np.sqrt(valid.var(ddof=1) + 1e-8)
    for ki, row in zip(k, rows, strict=True):
        expected = (ki - mu) * gain * row["response_mask"].numpy()
        np.testing.assert_allclose(row["advantages"].numpy(), expected, rtol=1e-6, atol=1e-6)


def test_updates_with_shared_prompts_are_those_of_verls_own_engine(killed_and_resumed, models):
    """The gradients' norms, the losses, and the weights after two steps."""
    first, _ = killed_and_resumed
    assert "responses share their prompt through attention" in first.log
    steps = [first.captured(step) for step in (1, 2)]
    optimizer = "actor_rollout_ref.actor.optim"
    expected, weights = replay(models / "student", steps, f"{optimizer}.lr=1e-3", f"{optimizer}.total_training_steps=4")
    for logged, metrics in zip(first.steps, expected, strict=False):
        # Measured within 8e-8 and 2e-8.
        assert logged["actor/grad_norm"] == pytest.approx(metrics["actor/grad_norm"], rel=1e-6)
        assert logged["actor/pg_loss"] == pytest.approx(metrics["actor/pg_loss"], abs=1e-6)
    checkpoint = first.out.parent / "checkpoints" / "global_step_2" / "actor" / "model_world_size_1_rank_0.pt"
    trained = torch.load(checkpoint, weights_only=False)
    assert trained.keys() == weights.keys()
    moved = torch.cat([(getattr(x, "_local_tensor", x) - weights[name]).abs().flatten() for name, x in trained.items()])
    # A weight moves by at most 1e-3 in a step. Adam divides by small gradients, so that a few may differ by 2e-4.
    assert (moved > 1e-5).float().mean() < 1e-3
    assert moved.mean() < 1e-6


def test_training_changes_the_student_but_not_its_frozen_vision_tower(killed_and_resumed, models):
    from safetensors.torch import load_file

    before = load_file(models / "student" / "model.safetensors")
    checkpoint = killed_and_resumed[1].out.parent / "checkpoints" / "global_step_4" / "actor"
    after = torch.load(checkpoint / "model_world_size_1_rank_0.pt", weights_only=False)
    after = {name: getattr(value, "_local_tensor", value) for name, value in after.items()}
    compared = changed = 0
    for name, value in after.items():
        original = before.get(
            name, before.get(name.replace("model.language_model.", "model.").replace("model.visual.", "visual."))
        )
        if original is None:
            continue
        compared += 1
        if "visual" in name:
            assert torch.equal(value, original), f"{name} is frozen and changed"
        else:
            changed += not torch.equal(value, original)
    assert compared == len(before) and changed > 10


VALIDATED = {
    "dynamath": "DynaMath/DynaMath_Sample",
    "logicvista": "lscpku/LogicVista",
    "mathverse": "AI4Math/MathVerse",
    "mathvision": "MathLLMs/MathVision",
    "wemath": "We-Math/We-Math",
}


@pytest.mark.skipif(not REAL_SETS.is_dir(), reason="needs the real samples, which are not part of this project")
def test_two_steps_on_a_mix_of_real_sets_with_validation_on_others(models, tmp_path):
    def convert(name: str, folder: str, *more: str) -> None:
        command = [sys.executable, f"data_prep/{name}.py", "--local_dataset_path", str(REAL_SETS / folder), *more]
        command += ["--local_save_dir", str(tmp_path / "sets" / name), "--prompt_style", "boxed", "--skip_verify"]
        subprocess.run(command, cwd=REPO, check=True)

    convert("geo3k", "geometry3k")
    convert("mmk12", "mmk12")
    for name in VALIDATED:
        convert(name, name, "--limit", "6")
    train = [tmp_path / "sets" / "geo3k" / "train.parquet", tmp_path / "sets" / "mmk12" / "test.parquet"]
    val = [next((tmp_path / "sets" / name).glob("*.parquet")) for name in VALIDATED]
    mix = [sys.executable, "data_prep/mix.py", "--train", *train, "--weights", "1", "1", "--val", *val]
    subprocess.run([*mix, "--local_save_dir", tmp_path / "data"], cwd=REPO, check=True)

    arguments = overrides(2, tmp_path / "checkpoints", "trainer.save_freq=-1", "trainer.resume_mode=disable")
    arguments = [a for a in arguments if a not in REWARD and "val_before_train" not in a]
    arguments += [
        "reward.custom_reward_function.path=pkg://verl_gndpo.rewards",
        "reward.custom_reward_function.name=compute_score",
        "trainer.val_before_train=True",
    ]
    files = {name: str(tmp_path / "data" / f"{name}.parquet") for name in ("train", "val")}
    more = {"TRAIN_FILE": files["train"], "VAL_FILE": files["val"], "MAX_PROMPT": "1024", "N": "2"}
    run = Run(tmp_path / "run", settings(models, tmp_path / "data", **more), arguments).finish()
    assert_healthy(run, [1, 2])
    # Random models know nothing; what counts is that every set is graded, each under its own name.
    validation = run.validation
    for source in VALIDATED.values():
        assert 0 <= validation[f"val-core/{source}/acc/mean@1"] <= 1
        assert 0 <= validation[f"val-aux/{source}/format/mean@1"] <= 1
    grids = {tuple(row["multi_modal_inputs"]["image_grid_thw"].flatten().tolist()) for row in run.captured(1)}
    assert len(grids) > 1, "real diagrams differ in size"
    row = run.captured(1)[0]
    np.testing.assert_allclose(
        row["teacher_log_probs"].numpy(), reference_log_probs(models / "teacher", row), atol=1e-4, rtol=0
    )
