# SPDX-License-Identifier: Apache-2.0
"""`algorithm.gndpo` and `teacher`: defaults, what is refused, and what the message names."""

import math
from dataclasses import replace

import hydra
import pytest
from omegaconf import OmegaConf

from verl_gndpo.config import (
    ConfigError,
    TeacherSection,
    gndpo_section,
    read_signal_config,
    read_teacher_config,
    uses_gndpo,
)
from verl_gndpo.presets import PRESETS

TEACHER = ("+teacher=worker", "teacher.model.path=T")


def compose(*overrides):
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        return hydra.compose("ppo_trainer", overrides=list(overrides))


def signal(estimator="gndpo", **settings):
    return read_signal_config({"gndpo": settings}, estimator)


def teacher(**settings):
    settings = {"model": {"path": "T"}} | settings
    config = {"rollout": {"temperature": 0.7, "log_prob_max_token_len_per_gpu": 4096}, "model": {}}
    return read_teacher_config(OmegaConf.create({"teacher": settings, "actor_rollout_ref": config}))


def test_the_yaml_groups_say_what_the_dataclasses_default_to():
    config = compose("+gndpo=default", "+teacher=worker")
    for section, schema in ((config.algorithm.gndpo, gndpo_section()), (config.teacher, TeacherSection)):
        assert OmegaConf.to_container(section) == OmegaConf.to_container(OmegaConf.structured(schema))


@pytest.mark.parametrize("estimator", PRESETS)
def test_the_estimators_name_is_the_preset(estimator):
    config = signal(estimator)
    assert config.preset == estimator
    stages = vars(config.signal) | config.signal.parameters
    assert {key: stages[key] for key in PRESETS[estimator]} == PRESETS[estimator]


def test_what_is_given_wins_over_the_preset_setting_by_setting():
    published = signal("gndpo").signal
    assert signal("gndpo", baseline="group").signal == replace(published, baseline="group")
    assert signal("gndpo", limit=1.0, scale=None).signal == replace(published, parameters={"limit": 1.0})
    # A preset named beside the estimator takes its place.
    assert signal("gndpo", preset="power_opd") == signal("power_opd")
    clamped = signal("gndpo", preset="power_opd", bound="clamp").signal
    assert clamped == replace(signal("power_opd").signal, bound="clamp", parameters={"limit": 5.0})


@pytest.mark.parametrize("algorithm", [None, {}, {"gndpo": None}, OmegaConf.create({"adv_estimator": "gndpo"})])
def test_a_missing_section_means_the_defaults(algorithm):
    config = read_signal_config(algorithm, "gndpo")
    stages = config.signal
    assert (stages.bound, stages.parameters, stages.baseline, stages.scale) == (
        "clamp",
        {"limit": 5.0},
        "batch",
        "batch",
    )
    assert (stages.std_floor, stages.gain_limit, config.task_reward.coef) == (1e-4, math.inf, 0.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"limt": 3}, ["algorithm.gndpo.limt", "did you mean algorithm.gndpo.limit?"]),
        ({"qqq": 3}, ["algorithm.gndpo.qqq", "known keys", "std_floor"]),
        ({"limit": 0}, ["algorithm.gndpo.limit", "above 0", "got 0"]),
        ({"limit": float("nan")}, ["algorithm.gndpo.limit", "nan"]),
        ({"limit": "wide"}, ["algorithm.gndpo.limit", "wide"]),
        ({"std_floor": -1.0}, ["algorithm.gndpo.std_floor", "above 0", "-1.0"]),
        ({"std_floor": 0.0}, ["algorithm.gndpo.std_floor", "above 0", "0.0"]),
        ({"center": "maybe"}, ["unknown key algorithm.gndpo.center"]),
        ({"bound": "clip"}, ["algorithm.gndpo.bound", "clamp", "'clip'"]),
        ({"baseline": "mean"}, ["algorithm.gndpo.baseline", "position", "'mean'"]),
        ({"scale": "std"}, ["algorithm.gndpo.scale", "rank", "'std'"]),
        ({"preset": "powr_opd"}, ["algorithm.gndpo.preset=powr_opd", "did you mean power_opd?"]),
        ({"proximal_alpha": 1.0}, ["algorithm.gndpo.proximal_alpha", "above 0 and below 1", "1.0"]),
        ({"ema_decay": 1.0}, ["algorithm.gndpo.ema_decay", "below 1", "1.0"]),
        ({"top_k": 0}, ["algorithm.gndpo.top_k", "at least 1", "got 0"]),
        ({"power_alpha": -1.0}, ["algorithm.gndpo.power_alpha", "above 0", "-1.0"]),
        ({"gain_limit": 0.0}, ["algorithm.gndpo.gain_limit", "above 0", "0.0"]),
        ({"task_reward": {"coef": -1.0}}, ["algorithm.gndpo.task_reward.coef", "at least 0", "-1.0"]),
        ({"task_reward": {"coeff": 1.0}}, ["algorithm.gndpo.task_reward.coeff", "did you mean"]),
    ],
)
def test_a_wrong_signal_setting_is_named(settings, words):
    with pytest.raises(ConfigError) as error:
        signal(**settings)
    assert all(word in str(error.value) for word in words), error.value


