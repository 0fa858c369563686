# SPDX-License-Identifier: Apache-2.0
"""Settings that don't go together: each problem names what, where and what to do."""

import importlib.util
import re

import hydra
import pytest
import torch
from hydra.errors import HydraException
from omegaconf import OmegaConf
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync

from tests.helpers import verl_config
from tests.unit.doctor.helpers import CPU_RUN, SERVER, errors, expect
from verl_gndpo.doctor.inputs import Inputs
from verl_gndpo.doctor.run import run_checks
from verl_gndpo.doctor.settings import check_estimator, check_recipe, check_settings, check_verl_settings
from verl_gndpo.estimators import compute_log_ratio_advantage
from verl_gndpo.verl_settings import ignored_settings, recipe_differences


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


def test_checkpoints_need_a_folder_that_can_be_written_to(make_config, tmp_path):
    (tmp_path / "file").touch()
    folder = f"trainer.default_local_dir={tmp_path / 'file' / 'checkpoints'}"
    checks = check_settings(Inputs(make_config("trainer.save_freq=2", folder)))
    expect(checks, "error", folder, "file is not a folder", "trainer.save_freq=-1")
    assert not errors(check_settings(Inputs(make_config("trainer.save_freq=-1", folder))))
    assert not errors(check_settings(Inputs(make_config("trainer.save_freq=2"))))


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
        ("distillation.enabled=True", ["distillation.enabled=False"]),
        ("critic.enable=True", ["critic.enable=False"]),
        ("async_training.staleness_threshold=0.1", ["fully_async_main", "trainer_mode=separate_async"]),
        ("teacher.ulysses_sequence_parallel_size=2", ["size=2 does not divide the teacher's 1 GPUs"]),
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
    assert len(errors(checks)) == 1
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


def apply(config, overrides):
    """Return the config with overrides at the end of its command. As for Hydra, the keys must exist."""
    for override in overrides:
        path, key = override.split("=")[0].rsplit(".", 1)
        assert key in OmegaConf.select(config, path), override
    return OmegaConf.merge(config, OmegaConf.from_dotlist(overrides))


def overrides_in(text):
    return re.findall(r"[\w.]+=[\w.-]+", text)


IGNORED = {
    "algorithm.use_kl_in_reward": "True",
    "trainer.critic_warmup": "5",
    "actor_rollout_ref.actor.use_prefix_grouper": "True",
    "algorithm.filter_groups.enable": "True",
}


@pytest.mark.parametrize("key", IGNORED)
def test_what_has_no_meaning_is_told_and_turned_off(make_config, make_trainer, key):
    override = f"{key}={IGNORED[key]}"
    # verl 0.9.0 has no default for it.
    metric = "++algorithm.filter_groups.metric=reward"
    checks = [c for c in check_settings(Inputs(make_config(override)))]
    check = expect(checks, "warning", f"{override} is ignored")
    assert len(checks) == 1 and check.remedy.startswith(f"{key}=")
    assert not [c for c in check_settings(Inputs(make_config(check.remedy))) if c.status != "ok"]
    # The trainer does without, too, and an estimator of verl's own keeps it.
    ours, theirs = (
        make_trainer(f"algorithm.adv_estimator={name}", "+teacher.model.path=T", metric, override)
        for name in ("gndpo", "grpo")
    )
    assert str(OmegaConf.select(ours.config, key)) == check.remedy.split("=")[1]
    assert str(OmegaConf.select(theirs.config, key)) == IGNORED[key]


def test_a_run_without_kl_in_reward_starts_no_reference(make_trainer):
    ours = ("+teacher.model.path=T", "algorithm.use_kl_in_reward=True")
    assert not make_trainer("algorithm.adv_estimator=gndpo", *ours).use_reference_policy
    assert make_trainer("algorithm.adv_estimator=grpo", *ours).use_reference_policy


def test_filtered_groups_are_kept_where_rewards_count(make_config, make_trainer):
    # verl 0.9.0 has no default for the metric.
    filtered = (
        "algorithm.filter_groups.enable=True",
        "algorithm.filter_groups.metric=reward",
        "algorithm.gndpo.task_reward.coef=0.5",
    )
    expect(check_settings(Inputs(make_config(*filtered))), "warning", "takes no step if they never differ")
    overrides = ("algorithm.adv_estimator=gndpo", "+gndpo=default", "+teacher.model.path=T", *filtered)
    assert make_trainer(*overrides).replay_buffer.filter_groups_metric == "reward"
    assert make_trainer(*overrides[:-1]).replay_buffer.filter_groups_metric is None
    sampler = ("trainer.v1.sampler.custom_sampler.path=s.py", "trainer.v1.sampler.custom_sampler.name=S")
    settings = Inputs(make_config(filtered[0], *sampler)).settings
    assert not ignored_settings(make_config(filtered[0], *sampler), settings.signal)


