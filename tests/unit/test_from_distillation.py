# SPDX-License-Identifier: Apache-2.0
"""`teacher.from_distillation`: the teachers of verl's own distillation, as in verl's seven examples of it."""

import pickle

import pytest
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass

from tests.helpers import verl_config
from tests.unit.doctor.helpers import errors, expect, write_sources
from verl_gndpo.config import ConfigError, read_teacher_config, teacher_paths
from verl_gndpo.doctor.data import check_routing
from verl_gndpo.doctor.inputs import Inputs
from verl_gndpo.doctor.settings import check_settings, check_verl_settings
from verl_gndpo.teacher.routing import Routing


def one_teacher(path, *, gpus, tp, engine="dp", loss="k1", policy_gradient=True, **inference):
    """The entry that verl's config has: a single teacher on all GPUs."""
    entry = "distillation.teacher_models.teacher_model"
    sizes = {"tensor_model_parallel_size": tp, "name": "vllm", "gpu_memory_utilization": 0.4, "max_model_len": 3073}
    return [
        f"model_engine={engine}",
        *(f"distillation.n_gpus_per_node={gpus}", "distillation.nnodes=1", f"{entry}.model_path={path}"),
        *[f"{entry}.inference.{key}={value}" for key, value in (sizes | inference).items()],
        f"distillation.distillation_loss.loss_mode={loss}",
        f"distillation.distillation_loss.use_policy_gradient={policy_gradient}",
    ]


def added_teachers(paths, *, gpus, tp, engine="dp"):
    """Entries of one's own, by name: (key, path)."""
    settings = [f"model_engine={engine}", f"distillation.n_gpus_per_node={gpus}", "distillation.nnodes=1"]
    for name, (key, path) in paths.items():
        entry = f"+distillation.teacher_models.{name}"
        settings += [f"{entry}.key={key}", f"{entry}.model_path={path}", f"{entry}.num_replicas=1"]
        settings += [f"{entry}.inference.name=vllm", f"{entry}.inference.tensor_model_parallel_size={tp}"]
        settings += [f"{entry}.inference.max_model_len=3073"]
    return [*settings, "distillation.distillation_loss.loss_mode=k1", "distillation.distillation_loss.topk=32"]


MIXED = {"gsm8k": ("openai/gsm8k", "Qwen/Qwen3-32B"), "geo3k": ("hiyouga/geometry3k", "Qwen/Qwen3-VL-32B-Instruct")}
SMALL = {"gsm8k": ("openai/gsm8k", "Qwen/Qwen3-1.7B")}
EXAMPLES = {
    "text": one_teacher("Qwen/Qwen3-32B", gpus=4, tp=2),
    "vision": one_teacher("Qwen/Qwen3-VL-32B-Instruct", gpus=4, tp=2),
    "vision, experts": one_teacher("Qwen/Qwen3.5-35B-A3B", gpus=8, tp=8, expert_parallel_size=8),
    "Megatron, top-k loss": one_teacher(
        "Qwen/Qwen3-32B", gpus=4, tp=2, engine="megatron", loss="forward_kl_topk", policy_gradient=False
    ),
    "VeOmni, one added": added_teachers(SMALL, gpus=1, tp=1, engine="veomni"),
    "two": added_teachers(MIXED, gpus=4, tp=2),
    "VeOmni, two": added_teachers(MIXED, gpus=4, tp=2, engine="veomni"),
}
COMMON = (
    "algorithm.adv_estimator=gndpo",
    "distillation.enabled=True",
    "distillation.distillation_loss.use_task_rewards=False",
    "data.train_batch_size=128",
    "data.max_prompt_length=1024",
    "data.max_response_length=2048",
    "actor_rollout_ref.actor.use_dynamic_bsz=True",
)
FROM = "++teacher.from_distillation=True"


def run(name, *overrides):
    return (*EXAMPLES[name], *COMMON, *overrides)


def settings_errors(overrides):
    config = verl_config(*overrides)
    return errors([*check_settings(Inputs(config)), *check_verl_settings(config)])


def paths_and_keys(teacher):
    return {(model.path, model.keys) for model in teacher.teachers.values()}


def expected(name):
    if "two" in name:
        return {(path, (key,)) for key, path in MIXED.values()}
    paths = [setting.split("model_path=")[1] for setting in EXAMPLES[name] if "model_path=" in setting]
    return {(paths[0], ("*",))}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_doctors_remedy_makes_verls_examples_run(name, make_trainer):
    (problem,) = settings_errors(run(name))
    assert "distillation.enabled=True" in problem.detail and problem.remedy == FROM
    assert settings_errors(run(name, problem.remedy)) == []
    trainer = make_trainer(*run(name, problem.remedy))
    assert paths_and_keys(trainer.teacher_config) == expected(name)
    # verl neither starts its servers nor computes its loss.
    assert not trainer.use_teacher_policy and not trainer.config.distillation.enabled
    assert trainer.teacher_config.placement == "colocated"


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_servers_can_score_too(name, make_trainer):
    trainer = make_trainer(*run(name, FROM, "+teacher.backend=server"))
    assert settings_errors(run(name, FROM, "+teacher.backend=server")) == []
    assert paths_and_keys(trainer.teacher_config) == expected(name)
    assert trainer.use_teacher_policy
    before, after = verl_config(*run(name)).distillation, trainer.config.distillation
    assert after.teacher_models == before.teacher_models
    models = omega_conf_to_dataclass(after).teacher_models
    assert {model.model_path for model in models.values()} == {path for path, _ in expected(name)}
    # What verl asks its servers for are the log-probs of the sampled tokens.
    assert not omega_conf_to_dataclass(after).distillation_loss.loss_settings.use_topk
    trainer._init_resource_pool_mgr()
    actors = {cls.__ray_actor_class__.__name__ for cls in trainer.role_worker_mapping.values()}
    assert "PolicyLossWorker" in actors
    gpus = after.n_gpus_per_node
    assert trainer.resource_pool_manager.resource_pool_spec["teacher_pool"] == [gpus]


