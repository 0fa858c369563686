# SPDX-License-Identifier: Apache-2.0
"""verl's teacher servers: their answers cut to the responses, and the section of verl's config that starts them."""

import hydra
import pytest
import torch
from tensordict import TensorDict
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine_workers import ActorRolloutRefWorker

from verl_gndpo.config import read_teacher_config
from verl_gndpo.teacher.server import distillation_section, response_log_probs, use_servers
from verl_gndpo.verl_patches.policy_loss import POLICY_LOSS_WORKERS


def nested(rows):
    return torch.nested.as_nested_tensor([torch.as_tensor(row) for row in rows], layout=torch.jagged)


def answers(ids, responses, shift=1):
    """Make a batch of answers as verl stores them: at each place the id and a log-prob of the token `shift` after it.

    The last places hold padding.
    """
    scored = [[[x] for x in [*row[shift:], *[0] * shift]] for row in ids]
    return TensorDict(
        {
            "input_ids": nested(ids),
            "response_mask": nested([[1] * n for n in responses]),
            "teacher_ids": nested([torch.tensor(row, dtype=torch.int32) for row in scored]),
            "teacher_logprobs": nested([torch.tensor(row) * -0.5 for row in scored]),
        },
        batch_size=len(ids),
    )


def test_log_probs_of_the_response_are_those_of_its_own_tokens():
    data = answers([[10, 11, 12, 13], [20, 21, 22]], [2, 1])
    scores = response_log_probs(data, ["x", "y"])
    assert [row.tolist() for row in scores.unbind()] == [[-6.0, -6.5], [-11.0]]
    assert scores.values().dtype == torch.float32


def test_other_tokens_than_the_students_name_row_token_and_both_ids():
    data = answers([[10, 11, 12, 13], [20, 21, 22, 23]], [2, 2], shift=2)
    with pytest.raises(ValueError, match="row x: response token 0 is 12, but the teacher has scored 13"):
        response_log_probs(data, ["x", "y"])


def test_another_number_of_scores_than_tokens_names_row_and_both_numbers():
    data = answers([[10, 11, 12]], [1])
    data["teacher_logprobs"] = nested([[[0.0]] * 5])
    with pytest.raises(ValueError, match="row x: 3 tokens, but the teacher has scored 5"):
        response_log_probs(data, ["x"])


def test_the_actor_of_each_trainer_keeps_what_verl_gives_it():
    """`separate_async` saves and restores the actor's weights by methods of its own worker class."""
    assert set(POLICY_LOSS_WORKERS) == {ActorRolloutRefWorker, DetachActorWorker}
    for stock, ours in POLICY_LOSS_WORKERS.items():
        assert issubclass(ours, stock)
        assert {name for name in dir(stock)} <= set(dir(ours))
    assert hasattr(POLICY_LOSS_WORKERS[DetachActorWorker], "save_model_to_cpu")


@pytest.mark.parametrize(
    ("mode", "worker"), [("sync", "PolicyLossWorker"), ("separate_async", "DetachPolicyLossWorker")]
)
def test_the_mixin_gives_the_trainer_its_worker(mode, worker, make_trainer):
    teacher = ("+teacher=server", "teacher.n_gpus_per_node=4", "teacher.model.path=T")
    trainer = make_trainer("algorithm.adv_estimator=gndpo", *teacher, mode=mode)
    trainer._init_resource_pool_mgr()
    classes = {role: cls.__ray_actor_class__.__name__ for role, cls in trainer.role_worker_mapping.items()}
    assert worker in classes.values()


def compose(*overrides):
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        base = ["+teacher=server", "teacher.n_gpus_per_node=4", "actor_rollout_ref.rollout.name=vllm"]
        return hydra.compose("ppo_trainer", overrides=[*base, *overrides])


def test_one_teacher_takes_all_the_gpus():
    config = compose("teacher.model.path=T", "+teacher.server.gpu_memory_utilization=0.7")
    use_servers(config, read_teacher_config(config))
    distillation = omega_conf_to_dataclass(config.distillation)
    (only,) = distillation.teacher_models.values()
    assert distillation.enabled
    assert (only.model_path, only.num_replicas, only.per_replica_world_size) == ("T", 2, 2)
    assert (only.inference.name, only.inference.gpu_memory_utilization) == ("vllm", 0.7)


def test_several_teachers_share_the_gpus_and_are_found_by_their_keys():
    config = compose(
        "+teacher.models.a.path=A", "+teacher.models.a.keys=[hiyouga/geometry3k]", "+teacher.models.b.path=B"
    )
    section = distillation_section(config, read_teacher_config(config))
    assert not config.distillation.enabled, "the config stays as it is"
    models = omega_conf_to_dataclass(section).teacher_models
    assert {key: (model.model_path, model.num_replicas) for key, model in models.items()} == {
        "hiyouga/geometry3k": ("A", 1),
        "b": ("B", 1),
    }