@pytest.mark.parametrize(("key", "value"), [("top_p", 0.9), ("top_k", 50)])
def test_truncated_sampling_is_another_distribution(make_config, key, value):
    override = f"actor_rollout_ref.rollout.{key}={value}"
    check = expect(check_settings(Inputs(make_config(override))), "warning", override, "reverse KL")
    assert check_settings(Inputs(make_config(check.remedy)))[0].status == "ok"


@pytest.mark.parametrize("engine", ["megatron", "veomni", "torchtitan"])
def test_an_engine_that_is_not_installed_is_told(engine):
    checks = check_settings(Inputs(verl_config(f"model_engine={engine}", "+teacher.model.path=T", *CPU_RUN[:1])))
    if importlib.util.find_spec(engine):
        assert not [check for check in checks if "can't be imported" in check.detail]
    else:
        expect(checks, "warning", f"strategy={engine}: verl.workers.engine.{engine}", f"No module named '{engine}")


SEPARATE = (
    "trainer.v1.trainer_mode=separate_async",
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl",
    "trainer.v1.separate_async.parameter_sync_step=1",
)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], None),
        (["data.train_batch_size=8"], ["data.train_batch_size=8 is not", "parameter_sync_step=2"]),
        (["data.train_batch_size=6"], ["data.train_batch_size=6 is not", "data.train_batch_size=4"]),
        (["data.train_batch_size=2"], ["ppo_mini_batch_size=4", "data.train_batch_size=4"]),
        (["actor_rollout_ref.rollout.nnodes=0"], ["rollout.nnodes=0", "rollout.nnodes=1"]),
        (["actor_rollout_ref.rollout.n_gpus_per_node=0"], ["n_gpus_per_node=0", "n_gpus_per_node=1"]),
        (["actor_rollout_ref.rollout.checkpoint_engine.backend=naive"], ["backend=naive", "backend=host_file"]),
        (["reward.reward_model.enable=True"], ["enable_resource_pool=False", "enable_resource_pool=True"]),
    ],
)
def test_what_verls_separate_trainer_asserts_is_found_before(make_config, on_cpu, overrides, words):
    def refused_by_verl(config):
        try:
            PPOTrainerSeparateAsync(config)
        except AssertionError:
            return True
        return False

    checks = check_settings(Inputs(make_config(*SEPARATE, *overrides)))
    assert refused_by_verl(make_config(*SEPARATE, *overrides)) == (words is not None)
    if words is None:
        assert not errors(checks)
        return
    check = expect(checks, "error", *words)
    remedied = apply(make_config(*SEPARATE, *overrides), overrides_in(check.remedy))
    assert not errors(check_settings(Inputs(remedied))) and not refused_by_verl(remedied)


OTHER = {
    "algorithm.use_kl_in_reward": "True",
    "algorithm.rollout_correction.bypass_mode": "True",
    "algorithm.rollout_correction.rollout_is": "token",
    "algorithm.rollout_correction.rollout_rs": "geometric",
    "actor_rollout_ref.actor.policy_loss.loss_mode": "vanilla",
    "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
    "actor_rollout_ref.actor.clip_ratio_low": "3e-4",
    "actor_rollout_ref.actor.clip_ratio_high": "0.28",
    "actor_rollout_ref.actor.use_kl_loss": "True",
    "actor_rollout_ref.actor.entropy_coeff": "0.001",
    "actor_rollout_ref.actor.ppo_epochs": "2",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "2",
    "actor_rollout_ref.rollout.temperature": "0.7",
    "algorithm.gndpo.preset": "opd",
    "algorithm.gndpo.bound": "tanh",
    "algorithm.gndpo.baseline": "none",
    "algorithm.gndpo.scale": "none",
    "algorithm.gndpo.limit": "1.0",
    "algorithm.gndpo.std_floor": "0.1",
    "algorithm.gndpo.gain_limit": "2.0",
    "algorithm.gndpo.task_reward.coef": "0.5",
}


def test_every_difference_from_the_published_recipe_is_listed():
    assert check_recipe(Inputs(verl_config(*CPU_RUN)))[0].status == "ok"
    everything = (*CPU_RUN, *[f"{key}={value}" for key, value in OTHER.items()])
    check = expect(check_recipe(Inputs(verl_config(*everything))), "warning", "+recipe=gndpo")
    listed = re.findall(r"([\w.]+)=\S+ \(", check.detail)
    assert sorted(listed) == sorted(OTHER)
    assert "ppo_mini_batch_size=2 (4)" in check.detail and "rollout_is=token (null)" in check.detail
    remedied = verl_config(*everything, *check.remedy.removesuffix(" at the end of the command").split())
    expect(check_recipe(Inputs(remedied)), "ok", "as published, with the signal gndpo")


