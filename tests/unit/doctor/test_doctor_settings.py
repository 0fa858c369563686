# SPDX-License-Identifier: Apache-2.0
"""Settings that don't go together: each problem names what, where and what to do."""

import pytest
import torch

from tests.unit.doctor.helpers import SERVER, errors, expect
from verl_gndpo.doctor.inputs import Inputs
from verl_gndpo.doctor.run import run_checks
from verl_gndpo.doctor.settings import check_estimator, check_settings, check_verl_settings
from verl_gndpo.estimators import compute_log_ratio_advantage


def test_an_unknown_estimator(make_config):
    check = expect(
        check_estimator(make_config("algorithm.adv_estimator=gndop")), "error", "gndop: verl has no such estimator"
    )
    assert check.remedy == "did you mean gndpo?"


def test_a_run_without_gndpo_is_verls_own_business(make_config, on_cpu):
    # Neither the teacher's path nor the settings that only GNDPO has matter.
    grpo = ("algorithm.adv_estimator=grpo", "algorithm.use_kl_in_reward=True", "algorithm.gndpo.limt=3")
    checks = run_checks(make_config(*grpo, teacher="/no/where"))
    assert not errors(checks)
    expect(checks, "warning", "GNDPO is not selected", "teacher has no effect", "algorithm.adv_estimator=gndpo")
    expect(run_checks(make_config(*grpo, "teacher=null")), "ok", "GNDPO is not selected")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher.server.gpu_mem=0.5"], ["teacher.server.gpu_mem", "not a setting"]),
        (["teacher.server.tensor_model_parallel_size=3"], ["is 2, which 1 teacher(s) can't share", "replicas of 3"]),
        (["teacher.server.tensor_model_parallel_size=0"], ["replicas of 0", "tensor_model_parallel_size"]),
        (["teacher.server.max_model_len=10"], ["verl refuses these teacher servers", "max_model_len=10"]),
        (
            ["teacher.model.path=null", "teacher.models.a.path=A", "teacher.models.b.path=B"],
            ["is 2, which 2 teacher(s) can't share in replicas of 2 GPUs"],
        ),
        (["teacher.server.tensor_model_parallel_size=1"], None),
    ],
)
def test_servers_are_set_up_as_verl_wants_them(make_config, overrides, words):
    checks = check_settings(Inputs(make_config(*SERVER, *overrides)))
    if words:
        expect(checks, "error", *words)
    else:
        assert not errors(checks)


def test_shards_have_to_divide_the_ranks(make_config):
    checks = check_settings(Inputs(make_config("trainer.n_gpus_per_node=3", "teacher.fsdp.fsdp_size=2")))
    expect(checks, "error", "teacher.fsdp.fsdp_size=2 does not divide the teacher's 3 GPUs")
    assert not errors(check_settings(Inputs(make_config("trainer.n_gpus_per_node=4", "teacher.fsdp.fsdp_size=2"))))


def test_flash_attention_does_not_support_float32(make_config, monkeypatch):
    monkeypatch.setattr("verl_gndpo.doctor.settings.without_accelerator", lambda: False)
    plain = "actor_rollout_ref.model.override_config.attn_implementation=null"
    expect(
        check_settings(Inputs(make_config("teacher.dtype=float32", plain))), "error", "does not support float32", "sdpa"
    )
    assert not errors(check_settings(Inputs(make_config("teacher.dtype=float32"))))


def test_what_verl_itself_refuses_is_told_in_one_line(make_config):
    config = make_config("actor_rollout_ref.actor.use_dynamic_bsz=False")
    check = expect(check_verl_settings(config), "error", "verl refuses this config", "ppo_micro_batch_size_per_gpu")
    assert "\n" not in check.detail


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algorithm.gndpo.limt=3", ["algorithm.gndpo.limt", "did you mean algorithm.gndpo.limit?"]),
        ("teacher.tempature=1", ["teacher.tempature", "did you mean teacher.temperature?"]),
        ("teacher.model.path=null", ["no teacher is configured", "teacher.model.path"]),
        ("gndpo.clip=3", ["nothing reads the section gndpo at the top level", "algorithm.gndpo"]),
        ("trainer.use_v1=False", ["trainer.use_v1=True"]),
        ("trainer.v1.trainer_mode=asinc", ["trainer_mode=asinc", "sync, colocate_async, separate_async"]),
        ("algorithm.use_kl_in_reward=True", ["algorithm.use_kl_in_reward=False", "use_kl_loss"]),
        ("distillation.enabled=True", ["distillation.enabled=False"]),
        ("critic.enable=True", ["critic.enable=False"]),
        ("teacher.ulysses_sequence_parallel_size=2", ["size=2 does not divide the teacher's 1 GPUs"]),
        ("trainer.n_gpus_per_node=16", ["the teacher has 16 ranks, but a batch has 8 rows", "data.train_batch_size"]),
    ],
)
def test_a_setting_that_does_not_go_with_gndpo(make_config, override, words):
    checks = check_settings(Inputs(make_config(override)))
    expect(checks, "error", *words)
    assert len(checks) == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algorithm.rollout_correction.bypass_mode=True", ["skips the student's pass", "bypass_mode=False"]),
        ("actor_rollout_ref.model.use_fused_kernels=True", ["never computes the student's logits"]),
        ("actor_rollout_ref.actor.strategy=veomni", ["strategy=veomni does not return", "strategy=fsdp2"]),
        (
            "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2",
            ["_size=2 spreads a row's logits over several ranks"],
        ),
        ("actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=2", ["fsdp_config.ulysses"]),
    ],
)
def test_a_setting_that_does_not_go_with_the_kl_baseline(make_config, override, words):
    checks = check_settings(Inputs(make_config("algorithm.adv_estimator=v_opd", override)))
    expect(checks, "error", *words)
    assert len(checks) == 1
    assert not errors(check_settings(Inputs(make_config(override))))


