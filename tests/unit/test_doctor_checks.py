# SPDX-License-Identifier: Apache-2.0
"""Each bad input is an error before training that names what, where and what to do; a good run passes."""

import importlib.metadata
import json
import logging
import shutil
import sys

import hydra
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import verl
from huggingface_hub import constants as hub
from omegaconf import OmegaConf
from tokenizers import pre_tokenizers
from verl.plugin.platform import get_platform
from verl.trainer.ppo import core_algos, v1

from examples.quickstart.tiny_vlm import build_tiny_vlm, build_tokenizer
from verl_gndpo.doctor import settings as preflight
from verl_gndpo.doctor.compatibility import compare, read_model_files
from verl_gndpo.doctor.settings import (
    PreflightError,
    check_data,
    check_models,
    check_routing,
    check_settings,
    require,
    run_checks,
)
from verl_gndpo.estimators import compute_log_ratio_advantage

CPU_RUN = (
    "algorithm.adv_estimator=gndpo",
    "+gndpo=default",
    "+teacher=worker",
    "actor_rollout_ref.actor.policy_loss.loss_mode=gspo",
    "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean",
    "actor_rollout_ref.actor.use_dynamic_bsz=True",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.n=2",
    "actor_rollout_ref.rollout.load_format=auto",
    "actor_rollout_ref.rollout.free_cache_engine=False",
    "+actor_rollout_ref.rollout.enable_sleep_mode=False",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    "data.train_batch_size=4",
    "trainer.device=cpu",
    "trainer.n_gpus_per_node=1",
    "+ray_kwargs.ray_init.num_gpus=1",
)
IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
PROMPT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


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
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra.compose("ppo_trainer", overrides=list(CPU_RUN))
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
    monkeypatch.setattr(preflight, "without_accelerator", lambda: True)


def write(path, rows, *, image_type=IMAGES, drop=()):
    """Write a parquet file of (prompt text, number of images)."""
    image = {"bytes": b"\x89PNG" * 50, "path": "a.png"}
    if image_type != IMAGES:
        image = "a.png"
    columns = {
        "prompt": pa.array([[{"role": "user", "content": text}] for text, _ in rows], PROMPT),
        "images": pa.array([[image] * count for _, count in rows], image_type),
    }
    table = pa.table({name: column for name, column in columns.items() if name not in drop})
    # As data_prep writes them; also keeps the pages of a column of bytes findable.
    pq.write_table(table, path, compression="none", use_dictionary=False)
    return path


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def errors(checks):
    return [check for check in checks if check.status == "error"]


def expect(checks, status, *words):
    """Exactly one finding of that status holds all the words, in its detail or remedy."""
    found = [c for c in checks if c.status == status and all(w in f"{c.detail} -> {c.remedy}" for w in words)]
    assert len(found) == 1, "\n".join(f"{c.status} {c.name}: {c.detail} -> {c.remedy}" for c in checks)
    return found[0]


# ---- a whole run


def test_a_good_run_passes(make_config, on_cpu):
    config = make_config()
    assert {check.status for check in run_checks(config)} == {"ok"}
    require(config)


def test_without_a_config_only_the_environment_is_checked():
    assert {check.name for check in run_checks()} <= {"verl", "plugin", "versions", "accelerator"}


def test_all_errors_come_in_one_message(make_config, on_cpu, tmp_path):
    config = make_config(
        "algorithm.gndpo.limt=1", "trainer.use_v1=False", f"data.val_files={tmp_path}/no.parquet", teacher="/no/where"
    )
    with pytest.raises(PreflightError) as error:
        require(config)
    lines = str(error.value).splitlines()
    assert lines[0] == "verl-gndpo: 4 error(s), nothing was started"
    assert len(lines) == 5
    for words in ("algorithm.gndpo.limit?", "trainer.use_v1=True", "/no/where", "no.parquet"):
        assert words in str(error.value)


def test_warnings_are_logged_and_don_t_stop_a_run(make_config, on_cpu, teacher, caplog):
    (teacher / "chat_template.jinja").write_text("{{ messages }}")
    with caplog.at_level(logging.WARNING):
        require(make_config(teacher=teacher))
    assert "the chat templates differ" in caplog.text


def test_the_trainer_asks_before_it_builds_anything(make_config, on_cpu):
    with pytest.raises(
        PreflightError, match=r"teacher folder /no/where does not exist -> correct teacher\.model\.path"
    ):
        v1.get_trainer_cls("sync")(make_config(teacher="/no/where"))


# ---- environment


@pytest.mark.parametrize("place", ["module", "metadata"])
def test_another_verl_is_refused(monkeypatch, place):
    if place == "module":
        monkeypatch.setattr(verl, "__version__", "0.8.0")
    else:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.8.0")
    expect(preflight.check_verl(), "error", "0.8.0", "only 0.9.1 is", "pip install verl==0.9.1")


def test_a_verl_that_can_t_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    expect(run_checks(), "error", "verl can't be imported", "ModuleNotFoundError")