def test_a_preset_is_listed_with_what_it_changes():
    other = verl_config(*CPU_RUN, "algorithm.gndpo.preset=power_opd")
    keys = [found.key.removeprefix("algorithm.gndpo.") for found in recipe_differences(other)]
    assert keys == ["preset", "bound", "baseline", "scale"]


@pytest.mark.parametrize("key", sorted(OTHER.keys() - {"algorithm.gndpo.preset"}))
def test_a_single_difference(make_config, key):
    check = expect(check_recipe(Inputs(make_config(f"{key}={OTHER[key]}"))), "warning", key)
    assert check.detail.count("=") == 1


def test_another_estimator_has_chosen_another_signal():
    opd = (*CPU_RUN, "algorithm.adv_estimator=opd", "algorithm.gndpo.limit=1.0")
    expect(check_recipe(Inputs(verl_config(*opd))), "ok", "as published, with the signal opd")
    with_kl = (*opd, "actor_rollout_ref.actor.use_kl_loss=True")
    check = expect(check_recipe(Inputs(verl_config(*with_kl))), "warning", "use_kl_loss=True (False)")
    remedied = verl_config(*with_kl, *check.remedy.removesuffix(" at the end of the command").split())
    expect(check_recipe(Inputs(remedied)), "ok", "as published, with the signal opd")


def test_updates_between_two_syncs_are_a_difference(make_config):
    key = "trainer.v1.separate_async.parameter_sync_step"
    assert check_recipe(Inputs(make_config(f"{key}=2")))[0].status == "ok"
    expect(check_recipe(Inputs(make_config(*SEPARATE, f"{key}=2"))), "warning", f"{key}=2 (1)")


@pytest.mark.parametrize("engine", ["dp", "megatron", "veomni", "torchtitan"])
def test_the_group_sets_the_published_recipe(engine):
    given = [f"{key}={value}" for key, value in OTHER.items() if not key.startswith("algorithm.gndpo")]
    dynamic = "actor_rollout_ref.actor.use_dynamic_bsz=True"
    bare = verl_config(f"model_engine={engine}", "+recipe=gndpo", "+teacher.model.path=T", dynamic)
    assert check_recipe(Inputs(bare))[0].status == "ok" and not errors(check_verl_settings(bare))
    # It wins over what stands before it in the command, and what stands after it wins.
    mixed = verl_config(f"model_engine={engine}", *given[:3], "+recipe=gndpo", *given[3:])
    assert {found.key for found in recipe_differences(mixed)} == {override.split("=")[0] for override in given[3:]}


OWN_LOSS = (
    "actor_rollout_ref: {actor: {use_kl_loss: true, policy_loss: {loss_mode: vanilla}}, rollout: {name: vllm}}\n"
    "algorithm: {adv_estimator: grpo}\n"
)


def test_the_recipe_wins_over_a_config_file_and_can_be_named_in_one(tmp_path):
    search = "hydra: {searchpath: [pkg://verl.trainer.config]}"
    orders = {"mine": "_self_", "named": "_self_, recipe: gndpo", "changed": "recipe: gndpo, _self_"}
    for name, order in orders.items():
        (tmp_path / f"{name}.yaml").write_text(f"{search}\ndefaults: [ppo_trainer, {order}]\n{OWN_LOSS}")
    with hydra.initialize_config_dir(str(tmp_path), version_base=None):
        mine, named, changed = (hydra.compose(name) for name in ("mine", "named", "changed"))
        overridden = hydra.compose("mine", overrides=["+recipe=gndpo", "actor_rollout_ref.actor.ppo_epochs=2"])
    assert mine.actor_rollout_ref.actor.use_kl_loss and mine.algorithm.adv_estimator == "grpo"
    assert named.algorithm.adv_estimator == overridden.algorithm.adv_estimator == "gndpo"
    assert recipe_differences(named) == []
    assert [found.key for found in recipe_differences(overridden)] == ["actor_rollout_ref.actor.ppo_epochs"]
    loss = ["actor_rollout_ref.actor.policy_loss.loss_mode", "actor_rollout_ref.actor.use_kl_loss"]
    assert [found.key for found in recipe_differences(changed)] == loss


def test_other_recipes_are_hydras_business():
    with pytest.raises(HydraException, match=r"recipe/else[\s\S]*gndpo"):
        verl_config("+recipe=else")


def test_more_ranks_than_rows_cost_more_than_they_help(make_config):
    checks = check_settings(Inputs(make_config("trainer.n_gpus_per_node=16")))
    expect(checks, "warning", "the teacher has 16 ranks, but a batch has 8 rows", "data.train_batch_size")
    assert not errors(checks)