def test_workers_of_their_own_take_the_gpus_that_verls_teachers_would_have():
    dedicated = ("+teacher.placement=dedicated", FROM)
    teacher = read_teacher_config(verl_config(*run("two", *dedicated)))
    assert (teacher.n_gpus_per_node, teacher.nnodes, Routing(teacher).column) == (4, 1, "data_source")
    teacher = read_teacher_config(verl_config(*run("two", *dedicated, "+teacher.n_gpus_per_node=2")))
    assert (teacher.n_gpus_per_node, teacher.nnodes) == (2, 1)


def test_the_column_that_routes_is_verls():
    teacher = read_teacher_config(verl_config(*run("two", FROM, "distillation.teacher_key=subject")))
    assert Routing(teacher).column == "subject"
    assert Routing(read_teacher_config(verl_config(*run("text", FROM, "distillation.teacher_key=x")))).column is None


def test_rows_without_a_teacher_are_told_by_verls_keys(tmp_path):
    write_sources(tmp_path / "a.parquet", ["openai/gsm8k", "else"])
    data = f"data.train_files={tmp_path / 'a.parquet'}"
    checks = check_routing(Inputs(verl_config(*run("two", FROM, data))))
    key = "distillation.teacher_models.<name>.key"
    expect(checks, "error", "no teacher for data_source=else", f"name a teacher for each of them in {key}")
    expect(checks, "warning", f"{key} has values that no training row has: hiyouga/geometry3k")
    other = check_routing(Inputs(verl_config(*run("two", FROM, data, "distillation.teacher_key=subject"))))
    expect(other, "error", "no column subject (distillation.teacher_key)", "set distillation.teacher_key")


def test_the_paths_are_known_by_verls_keys():
    assert list(teacher_paths(verl_config(*run("two", FROM)))) == [
        "distillation.teacher_models.gsm8k.model_path",
        "distillation.teacher_models.geo3k.model_path",
    ]
    own = verl_config("+teacher.models.a.path=A", "+teacher.models.b.path=null")
    assert {key: model.path for key, model in teacher_paths(own).items()} == {"teacher.models.a.path": "A"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (run("text", "+teacher.model.path=T"), ["-> distillation.enabled=False"]),
        (run("text", FROM, "+teacher.model.path=T"), ["teacher.model and teacher.from_distillation", "both"]),
        (run("text", FROM, "+teacher.routing_key=x"), ["teacher.routing_key and teacher.from_distillation"]),
        (run("text", FROM, "+teacher.backend=server", "+teacher.server.name=vllm"), ["teacher.server and"]),
        (run("text", FROM, "distillation.teacher_models.teacher_model.model_path=null"), ["teacher_model.model_path"]),
        (run("two", FROM, "distillation.teacher_models.geo3k.key=null"), ["teacher_models.geo3k.key is null"]),
        (run("two", FROM, "distillation.teacher_models.geo3k.key=openai/gsm8k"), ["several", "key openai/gsm8k"]),
        (run("two", FROM, "+teacher.backend=server", "+teacher.nnodes=2"), ["no effect", "distillation.nnodes"]),
        (run("two", FROM, "+teacher.placement=dedicated", "distillation.nnodes=0"), ["distillation.nnodes=0"]),
        (run("two", FROM, "+teacher.n_gpus_per_node=2"), ["teacher.n_gpus_per_node", "placement=dedicated"]),
        ((FROM, "distillation.teacher_models={}"), ["distillation.teacher_models.teacher_model.model_path is null"]),
    ],
)
def test_what_does_not_go_with_verls_teachers(overrides, words):
    with pytest.raises(ConfigError) as error:
        read_teacher_config(verl_config(*overrides))
    assert all(word in str(error.value) for word in words), error.value


def test_the_remedy_beside_a_teacher_of_ones_own_works():
    own = run("text", "+teacher.model.path=T")
    with pytest.raises(ConfigError) as error:
        read_teacher_config(verl_config(*own))
    assert paths_and_keys(read_teacher_config(verl_config(*own, error.value.remedy))) == {("T", ("*",))}


def test_verls_section_is_only_read():
    config = verl_config(*run("two", FROM))
    before = OmegaConf.to_container(config)
    read_teacher_config(config)
    assert OmegaConf.to_container(config) == before


def test_the_error_survives_the_way_from_a_worker():
    error = ConfigError("a is wrong", "a=1")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "a is wrong -> a=1"
