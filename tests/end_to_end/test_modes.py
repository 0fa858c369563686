# SPDX-License-Identifier: Apache-2.0
"""The real loop in verl's asynchronous trainer modes, in which weights change while responses are sampled.

The correlation of the rollout's log-probs with the actor's is below 1, because the actor is newer than the weights
that have sampled. Hence each token's log-prob is compared with that of the weights of its time, from the checkpoints of
all steps.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.harness import Run, overrides, settings
from tests.end_to_end.replay import replay
from tests.end_to_end.test_teachers import assert_policy_loss, published
from tests.end_to_end.test_training import PUBLISHED_METRICS, reference_log_probs
from tests.integration.helpers import load

STEPS = 3
OPTIMIZER = "actor_rollout_ref.actor.optim"


def run_mode(models: Path, data: Path, out: Path, *arguments: str, **environment: str) -> Run:
    whole = overrides(STEPS, out / "checkpoints", "trainer.resume_mode=disable", *arguments)
    return Run(out / "run", settings(models, data, **environment), whole).finish()


def weights_of_version(run: Run, models: Path, version: int) -> Path:
    """A folder with the student after so many steps."""
    if version == 0:
        return models / "student"
    folder = run.out.parent / f"version_{version}"
    if not folder.exists():
        model = load(models / "student")
        model.load_state_dict(run.weights(version))
        shutil.copytree(models / "student", folder)
        model.save_pretrained(folder)
    return folder


def assert_sampled_by_the_weights_of_its_time(run: Run, row: dict, models: Path) -> None:
    """Assert that the rollout's log-prob of each token is that of one of the versions that have sampled the row."""
    oldest, newest = row["tag"]["min_global_steps"], row["tag"]["max_global_steps"]
    references = [
        reference_log_probs(weights_of_version(run, models, version), row, without_placeholders=True)
        for version in range(oldest, newest + 1)
    ]
    distance = np.min([np.abs(row["rollout_log_probs"].numpy() - x) for x in references], axis=0)
    assert distance.max() < 1e-4


def assert_all_steps(run: Run, models: Path, batches: int = 1) -> list[int]:
    """What must hold for each step in any mode.

    Returns:
        By how many versions each row's newest weights were behind the actor.
    """
    assert [step["training/global_step"] for step in run.steps] == list(range(1, STEPS + 1))
    behind = []
    for number, step in enumerate(run.steps, 1):
        assert all(np.isfinite(step[name]) for name in PUBLISHED_METRICS)
        assert step["actor/grad_norm"] > 0
        if step["training/off_policy/trajectory_staleness_worst/max"] == 0:
            assert step["training/rollout_actor_probs_pearson_corr"] > 0.9999
        of_step = []
        for batch in range(batches):
            rows = run.captured(number, batch)
            for row, expected in zip(rows, published(rows), strict=True):
                np.testing.assert_allclose(row["advantages"].numpy(), expected, rtol=1e-5, atol=1e-5)
            # The log-probs that the update uses are those of the weights before the step, whatever has sampled.
            actor = weights_of_version(run, models, number - 1)
            for row in rows[::4]:
                np.testing.assert_allclose(
                    row["old_log_probs"].numpy(), reference_log_probs(actor, row), atol=1e-4, rtol=0
                )
                teacher = reference_log_probs(models / "teacher", row)
                np.testing.assert_allclose(row["teacher_log_probs"].numpy(), teacher, atol=1e-4, rtol=0)
                assert_sampled_by_the_weights_of_its_time(run, row, models)
            of_step += [number - 1 - row["tag"]["max_global_steps"] for row in rows]
        assert step["training/off_policy/trajectory_staleness/mean"] == pytest.approx(np.mean(of_step))
        behind += of_step
    return behind


def test_colocate_async(models, dice, tmp_path):
    run = run_mode(models, dice, tmp_path, "trainer.save_freq=1", "trainer.v1.trainer_mode=colocate_async")
    behind = assert_all_steps(run, models)
    # Measured: 0, 1 and 0 in the three steps, with correlations of 1, 0.958 and 1.
    assert 0 in behind and max(behind) >= 1
    assert_policy_loss(run, 1)


def test_separate_async_with_several_updates_a_step_and_a_dedicated_teacher(models, dice, tmp_path):
    arguments = ["trainer.save_freq=1", "trainer.v1.separate_async.parameter_sync_step=2"]
    arguments += ["actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.rollout.max_num_seqs=4"]
    run = run_mode(models, dice, tmp_path, *arguments, BATCH="8", TEACHER_GPUS="1", ROLLOUT_GPUS="1")
    behind = assert_all_steps(run, models, batches=2)
    assert 0 in behind
    assert max(step["gndpo/teacher_ahead_share"] for step in run.steps) > 0


def test_separate_async_without_replicas_on_the_actors_gpus_and_with_servers(models, dice, tmp_path):
    """Two ranks update the actor. At a learning rate of 0, all weights are equal, however old they are."""
    arguments = ["trainer.save_freq=-1", "actor_rollout_ref.hybrid_engine=False"]
    more = {"TEACHER_BACKEND": "server", "TEACHER_GPUS": "1", "ROLLOUT_GPUS": "1"}
    run = run_mode(models, dice, tmp_path, *arguments, GPUS="2", LR="0", **more)
    expected, _ = replay(models / "student", [run.captured(step) for step in range(1, STEPS + 1)], f"{OPTIMIZER}.lr=0")
    for step, metrics in zip(run.steps, expected, strict=True):
        assert step["training/rollout_actor_probs_pearson_corr"] > 0.9999
        assert step["actor/grad_norm"] == pytest.approx(metrics["actor/grad_norm"], rel=1e-5)