def test_a_plugin_that_is_switched_off(monkeypatch):
    monkeypatch.delitem(sys.modules, "verl_gndpo.plugin")
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "other")
    expect(preflight.check_plugin(), "error", "VERL_USE_EXTERNAL_PLUGINS=other leaves it out", "unset")


def test_a_plugin_that_is_not_installed(monkeypatch):
    monkeypatch.delitem(sys.modules, "verl_gndpo.plugin")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [])
    expect(preflight.check_plugin(), "error", f"not installed for {sys.executable}", "pip install verl-gndpo")


def test_a_plugin_that_fails_shows_the_exception_that_verl_hides(monkeypatch):
    monkeypatch.delitem(sys.modules, "verl_gndpo.plugin")
    monkeypatch.delattr("wrapt.register_post_import_hook")
    expect(preflight.check_plugin(), "error", "importing verl_gndpo.plugin fails", "register_post_import_hook")


def test_registries_that_someone_else_has_changed(monkeypatch):
    monkeypatch.delitem(core_algos.ADV_ESTIMATOR_REGISTRY, "opd")
    monkeypatch.setitem(v1.trainer_base.TRAINER_REGISTRY, "sync", v1.PPOTrainerSync)
    expect(preflight.check_plugin(), "error", "opd, sync")


def test_installed_versions_against_what_the_package_asks_for(monkeypatch):
    version = importlib.metadata.version
    strange = {"tensordict": "0.13.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: strange.get(name) or version(name))
    check = expect(preflight.check_versions(), "warning", "tensordict 0.13.0", "pip install")
    assert ">=0.10.0" in check.remedy


def test_a_rollout_engine_that_is_not_there(monkeypatch, make_config):
    version = importlib.metadata.version

    def without_vllm(name):
        if name.startswith("vllm"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_vllm)
    expect(preflight.check_versions(make_config()), "error", "rollout.name=vllm", "not installed")
    config = make_config("actor_rollout_ref.rollout.name=null")
    expect(preflight.check_versions(config), "error", "actor_rollout_ref.rollout.name is not set")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("actor_rollout_ref.rollout.load_format=dummy", ["load_format=dummy", "load_format=auto", "another model"]),
        ("trainer.device=cuda", ["trainer.device=cuda", "trainer.device=cpu"]),
        ("actor_rollout_ref.rollout.free_cache_engine=True", ["no sleep mode", "enable_sleep_mode=False"]),
        ("actor_rollout_ref.rollout.enable_sleep_mode=True", ["no sleep mode", "free_cache_engine=False"]),
        (
            "actor_rollout_ref.model.override_config.attn_implementation=flash_attention_2",
            ["flash_attention_2", "sdpa"],
        ),
    ],
)
def test_settings_that_need_an_accelerator(make_config, on_cpu, override, words):
    checks = preflight.check_accelerator(make_config(override))
    expect(checks, "error", *words)
    assert len(errors(checks)) == 1


def test_without_gpus_ray_has_to_be_told_a_number(make_config, on_cpu):
    checks = preflight.check_accelerator(make_config("ray_kwargs.ray_init.num_gpus=null"))
    expect(checks, "warning", "Ray counts fewer than 1 GPUs", "+ray_kwargs.ray_init.num_gpus=1")


def test_a_teacher_apart_needs_a_number_of_its_own(make_config, on_cpu):
    apart = ("teacher.placement=dedicated", "teacher.n_gpus_per_node=2")
    expect(preflight.check_accelerator(make_config(*apart)), "warning", "than 3 GPUs", "num_gpus=3")
    enough = preflight.check_accelerator(make_config(*apart, "ray_kwargs.ray_init.num_gpus=3"))
    assert [check.status for check in enough] == ["ok"]


def test_fewer_devices_than_asked_for_is_a_warning_here_and_an_error_in_the_cluster(make_config, monkeypatch):
    config = make_config("trainer.n_gpus_per_node=64")
    monkeypatch.setattr(preflight, "without_accelerator", lambda: False)
    expect(preflight.check_accelerator(config), "warning", "visible to this process", "n_gpus_per_node=64", "head node")

    kind = get_platform().ray_resource_name()
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {kind: 8.0})
    expect(preflight.check_accelerator(config), "error", f"the Ray cluster has 8 {kind}", "n_gpus_per_node=64")
    expect(preflight.check_accelerator(make_config()), "ok", f"the Ray cluster has 8 {kind}")


# ---- settings


def test_an_estimator_that_nobody_knows(make_config):
    check = expect(preflight.check_estimator(make_config("algorithm.adv_estimator=gndop")), "error", "gndop is unknown")
    assert check.remedy == "did you mean gndpo?"


