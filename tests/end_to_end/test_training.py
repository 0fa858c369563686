# SPDX-License-Identifier: Apache-2.0
"""The real loop: verl's trainer, Ray, FSDP2, vLLM rollouts with images, the teacher worker, checkpoints.

An exit code proves nothing here; the numbers are asserted. A run costs minutes, so that a few runs carry all
assertions.
"""

import math
import os
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.end_to_end.harness import REPO, REWARD, Run, overrides, settings
from tests.end_to_end.replay import replay
from tests.integration.helpers import hugging_face_log_probs

REAL_SETS = REPO.parent / "shared" / "data"
PUBLISHED_METRICS = [
    *(f"gndpo/log_ratio/{name}" for name in ("mean", "std", "min", "max", "p01", "p99")),
    *("gndpo/effective_sample_share", "gndpo/token/digits/share", "gndpo/response/truncated_share"),
    *("gndpo/position/0/k1", "gndpo/warning/correlation", "timing_s/gndpo_diagnostics"),
    *("gndpo/clipped_low_share", "gndpo/clipped_high_share", "gndpo/mu", "gndpo/sigma", "gndpo/gain"),
    *("gndpo/advantage_abs_max", "gndpo/sign_flip_share", "gndpo/k3", "actor/grad_norm", "timing_s/teacher_log_prob"),
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


STEPS = 10
KILL_SEED = int(os.environ.get("GNDPO_KILL_SEED", 0)) or int.from_bytes(os.urandom(2), "big")
"""Of the kill at a random time. The failed test's output names it."""


@pytest.fixture(scope="module")
def uninterrupted(models, dice, tmp_path_factory):
    """A run of all steps."""
    out = tmp_path_factory.mktemp("uninterrupted")
    return Run(out / "run", settings(models, dice), seeded(out / "checkpoints")).finish()


@pytest.fixture(scope="module")
def killed_and_resumed(models, dice, tmp_path_factory):
    """Four runs, each of which resumes the one before.

    The first is killed after step 3 with a checkpoint of step 2, the second while it writes the checkpoint of step 4,
    and the third at a random time. The last one loses its teacher after its first step, and goes on to the end.
    """
    out = tmp_path_factory.mktemp("runs")
    arguments = seeded(out / "checkpoints")
    first, second, third, last = (
        Run(out / name, settings(models, dice), arguments) for name in ("after", "writing", "random", "last")
    )
    first.kill_after(step=3)
    second.kill_while_writing(out / "checkpoints" / "global_step_4" / "actor" / "optim_world_size_1_rank_0.pt")
    third.kill_at_random(KILL_SEED)
    last.finish_without("ray::TeacherWorker", step=1)
    return first, second, third, last


def seeded(checkpoints: Path) -> list[str]:
    return [
        *overrides(STEPS, checkpoints, "trainer.save_freq=2", "trainer.resume_mode=auto"),
        "algorithm.gndpo.rollout_seed=5",
    ]


def steps_of(run: Run) -> list[int]:
    return [int(step["training/global_step"]) for step in run.steps]


def test_nothing_listens_beyond_this_machine(killed_and_resumed):
    """Ray, verl's servers, TransferQueue, vLLM and the stores of the process groups."""
    listening = killed_and_resumed[0].listening
    processes = " ".join(command for commands in listening.values() for command in commands)
    assert all(name in processes for name in ("raylet", "gcs_server", "ray::vLLMHttpServer", "ray::TeacherWorker"))
    addresses = {address: ip_address(address.removeprefix("::ffff:")) for address in listening}
    beyond = {address: listening[address] for address, parsed in addresses.items() if not parsed.is_loopback}
    assert not beyond


def test_every_step_is_healthy(uninterrupted, killed_and_resumed):
    first, second, third, last = killed_and_resumed
    assert_healthy(uninterrupted, list(range(1, STEPS + 1)))
    assert_healthy(first, [1, 2, 3])
    # It was killed in the step after this one.
    assert_healthy(second, [3])
    assert_healthy(third, list(range(3, 3 + len(third.steps))))
    assert_healthy(last, list(range(int(last.steps[0]["training/global_step"]), STEPS + 1)))


def test_a_killed_run_resumes_at_its_last_complete_checkpoint(killed_and_resumed):
    _, _, third, last = killed_and_resumed
    # Not at that of step 4, which was being written, though its weights are there.
    assert steps_of(third)[0] == 3
    # A checkpoint every second step. One may have been written in the step in which the run was killed.
    saved = [step for step in (2, *steps_of(third)) if step % 2 == 0]
    assert steps_of(last)[0] - 1 in (saved[-1], saved[-1] + 2)


def test_a_run_that_was_killed_and_resumed_equals_an_uninterrupted_one(uninterrupted, killed_and_resumed):
    """The same prompts in the same order, the same responses, and the same weights."""
    compared = set()
    for run in killed_and_resumed:
        for step in range(1, STEPS + 1):
            if not run.has_captured(step):
                continue
            compared.add((run.out.name, step))
            for row, same in zip(run.captured(step), uninterrupted.captured(step), strict=True):
                assert torch.equal(row["input_ids"], same["input_ids"]), (run.out.name, step)
                for name in ("old_log_probs", "teacher_log_probs", "advantages"):
                    torch.testing.assert_close(row[name], same[name], atol=1e-6, rtol=1e-6)
    assert compared >= {("after", 3), ("writing", 3), ("writing", 4), ("random", 3), ("last", STEPS)}
    of_last, of_uninterrupted = killed_and_resumed[-1].weights(STEPS), uninterrupted.weights(STEPS)
    for name, weight in of_uninterrupted.items():
        torch.testing.assert_close(of_last[name], weight, atol=1e-6, rtol=0)


def test_two_runs_agree_in_tokens_and_weights(uninterrupted, killed_and_resumed):
    """Up to the checkpoint of step 2, nothing has happened to the first of the four."""
    first = killed_and_resumed[0]
    for step in (1, 2):
        for row, same in zip(first.captured(step), uninterrupted.captured(step), strict=True):
            assert torch.equal(row["input_ids"], same["input_ids"])
    of_first = first.weights(2)
    for name, weight in uninterrupted.weights(2).items():
        torch.testing.assert_close(of_first[name], weight, atol=1e-6, rtol=0)


def test_each_step_has_prompts_of_its_own_and_responses_that_differ(uninterrupted):
    rows = [uninterrupted.captured(step) for step in range(1, STEPS + 1)]
    assert len({str(prompts(of_step)) for of_step in rows}) == STEPS
    assert len({str(row["input_ids"].tolist()) for row in rows[2]}) > len(prompts(rows[2]))


def test_teacher_and_student_log_probs_are_those_of_hugging_face(killed_and_resumed, models):
    rows = killed_and_resumed[0].captured(1)
    assert all(row["multi_modal_inputs"]["pixel_values"].numel() for row in rows)
    for row in rows[:4]:
        for key, name in (("teacher_log_probs", "teacher"), ("old_log_probs", "student")):
            np.testing.assert_allclose(row[key].numpy(), reference_log_probs(models / name, row), atol=1e-4, rtol=0)


def test_a_teacher_that_was_killed_is_replaced_and_scores_as_before(killed_and_resumed, models):
    last = killed_and_resumed[-1]
    assert [step["gndpo/teacher_restarts"] for step in last.steps] == [0] + [1] * (len(last.steps) - 1)
    assert "the teacher was lost and is replaced (1 of 3 times): ActorDiedError" in last.log
    for row in last.captured(STEPS)[:4]:
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
    first = killed_and_resumed[0]
    assert "responses share their prompt through attention" in first.log
    steps = [first.captured(step) for step in (1, 2)]
    optimizer = "actor_rollout_ref.actor.optim"
    options = (f"{optimizer}.lr=1e-3", f"{optimizer}.total_training_steps={STEPS}")
    expected, replayed = replay(models / "student", steps, *options)
    for logged, metrics in zip(first.steps, expected, strict=False):
        # Measured within 8e-8 and 2e-8.
        assert logged["actor/grad_norm"] == pytest.approx(metrics["actor/grad_norm"], rel=1e-6)
        assert logged["actor/pg_loss"] == pytest.approx(metrics["actor/pg_loss"], abs=1e-6)
    trained = first.weights(2)
    assert trained.keys() == replayed.keys()
    moved = torch.cat([(x - replayed[name]).abs().flatten() for name, x in trained.items()])
    # A weight moves by at most 1e-3 in a step. Adam divides by small gradients, so that a few may differ by 2e-4.
    assert (moved > 1e-5).float().mean() < 1e-3
    assert moved.mean() < 1e-6


def test_training_changes_the_student_but_not_its_frozen_vision_tower(killed_and_resumed, models):
    from safetensors.torch import load_file

    before = load_file(models / "student" / "model.safetensors")
    after = killed_and_resumed[-1].weights(STEPS)
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
