# SPDX-License-Identifier: Apache-2.0
"""A run in which prompts fail: first one of four, then three."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.end_to_end.harness import Run, kill, overrides, settings

FAILING = (1, 4, 5, 7)
REWARD = f"""
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    if extra_info["index"] in {FAILING}:
        raise ValueError("problem %d has no number" % extra_info["index"])
    return 0.0
"""


@pytest.fixture(scope="module")
def ended(models, dice, tmp_path_factory):
    out = tmp_path_factory.mktemp("lost")
    (out / "reward.py").write_text(REWARD)
    assert [info["index"] for info in pq.read_table(dice / "train.parquet")["extra_info"].to_pylist()[:8]] == [
        *range(8)
    ]
    arguments = overrides(3, out / "checkpoints", "trainer.save_freq=-1", "trainer.resume_mode=disable")
    arguments += [f"reward.custom_reward_function.path={out / 'reward.py'}", "data.shuffle=False"]
    run = Run(out / "run", settings(models, dice), arguments)
    process = run.start()
    try:
        run.code = process.wait(300)
    finally:
        kill(process)
    return run


def test_a_step_counts_the_prompts_that_have_failed_and_trains_on_the_others(ended):
    (step,) = ended.steps
    assert (step["gndpo/lost_prompts"], step["gndpo/lost_share"]) == (1, 0.25)
    assert "has failed: reward: ValueError: problem 1 has no number" in ended.log
    rows = ended.captured(1)
    real = [row for row in rows if row["response_mask"].any()]
    assert (len(rows), len(real)) == (16, 12)
    k = [np.clip((row["teacher_log_probs"] - row["old_log_probs"]).double().numpy(), -5, 5) for row in real]
    pooled = np.concatenate(k)
    for row, of_row in zip(real, k, strict=True):
        expected = (of_row - pooled.mean()) / np.sqrt(pooled.var(ddof=1) + 1e-8)
        np.testing.assert_allclose(row["advantages"].numpy(), expected, rtol=1e-5, atol=1e-5)
    # The ratio of an on-policy step is 1, so that the loss is the mean of the rows' mean advantages.
    loss = -np.mean([row["advantages"].double().mean().item() for row in real])
    assert step["actor/pg_loss"] == pytest.approx(loss, abs=1e-6)


def test_a_step_that_has_lost_too_many_ends_the_run_with_the_reason(ended):
    assert ended.code != 0
    assert "3 prompts of this step have failed, and with them 75% of its responses" in ended.log
    assert "algorithm.gndpo.max_lost_share=0.5 allows no more" in ended.log
    assert "have: reward: ValueError: problem" in ended.log