def test_a_run_without_gndpo_is_verls_own_business(make_config, on_cpu):
    # Neither the teacher's path nor the settings that only GNDPO has matter.
    grpo = ("algorithm.adv_estimator=grpo", "algorithm.use_kl_in_reward=True", "algorithm.gndpo.limt=3")
    checks = run_checks(make_config(*grpo, teacher="/no/where"))
    assert not errors(checks)
    expect(checks, "warning", "GNDPO is not selected", "teacher has no effect", "algorithm.adv_estimator=gndpo")
    expect(run_checks(make_config(*grpo, "teacher=null")), "ok", "GNDPO is not selected")


SERVER = ("teacher.backend=server", "teacher.n_gpus_per_node=2", "teacher.temperature=1.0")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher.server.gpu_mem=0.5"], ["teacher.server.gpu_mem", "no setting"]),
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
    checks = check_settings(make_config(*SERVER, *overrides))
    if words:
        expect(checks, "error", *words)
    else:
        assert not errors(checks)


def two_teachers(even, odd="odd"):
    return (
        *("teacher.model.path=null", f"teacher.models.one.path={even}", "teacher.models.one.keys=[even]"),
        *(f"teacher.models.two.path={even}", f"teacher.models.two.keys=[{odd}]"),
    )


def test_every_sample_has_a_teacher_and_every_key_samples(make_config, student, tmp_path):
    write_sources(tmp_path / "train.parquet", ["even", "odd", "even", "odd"])
    expect(check_routing(make_config(*two_teachers(student))), "ok", "data_source: even, odd")
    checks = check_routing(make_config(*two_teachers(student, odd="od")))
    expect(checks, "error", "no teacher for data_source=odd", "even, od", "teacher.models.<name>.keys")
    expect(checks, "warning", "keys that no training row has: od", "even, odd")
    everything = check_routing(make_config(*two_teachers(student, odd="'*'")))
    assert not errors(everything)


def test_a_routing_key_that_is_no_column(make_config, student, tmp_path):
    write_sources(tmp_path / "train.parquet", ["even", "odd"] * 2)
    checks = check_routing(make_config(*two_teachers(student), "teacher.routing_key=subject"))
    expect(checks, "error", "teacher.routing_key=subject is no column")


def test_files_that_can_t_be_looked_into_are_not_taken_for_wrong(make_config, student, tmp_path):
    write_sources(tmp_path / "train.parquet", ["even", "odd"] * 2)
    (tmp_path / "more.jsonl").write_text("{}")
    files = f"data.train_files=[{tmp_path / 'train.parquet'},{tmp_path / 'more.jsonl'},hdfs://host/x.parquet]"
    checks = check_routing(make_config(*two_teachers(student), files))
    assert not errors(checks)
    expect(checks, "warning", "more.jsonl, hdfs://host/x.parquet: not looked into")
    lacking = tmp_path / "lacking.parquet"
    write(lacking, [("<image>How many?", 1)] * 4, drop=["data_source"])
    files = f"data.train_files=[{tmp_path / 'train.parquet'},{lacking}]"
    expect(check_routing(make_config(*two_teachers(student), files)), "error", "is no column", "lacking.parquet")


def test_verls_servers_are_found_by_strings_only(make_config, student, tmp_path):
    write_sources(tmp_path / "train.parquet", [1, 2, 1, 2])
    numbers = (
        *("teacher.model.path=null", f"teacher.models.one.path={student}", "teacher.models.one.keys=['1']"),
        *(f"teacher.models.two.path={student}", "teacher.models.two.keys=['2']"),
    )
    assert not errors(check_routing(make_config(*numbers)))
    checks = check_routing(make_config(*numbers, *SERVER))
    expect(checks, "error", "data_source holds int", "teacher.backend=worker")


def test_a_single_teacher_is_not_routed(make_config):
    assert check_routing(make_config()) == []


def test_lora_adapters_in_a_vision_tower_that_vllm_would_leave_out(make_config):
    lora = "actor_rollout_ref.model.lora_rank=8"
    expect(check_models(make_config(lora)), "warning", "LoRA adapters in the vision tower", "freeze_vision_tower=True")
    for remedy in ("actor.freeze_vision_tower=True", "model.exclude_modules=visual"):
        checks = check_models(make_config(lora, f"actor_rollout_ref.{remedy}"))
        assert not [check for check in checks if "LoRA" in check.detail]


def test_heads_that_cannot_be_dealt_out_to_the_ranks_of_a_row(make_config):
    checks = check_models(make_config("teacher.ulysses_sequence_parallel_size=3"))
    expect(checks, "error", "ulysses_sequence_parallel_size=3", "4 attention heads")


def test_each_of_several_teachers_is_compared_with_the_student(make_config, student, teacher):
    edit(teacher / "config.json", lambda c: c.update(image_token_id=7))
    several = (f"teacher.models.good.path={student}", f"teacher.models.bad.path={teacher}")
    checks = check_models(make_config("teacher.model.path=null", *several))
    expect(checks, "error", "config.image_token_id")
    assert len(errors(checks)) == 1