def test_the_kl_baseline_needs_workers(make_config):
    servers = (*SERVER, "teacher.server.tensor_model_parallel_size=1")
    assert not errors(check_settings(Inputs(make_config(*servers))))
    checks = check_settings(Inputs(make_config(*servers, "algorithm.gndpo.baseline=kl")))
    expect(checks, "error", "baseline=kl: teacher.backend=server", "teacher.backend=worker")
    assert not errors(check_settings(Inputs(make_config("algorithm.gndpo.baseline=kl"))))


def test_one_teacher_can_be_all_that_there_are(make_config):
    each = ("algorithm.gndpo.baseline=teacher", "algorithm.gndpo.scale=teacher")
    assert not errors(check_settings(Inputs(make_config(*each))))


USABLE = "gpg, grpo, grpo_passk, grpo_vectorized, opo, reinforce_plus_plus, reinforce_plus_plus_baseline, rloo"


@pytest.mark.parametrize(
    ("estimator", "words"),
    [
        ("gae", ["=gae: it needs more than the rewards", USABLE]),
        ("remax", ["=remax: it needs more than the rewards"]),
        ("gndpo", ["=gndpo: it computes advantages from a teacher"]),
        ("grppo", ["=grppo: verl has no such estimator", USABLE]),
    ],
)
def test_the_task_reward_needs_an_estimator_of_rewards(make_config, estimator, words):
    task = "algorithm.gndpo.task_reward."
    checks = check_settings(Inputs(make_config(f"{task}coef=0.5", f"{task}estimator={estimator}")))
    expect(checks, "error", *words)
    # Where it is not mixed in, nobody asks for it.
    assert not errors(check_settings(Inputs(make_config(f"{task}estimator={estimator}"))))


@pytest.mark.parametrize("estimator", [*USABLE.split(", "), "gdpo", "rloo_vectorized"])
def test_the_estimators_that_are_offered_work(make_config, estimator):
    task = "algorithm.gndpo.task_reward."
    config = make_config(f"{task}coef=0.5", f"{task}estimator={estimator}")
    assert not errors(check_settings(Inputs(config)))
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(4, 3)
    teacher, old = -torch.rand(4, 3, generator=generator), -torch.rand(4, 3, generator=generator)
    rewards = torch.zeros(4, 3)
    rewards[:, -1] = torch.tensor([1.0, 0.0, 1.0, 0.0])
    advantages, _ = compute_log_ratio_advantage(
        "gndpo",
        response_mask=mask,
        teacher_log_probs=teacher,
        old_log_probs=old,
        token_level_rewards=rewards,
        index=list("aabb"),
        config=config.algorithm,
    )
    assert advantages.isfinite().all() and advantages.abs().max() > 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["strategy=fsdp"], ["fsdp_config.use_orig_params=True", "strategy=fsdp2"]),
        (["strategy=veomni"], ["has no effect with strategy=veomni", "strategy=fsdp2"]),
        (["strategy=fsdp", "fsdp_config.use_orig_params=True"], None),
        (["strategy=fsdp2"], None),
    ],
)
def test_a_frozen_vision_tower_needs_a_strategy_that_can_freeze_it(make_config, overrides, words):
    actor = "actor_rollout_ref.actor."
    checks = check_settings(Inputs(make_config(actor + "freeze_vision_tower=True", *[actor + o for o in overrides])))
    if words:
        expect(checks, "error", *words)
    else:
        assert not errors(checks)


def test_another_loss_than_the_published_one_is_a_note(make_config):
    actor = "actor_rollout_ref.actor."
    expect(check_settings(Inputs(make_config(actor + "loss_agg_mode=token-mean"))), "ok", "token-mean; the published")
    expect(
        check_settings(Inputs(make_config(actor + "policy_loss.loss_mode=vanilla"))), "ok", "the published loss is gspo"
    )