def test_a_section_that_is_no_section():
    # What `+teacher=worker` becomes where verl has not loaded the plugin.
    with pytest.raises(ConfigError, match="teacher must be a section of settings, got 'worker'"):
        read_teacher_config(OmegaConf.create({"teacher": "worker", "actor_rollout_ref": {}}))


def test_an_estimator_that_is_not_ours():
    with pytest.raises(ConfigError, match=r"unknown estimator 'grpo'.*gndpo, opd"):
        signal("grpo")


def test_no_teacher_is_an_error_that_says_how_to_name_one():
    config = compose("algorithm.adv_estimator=gndpo")
    with pytest.raises(ConfigError, match=r"no teacher is configured.*teacher\.model\.path"):
        read_teacher_config(config)
    with pytest.raises(ConfigError, match="no teacher is configured"):
        read_teacher_config(compose("+teacher=worker"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tempature": 1}, ["teacher.tempature", "did you mean teacher.temperature?"]),
        ({"fsdp": {"stategy": "fsdp"}}, ["teacher.fsdp.stategy", "did you mean teacher.fsdp.strategy?"]),
        ({"model": {"path": "T", "pth": "x"}}, ["teacher.model.pth", "did you mean teacher.model.path?"]),
        ({"temperature": 0}, ["teacher.temperature", "got 0"]),
        ({"dtype": "int8"}, ["teacher.dtype", "'int8'", "bfloat16"]),
        ({"fsdp": {"strategy": "megatron"}}, ["teacher.fsdp.strategy", "'megatron'"]),
        ({"logits_chunk_tokens": 0}, ["teacher.logits_chunk_tokens", "at least 1", "0"]),
        ({"max_token_len_per_gpu": "many"}, ["teacher.max_token_len_per_gpu", "many"]),
        ({"ulysses_sequence_parallel_size": 0}, ["teacher.ulysses_sequence_parallel_size", "at least 1"]),
        ({"attention": "flash"}, ["teacher.attention", "sdpa | flex", "'flash'"]),
        ({"backend": "sever"}, ["teacher.backend", "worker | server", "'sever'"]),
        ({"placement": "else"}, ["teacher.placement", "colocated | dedicated", "'else'"]),
        ({"placement": "dedicated"}, ["teacher.n_gpus_per_node"]),
        ({"n_gpus_per_node": 2}, ["teacher.n_gpus_per_node", "placement=dedicated"]),
        ({"backend": "server", "n_gpus_per_node": 1, "placement": "colocated"}, ["placement=dedicated"]),
        ({"backend": "server", "n_gpus_per_node": 1}, ["temperature 1", "0.7", "teacher.backend=worker"]),
        ({"server": {"name": "vllm"}}, ["teacher.server", "no effect"]),
        ({"models": {"a": {"path": "A"}}}, ["teacher.model and teacher.models", "both"]),
        ({"model": {"trust_remote_code": True}, "models": {"a": {"path": "A"}}}, ["teacher.model and", "both"]),
        ({"routing_key": "subject"}, ["teacher.routing_key", "no effect", "teacher.models"]),
        ({"nnodes": 2}, ["teacher.nnodes", "placement=dedicated"]),
        ({"fsdp": {"fsdp_size": 0}}, ["teacher.fsdp.fsdp_size", "-1", "got 0"]),
        ({"model": {}, "models": {"a": {"pth": "A"}}}, ["teacher.models.a.pth", "teacher.models.a.path?"]),
        ({"model": {}, "models": {"a": {}}}, ["teacher.models.a.path is not given"]),
        ({"model": {}, "models": {"a": {"path": "A", "weight": 0}}}, ["teacher.models.a.weight", "above 0"]),
        ({"model": {}, "models": {"a": {"path": "A", "keys": []}}}, ["teacher.models.a.keys", "empty"]),
    ],
)
def test_a_wrong_teacher_setting_is_named(settings, words):
    with pytest.raises(ConfigError) as error:
        teacher(**settings)
    assert all(word in str(error.value) for word in words), error.value