def test_shards_have_to_divide_the_ranks(make_config):
    checks = check_settings(make_config("trainer.n_gpus_per_node=3", "teacher.fsdp.fsdp_size=2"))
    expect(checks, "error", "teacher.fsdp.fsdp_size=2 does not divide the teacher's 3 GPUs")
    assert not errors(check_settings(make_config("trainer.n_gpus_per_node=4", "teacher.fsdp.fsdp_size=2")))


def test_flash_attention_knows_no_float32(make_config, monkeypatch):
    monkeypatch.setattr(preflight, "without_accelerator", lambda: False)
    plain = "actor_rollout_ref.model.override_config.attn_implementation=null"
    expect(check_settings(make_config("teacher.dtype=float32", plain)), "error", "knows no float32", "sdpa")
    assert not errors(check_settings(make_config("teacher.dtype=float32")))


def test_what_verl_itself_refuses_is_told_in_one_line(make_config):
    config = make_config("actor_rollout_ref.actor.use_dynamic_bsz=False")
    check = expect(
        preflight.check_verl_settings(config), "error", "verl refuses this config", "ppo_micro_batch_size_per_gpu"
    )
    assert "\n" not in check.detail


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algorithm.gndpo.limt=3", ["algorithm.gndpo.limt", "did you mean algorithm.gndpo.limit?"]),
        ("teacher.tempature=1", ["teacher.tempature", "did you mean teacher.temperature?"]),
        ("teacher.model.path=null", ["no teacher is configured", "teacher.model.path"]),
        ("gndpo.clip=3", ["a section gndpo at the top level", "algorithm.gndpo"]),
        ("trainer.use_v1=False", ["trainer.use_v1=True"]),
        ("trainer.v1.trainer_mode=asinc", ["trainer_mode=asinc", "sync, colocate_async, separate_async"]),
        ("algorithm.use_kl_in_reward=True", ["algorithm.use_kl_in_reward=False", "use_kl_loss"]),
        ("distillation.enabled=True", ["distillation.enabled=False"]),
        ("critic.enable=True", ["critic.enable=False"]),
        ("teacher.ulysses_sequence_parallel_size=2", ["size=2 does not divide the teacher's 1 GPUs"]),
        ("trainer.n_gpus_per_node=16", ["the teacher has 16 ranks, and a batch 8 rows", "data.train_batch_size"]),
    ],
)
def test_a_setting_that_does_not_go_with_gndpo(make_config, override, words):
    checks = check_settings(make_config(override))
    expect(checks, "error", *words)
    assert len(checks) == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algorithm.rollout_correction.bypass_mode=True", ["leaves out the student's pass", "bypass_mode=False"]),
        ("actor_rollout_ref.model.use_fused_kernels=True", ["never has the student's logits"]),
        ("actor_rollout_ref.actor.strategy=veomni", ["strategy=veomni does not return", "strategy=fsdp2"]),
        ("actor_rollout_ref.actor.ulysses_sequence_parallel_size=2", ["_size=2 spreads a row's logits over ranks"]),
        ("actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=2", ["fsdp_config.ulysses"]),
    ],
)
def test_a_setting_that_does_not_go_with_the_kl_baseline(make_config, override, words):
    checks = check_settings(make_config("algorithm.adv_estimator=v_opd", override))
    expect(checks, "error", *words)
    assert len(checks) == 1
    assert not errors(check_settings(make_config(override)))


def test_the_kl_baseline_needs_workers(make_config):
    servers = (*SERVER, "teacher.server.tensor_model_parallel_size=1")
    assert not errors(check_settings(make_config(*servers)))
    checks = check_settings(make_config(*servers, "algorithm.gndpo.baseline=kl"))
    expect(checks, "error", "baseline=kl: teacher.backend=server", "teacher.backend=worker")
    assert not errors(check_settings(make_config("algorithm.gndpo.baseline=kl")))


def test_one_teacher_can_be_all_that_there_are(make_config):
    each = ("algorithm.gndpo.baseline=teacher", "algorithm.gndpo.scale=teacher")
    assert not errors(check_settings(make_config(*each)))


USABLE = "gpg, grpo, grpo_passk, grpo_vectorized, opo, reinforce_plus_plus, reinforce_plus_plus_baseline, rloo"


@pytest.mark.parametrize(
    ("estimator", "words"),
    [
        ("gae", ["=gae needs more than rewards", USABLE]),
        ("remax", ["=remax needs more than rewards"]),
        ("gndpo", ["=gndpo makes its advantages of a teacher"]),
        ("grppo", ["=grppo is unknown to verl", USABLE]),
    ],
)
def test_the_task_reward_needs_an_estimator_of_rewards(make_config, estimator, words):
    task = "algorithm.gndpo.task_reward."
    checks = check_settings(make_config(f"{task}coef=0.5", f"{task}estimator={estimator}"))
    expect(checks, "error", *words)
    # Where it is not mixed in, nobody asks for it.
    assert not errors(check_settings(make_config(f"{task}estimator={estimator}")))


@pytest.mark.parametrize("estimator", [*USABLE.split(", "), "gdpo", "rloo_vectorized"])
def test_the_estimators_that_are_offered_work(make_config, estimator):
    task = "algorithm.gndpo.task_reward."
    config = make_config(f"{task}coef=0.5", f"{task}estimator={estimator}")
    assert not errors(check_settings(config))
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
    checks = check_settings(make_config(actor + "freeze_vision_tower=True", *[actor + o for o in overrides]))
    if words:
        expect(checks, "error", *words)
    else:
        assert not errors(checks)


def test_another_loss_than_the_published_one_is_a_note(make_config):
    actor = "actor_rollout_ref.actor."
    expect(check_settings(make_config(actor + "loss_agg_mode=token-mean")), "ok", "token-mean; the published")
    expect(check_settings(make_config(actor + "policy_loss.loss_mode=vanilla")), "ok", "the published loss is gspo")


# ---- teacher and student


def length(folder):
    """Number of tokens of a folder's tokenizer."""
    content = json.loads((folder / "tokenizer.json").read_text())
    return max([*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])]) + 1


def differences(student, teacher):
    return compare(read_model_files(str(student), "student"), read_model_files(str(teacher), "teacher"))


def expect_difference(found, fatal, *words):
    assert any(d.fatal is fatal and all(w in d.detail for w in words) for d in found), found


def test_a_model_is_no_different_from_itself(student):
    assert differences(student, student) == []


def test_vocabularies_padded_to_other_sizes_are_one_family(make_config, teacher, student):
    edit(teacher / "config.json", lambda c: c["text_config"].update(vocab_size=576))
    checks = check_models(make_config(teacher=teacher))
    expect(checks, "ok", f"same {length(student)} tokens", "padded to 448 (student) and 576 (teacher)")
    assert {check.status for check in checks} == {"ok"}


def test_a_teacher_with_less_padding_is_a_warning(student, teacher):
    edit(teacher / "config.json", lambda c: c["text_config"].update(vocab_size=length(student)))
    (found,) = differences(student, teacher)
    expect_difference([found], False, "padded to 448", f"the teacher's to {length(student)}")


def test_a_vocabulary_smaller_than_the_tokenizer(student, teacher):
    edit(teacher / "config.json", lambda c: c["text_config"].update(vocab_size=400))
    expect_difference(
        differences(student, teacher), True, "the teacher's config has vocab_size=400", f"up to {length(student) - 1}"
    )


def test_two_tokens_that_have_changed_places(make_config, teacher):
    def swap(content):
        vocab = content["model"]["vocab"]
        first, second = list(vocab)[300:302]
        vocab[first], vocab[second] = vocab[second], vocab[first]

    edit(teacher / "tokenizer.json", swap)
    check = expect(check_models(make_config(teacher=teacher)), "error", "2 tokens have other ids", "student", "teacher")
    assert check.name == "tokenizer"
    assert "student's family" in check.remedy


def test_a_tokenizer_trained_on_something_else(make_config, teacher, student):
    build_tokenizer(["entirely different words, learned from elsewhere"]).save_pretrained(teacher)
    checks = check_models(make_config(teacher=teacher))
    expect(checks, "error", f"of the student's {length(student)} tokens are not in the teacher's")


def test_the_same_tokens_merged_in_another_order(student, teacher):
    edit(teacher / "tokenizer.json", lambda c: c["model"]["merges"].reverse())
    expect_difference(differences(student, teacher), True, "the merges differ", "at 0: student")


def test_the_same_merges_over_text_split_elsewhere(student, teacher):
    ours, theirs = read_model_files(str(student), "student"), read_model_files(str(teacher), "teacher")
    theirs.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    expect_difference(compare(ours, theirs), True, "Find the measure", "with the teacher's", "from position")


def test_tokens_that_only_the_teacher_has_are_a_warning(student, teacher):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(teacher)
    (found,) = differences(student, teacher)
    expect_difference([found], False, "1 tokens that the student lacks", f"'<think>' (id {length(student)})")


@pytest.mark.parametrize(("role", "fatal"), [("eos_token", True), ("pad_token", False)])
def test_special_tokens(student, teacher, role, fatal):
    edit(teacher / "tokenizer_config.json", lambda c: c.update({role: "<|im_start|>"}))
    token_id = json.loads((student / "config.json").read_text())["text_config"][f"{role}_id"]
    expect_difference(differences(student, teacher), fatal, role[:3], f"({token_id})", "teacher '<|im_start|>' (")


def test_an_image_token_of_another_id(student, teacher):
    own = json.loads((student / "config.json").read_text())["image_token_id"]
    edit(teacher / "config.json", lambda c: c.update(image_token_id=7))
    expect_difference(differences(student, teacher), True, f"config.image_token_id: student {own}, teacher 7")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patch_size", 16),
        ("merge_size", 4),
        ("temporal_patch_size", 1),
        ("image_mean", [0.5, 0.5, 0.5]),
        ("image_std", [0.5, 0.5, 0.5]),
        ("size", {"longest_edge": 12345, "shortest_edge": 3136}),
    ],
)
def test_image_preprocessing(student, teacher, key, value):
    own = json.loads((student / "processor_config.json").read_text())["image_processor"][key]
    edit(teacher / "processor_config.json", lambda c: c["image_processor"].update({key: value}))
    (found,) = differences(student, teacher)
    expect_difference([found], True, f"image processor's {key}")
    for part in (own, value):
        values = part.values() if isinstance(part, dict) else part if isinstance(part, list) else [part]
        assert all(str(v) in found.detail for v in values)