def test_what_is_not_set_follows_the_student():
    config = compose(
        *TEACHER,
        "actor_rollout_ref.rollout.temperature=0.7",
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=4096",
        "actor_rollout_ref.model.use_remove_padding=True",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    )
    read = read_teacher_config(config)
    assert (read.temperature, read.max_token_len_per_gpu) == (0.7, 4096)
    assert read.teachers["teacher"].override_config == {"attn_implementation": "sdpa"}


def test_what_is_set_wins_over_the_student():
    read = teacher(temperature=1.0, max_token_len_per_gpu=99)
    assert (read.temperature, read.max_token_len_per_gpu) == (1.0, 99)


def test_where_the_teacher_runs_decides_whether_its_weights_wait_on_the_host():
    assert teacher().placement == "colocated" and teacher().fsdp.param_offload is True
    apart = teacher(placement="dedicated", n_gpus_per_node=2)
    assert apart.fsdp.param_offload is False
    assert teacher(fsdp={"param_offload": False}).fsdp.param_offload is False
    assert teacher(backend="server", n_gpus_per_node=1, temperature=1.0).placement == "dedicated"


def test_one_teacher_is_several_with_one_that_scores_everything():
    (name, model), *others = teacher().teachers.items()
    assert (name, model.path, model.keys, others) == ("teacher", "T", ("*",), [])


def test_several_teachers_follow_the_student_too():
    config = compose(
        *("+teacher=worker", "+teacher.models.geo.path=G", "+teacher.models.maths.path=M"),
        "+teacher.models.maths.keys=[mmk12,TIGER-Lab/ViRL39K]",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    )
    named = read_teacher_config(config).teachers
    assert {name: model.keys for name, model in named.items()} == {
        "geo": ("geo",),
        "maths": ("mmk12", "TIGER-Lab/ViRL39K"),
    }
    assert all(model.override_config == {"attn_implementation": "sdpa"} for model in named.values())


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ({"a": {"path": "A", "keys": ["x", "y"]}, "b": {"path": "B"}}, ["teacher.models.a.keys", "one key", "x, y"]),
        ({"a": {"path": "A", "keys": ["*"]}, "b": {"path": "B"}}, ["teacher.models.a.keys", "one key"]),
        (
            {"a": {"path": "A", "keys": ["x"]}, "b": {"path": "B", "keys": ["x"]}},
            ["same key x", "teacher.backend=worker"],
        ),
    ],
)
def test_verls_servers_take_one_key_a_teacher(models, words):
    with pytest.raises(ConfigError) as error:
        teacher(model={}, models=models, backend="server", n_gpus_per_node=2, temperature=1.0)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "float32"}, "teacher.dtype"),
        ({"self_check": False}, "teacher.self_check"),
        ({"fsdp": {"param_offload": True}}, "teacher.fsdp"),
        ({"model": {"path": "T", "trust_remote_code": True}}, "teacher.model.trust_remote_code"),
        ({"model": {}, "models": {"a": {"path": "A", "weight": 2}}}, "teacher.models.a.weight"),
    ],
)
def test_what_a_server_would_ignore_is_refused(settings, words):
    with pytest.raises(ConfigError) as error:
        teacher(backend="server", n_gpus_per_node=2, temperature=1.0, **settings)
    assert words in str(error.value) and "teacher.server" in str(error.value)


def test_greedy_rollouts_have_nothing_to_compare():
    config = compose(*TEACHER, "actor_rollout_ref.rollout.temperature=0")
    with pytest.raises(ConfigError, match=r"rollout\.temperature=0\.0.*above 0"):
        read_teacher_config(config)


def test_the_server_group_selects_the_servers():
    read = read_teacher_config(compose("+teacher=server", "teacher.model.path=T", "teacher.n_gpus_per_node=4"))
    assert (read.backend, read.placement, read.n_gpus_per_node, read.temperature) == ("server", "dedicated", 4, 1.0)


def test_reading_leaves_the_config_as_it_was():
    config = compose(*TEACHER)
    before = OmegaConf.to_container(config)
    read_teacher_config(config)
    assert OmegaConf.to_container(config) == before


@pytest.mark.parametrize(("name", "ours"), [("gndpo", True), ("opd", True), ("grpo", False), ("gae", False)])
def test_which_runs_are_ours(name, ours):
    assert uses_gndpo(compose(f"algorithm.adv_estimator={name}")) is ours