def test_a_vision_tower_with_other_patches(make_config, teacher):
    edit(teacher / "config.json", lambda c: c["vision_config"].update(patch_size=16))
    checks = check_models(make_config(teacher=teacher))
    expect(checks, "error", "config.vision_config.patch_size: student 14, teacher 16")


def test_another_model_type_and_chat_template_are_warnings(student, teacher):
    edit(teacher / "config.json", lambda c: c.update(model_type="qwen2_vl"))
    (teacher / "chat_template.jinja").write_text("{{ messages }}")
    found = differences(student, teacher)
    expect_difference(found, False, "student qwen2_5_vl, teacher qwen2_vl")
    expect_difference(found, False, "the chat templates differ")


def test_text_only_models(make_config, student, text_model):
    expect_difference(differences(student, text_model), True, "the teacher is a text-only model")
    assert differences(text_model, student) == []
    checks = check_models(make_config(f"actor_rollout_ref.model.path={text_model}", teacher=text_model))
    assert not errors(checks)
    expect(checks, "ok", f"same {length(student)} tokens and special ids; vocabularies")


def test_a_student_whose_processor_verl_would_do_without(make_config, teacher, student):
    edit(teacher / "processor_config.json", lambda c: c.update(processor_class="InternVLProcessor"))
    edit(teacher / "tokenizer_config.json", lambda c: c.update(processor_class="InternVLProcessor"))
    checks = check_models(make_config(f"actor_rollout_ref.model.path={teacher}", teacher=student))
    expect(checks, "error", "verl can't use the processor of", str(teacher), "images would be lost")


def test_a_model_that_is_elsewhere_is_copied_and_compared(make_config, teacher, monkeypatch):
    edit(teacher / "config.json", lambda c: c.update(image_token_id=7))
    monkeypatch.setattr("verl.utils.fs.copy_to_local", lambda path: {"hdfs://host/teacher": str(teacher)}[path])
    expect(check_models(make_config(teacher="hdfs://host/teacher")), "error", "config.image_token_id")


def test_a_model_that_can_t_be_copied_is_not_trusted(make_config):
    checks = check_models(make_config(teacher="hdfs://host/teacher"))
    expect(checks, "error", "hdfs://host/teacher can't be copied here", "correct teacher.model.path")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/no/where", "teacher folder /no/where does not exist"),
        ("some/deep/folder", "teacher folder some/deep/folder does not exist"),
        ("./teacher", "teacher folder ./teacher does not exist"),
        (__file__, "is a file"),
    ],
)
def test_a_wrong_teacher_path_asks_no_hub(make_config, monkeypatch, name, words):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *a, **k: pytest.fail("asked"))
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda *a, **k: pytest.fail("asked"))
    model = make_config(teacher=name)
    model.actor_rollout_ref.model.path = "hdfs://not/looked/at"
    check = expect(check_models(model), "error", words)
    assert check.remedy == "correct teacher.model.path"


def test_a_tilde_in_a_model_path(make_config):
    config = make_config()
    config.teacher.model.path = "~/teacher"
    expect(check_models(config), "error", "nothing expands the ~", "/teacher")


def test_a_hub_id_that_can_t_be_found_says_where_was_looked(make_config, monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    words = ("teacher nobody/nothing", "its config can't be read", "no folder of that name", "HF_HUB_OFFLINE is set")
    expect(check_models(make_config(teacher="nobody/nothing")), "error", *words)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "its config can't be read"),
        (lambda f: (f / "config.json").write_text('{"model_type": "nonesuch"}'), "nonesuch"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "its tokenizer can't be read"),
        (lambda f: (f / "processor_config.json").unlink(), "its image processor can't be read"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
            ),
            "1 of the 2 files named in model.safetensors.index.json are missing, first model-2.safetensors",
        ),
    ],
)
def test_a_damaged_teacher_folder(make_config, teacher, spoil, words):
    spoil(teacher)
    expect(check_models(make_config(teacher=teacher)), "error", words, "correct teacher.model.path")


# ---- data


def data_errors(make_config, *overrides):
    return errors(check_data(make_config(*overrides)))


def test_good_files_are_counted(make_config, tmp_path):
    write(tmp_path / "more.parquet", [("<image> or <image>?", 2), ("no picture", 0)])
    config = make_config(f"data.train_files=[{tmp_path}/train.parquet,{tmp_path}/more.parquet]")
    checks = check_data(config)
    expect(checks, "ok", "train.parquet: 4 rows, 4 images")
    expect(checks, "ok", "more.parquet: 2 rows, 2 images")
    assert len(checks) == 3


def test_images_given_by_path_are_counted_too(make_config, tmp_path):
    write(tmp_path / "train.parquet", [("<image><image>", 2)] * 4, image_type=pa.list_(pa.string()))
    expect(check_data(make_config()), "ok", "train.parquet: 4 rows, 8 images")


@pytest.mark.parametrize("key", ["train_files", "val_files"])
def test_a_missing_file(make_config, tmp_path, key):
    (error,) = data_errors(make_config, f"data.{key}={tmp_path}/gone.parquet")
    assert f"data.{key}: {tmp_path}/gone.parquet does not exist" in error.detail
    assert f"python data_prep/geo3k.py --local_save_dir {tmp_path}" in error.remedy


def test_no_file_at_all(make_config):
    (error,) = data_errors(make_config, "data.val_files=null")
    assert "data.val_files is empty" in error.detail


def test_a_file_that_is_no_parquet(make_config, tmp_path):
    (tmp_path / "train.parquet").write_text("PAR1 it is not")
    expect(check_data(make_config()), "error", "train.parquet can't be read as parquet")


def test_a_parquet_file_that_was_cut_off(make_config, tmp_path):
    path = write(tmp_path / "train.parquet", [("<image>", 1)] * 100)
    path.write_bytes(path.read_bytes()[:-200])
    expect(check_data(make_config()), "error", "train.parquet can't be read as parquet")


def test_a_folder_or_another_format(make_config, tmp_path):
    (tmp_path / "notes.txt").touch()
    expect(check_data(make_config(f"data.val_files={tmp_path}")), "error", "is neither a .parquet nor")
    expect(check_data(make_config(f"data.val_files={tmp_path}/notes.txt")), "error", "is neither a .parquet nor")


def test_files_that_are_not_looked_into(make_config, tmp_path):
    (tmp_path / "train.jsonl").touch()
    expect(check_data(make_config(f"data.train_files={tmp_path}/train.jsonl")), "ok", "train.jsonl: JSON")
    expect(check_data(make_config("data.train_files=hdfs://host/train.parquet")), "ok", "hdfs://host/train.parquet")
    (check,) = check_data(make_config("data.custom_cls.path=mine.py", "data.train_files=/any/thing"))
    assert "data.custom_cls.path=mine.py reads it" in check.detail


def test_more_images_and_fewer_images_than_placeholders(make_config, tmp_path):
    rows = [("<image>", 1)] * 40
    rows[3], rows[17], rows[30], rows[31] = ("<image><image>", 1), ("no placeholder", 1), ("<image>", 0), ("<image>", 0)
    write(tmp_path / "train.parquet", rows)
    check = expect(check_data(make_config()), "error", "train.parquet: 4 of 40 rows have mismatched media")
    assert "row 3: 2 <image> in its prompt, 1 in column images" in check.detail
    assert "row 17: 0 <image> in its prompt, 1 in column images" in check.detail
    assert "row 30: 1 <image> in its prompt, 0 in column images" in check.detail
    assert "row 31" not in check.detail
    assert "repair these rows" in check.remedy


def test_rows_are_numbered_through_row_groups(make_config, tmp_path):
    rows = [("<image>", 1)] * 25
    rows[22] = ("<image><image>", 1)
    path = write(tmp_path / "train.parquet", rows)
    pq.write_table(pq.read_table(path), path, row_group_size=10)
    expect(check_data(make_config()), "error", "row 22: 2 <image>")


def test_placeholders_without_any_image_column(make_config, tmp_path):
    write(tmp_path / "train.parquet", [("<image>", 1)] * 4, drop=["images"])
    words = ("4 of 4 rows", "row 0: 1 <image> in its prompt, 0 in column images, which the file lacks")
    expect(check_data(make_config()), "error", *words)
    # The column is there, the setting names another.
    write(tmp_path / "train.parquet", [("<image>", 1)] * 4)
    expect(check_data(make_config("data.image_key=pictures")), "error", "train.parquet", "column pictures, which the")


def test_text_only_rows_may_speak_of_videos(make_config, tmp_path):
    write(tmp_path / "train.parquet", [("What does <video> mean in HTML?", 0)] * 4, drop=["images"])
    assert not data_errors(make_config)
    # Beside an image verl takes it for a placeholder.
    write(tmp_path / "train.parquet", [("<image> and <video>", 1)] * 4)
    expect(check_data(make_config()), "error", "row 0: 1 <video> in its prompt, 0 in column videos")


def test_prompts_of_several_messages(make_config, tmp_path):
    messages = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": "<image>"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "and <image>?"},
    ]
    image = {"bytes": b"", "path": None}
    table = {"prompt": pa.array([messages] * 4, PROMPT), "images": pa.array([[image] * 2] * 4, IMAGES)}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    expect(check_data(make_config()), "ok", "4 rows, 8 images")


def test_structured_content_is_left_to_verl(make_config, tmp_path):
    parts = [[{"role": "user", "content": [{"type": "text", "text": "<image>"}]}]] * 4
    pq.write_table(pa.table({"prompt": parts}), tmp_path / "train.parquet")
    assert not data_errors(make_config)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"question": ["a"]}, ["no column prompt (data.prompt_key)", "it has question"]),
        ({"prompt": ["a"]}, ["column prompt holds string", "list of messages"]),
        ({"prompt": pa.array([], PROMPT)}, ["no rows"]),
        (
            {"prompt": pa.array([[{"role": "user", "content": "<image>"}]], PROMPT), "images": ["a.png"]},
            ["column images (data.image_key) holds one string a row", "list"],
        ),
    ],
)
def test_columns_that_verl_can_t_use(make_config, tmp_path, table, words):
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    expect(check_data(make_config()), "error", "train.parquet", *words)


def test_image_bytes_are_never_read(make_config, tmp_path):
    path = write(tmp_path / "train.parquet", [("<image>", 1)] * 4)
    with pq.ParquetFile(path) as file:
        names = [file.schema.column(i).path for i in range(len(file.schema.names))]
        chunk = file.metadata.row_group(0).column(names.index("images.list.element.bytes"))
    content = bytearray(path.read_bytes())
    end = chunk.data_page_offset + chunk.total_compressed_size
    content[chunk.data_page_offset : end] = bytes(end - chunk.data_page_offset)
    path.write_bytes(content)
    with pytest.raises((OSError, pa.ArrowException)):
        pq.read_table(path)
    expect(check_data(make_config()), "ok", "train.parquet: 4 rows, 4 images")


def test_fewer_rows_than_a_batch(make_config):
    (error,) = data_errors(make_config, "data.train_batch_size=8")
    assert "4 rows" in error.detail and "data.train_batch_size=8" in error.detail
    (error,) = data_errors(make_config, "data.train_max_samples=3")
    assert "3 rows" in error.detail and "data.train_batch_size=4" in error.detail


# ---- rewards


def write_sources(path, sources, **extra_info):
    table = pa.table({"data_source": sources} | ({"extra_info": [extra_info] * len(sources)} if extra_info else {}))
    pq.write_table(table, path)


OURS = (
    "reward.custom_reward_function.path=pkg://verl_gndpo.rewards",
    "reward.custom_reward_function.name=compute_score",
)


def test_a_data_source_without_a_reward(make_config, tmp_path):
    config = make_config()
    write_sources(tmp_path / "train.parquet", ["hiyouga/geometry3k", "FanqingM/MMK12", "FanqingM/MMK12"])
    write_sources(tmp_path / "test.parquet", ["We-Math/We-Math"])
    words = ("data_source FanqingM/MMK12, We-Math/We-Math", *OURS)
    expect(preflight.check_rewards(config), "error", *words)
    assert preflight.check_rewards(make_config(*OURS)) == []
    assert preflight.check_rewards(make_config("reward.custom_reward_function.path=mine.py")) == []
    assert preflight.check_rewards(make_config("reward.reward_manager.name=dapo")) == []


def test_a_data_source_that_our_graders_do_not_know(make_config, tmp_path):
    config = make_config(*OURS)
    write_sources(tmp_path / "train.parquet", ["mine/own", "DynaMath/DynaMath_Sample"])
    expect(
        preflight.check_rewards(config), "error", "no answer type for data_source mine/own", "extra_info.answer_type"
    )
    write_sources(tmp_path / "train.parquet", ["mine/own"], answer_type="number")
    assert preflight.check_rewards(config) == []


@pytest.mark.parametrize(("kind", "known"), [("", False), (None, False), ("mcq", False), ("choice", True)])
def test_an_answer_type_has_to_be_one_that_is_known(kind, known, make_config, tmp_path):
    config = make_config(*OURS)
    table = pa.table(
        {
            "data_source": ["mine/own"],
            "extra_info": pa.array([{"answer_type": kind}], pa.struct([("answer_type", "str")])),
        }
    )
    pq.write_table(table, tmp_path / "train.parquet")
    assert (preflight.check_rewards(config) == []) == known


def test_a_function_that_the_rewards_do_not_have(make_config, tmp_path):
    config = make_config(OURS[0], "reward.custom_reward_function.name=nope")
    expect(preflight.check_rewards(config), "error", "no function nope", OURS[1])


def test_what_must_not_be_trained_on(make_config, tmp_path):
    config = make_config(*OURS)
    write_sources(tmp_path / "test.parquet", ["AI4Math/MathVista"])
    assert preflight.check_rewards(config) == []
    write_sources(tmp_path / "train.parquet", ["AI4Math/MathVista"])
    expect(preflight.check_rewards(config), "error", "AI4Math/MathVista", "evaluation only", "data.val_files")


def test_sources_that_verl_rewards_itself(make_config, tmp_path):
    config = make_config()
    write_sources(tmp_path / "train.parquet", ["hiyouga/geometry3k", "openai/gsm8k", "math_dapo"])
    assert preflight.check_rewards(config) == []
