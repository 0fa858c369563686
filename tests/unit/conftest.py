# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import torch
import transfer_queue
from hydra import compose, initialize_config_module
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from verl_gndpo.config import TeacherConfig, TeacherModelConfig
from verl_gndpo.teacher.routing import Routing


def verl_config(*overrides):
    """verl's own `ppo_trainer` config with overrides, as `python -m verl.trainer.main_ppo` would compose it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=["actor_rollout_ref.rollout.name=vllm", *overrides])


@pytest.fixture
def queue(monkeypatch):
    """A finished batch of four rows in an in-memory TransferQueue: (what it holds, what is written to it, its meta)."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 5, 2, 4]

    def nested(make):
        return torch.nested.as_nested_tensor([make(n) for n in lengths], layout=torch.jagged)

    store = {"response_mask": nested(lambda n: torch.ones(n, dtype=torch.int64))}
    store["rm_scores"] = nested(lambda n: torch.rand(n, generator=generator))
    for name in ("old_log_probs", "rollout_log_probs", "teacher_log_probs"):
        store[name] = nested(lambda n: -torch.rand(n, generator=generator))
    written = {}

    def kv_batch_get(keys, partition_id, select_fields):
        data = TensorDict({k: store[k] for k in select_fields if k in store}, batch_size=len(lengths))
        data["uid"] = ["a", "a", "b", "b"]
        return data

    def kv_batch_put(keys, partition_id, fields):
        written.update({k: v.to_padded_tensor(0.0) for k, v in fields.items()})
        return "written"

    monkeypatch.setattr(transfer_queue, "kv_batch_get", kv_batch_get)
    monkeypatch.setattr(transfer_queue, "kv_batch_put", kv_batch_put)
    meta = KVBatchMeta(keys=[f"{u}_{i}_0" for i, u in enumerate("aabb")], tags=[{}] * 4, partition_id="train")
    return store, written, meta


@pytest.fixture
def gndpo_step(queue, monkeypatch):
    """A function that runs the advantage step of the replaced `sync` trainer: (correction config) ->
    (what the queue holds, what was written, metrics, what the estimator was called with)."""
    from verl.trainer.ppo.v1 import get_trainer_cls

    import verl_gndpo.trainer as trainer_module

    store, written, meta = queue
    saw = {}
    get = trainer_module.get_adv_estimator_fn

    def watched(name):
        def estimator(**kwargs):
            saw.update(kwargs)
            return get(name)(**kwargs)

        return estimator

    monkeypatch.setattr(trainer_module, "get_adv_estimator_fn", watched)

    def step(correction=None):
        trainer = object.__new__(get_trainer_cls("sync"))
        trainer.config, trainer.uses_gndpo = verl_config("algorithm.adv_estimator=gndpo"), True
        single = TeacherConfig(model=TeacherModelConfig(path="T"))
        trainer.teacher, trainer.teacher_config = SimpleNamespace(routing=Routing(single)), single
        trainer.config.algorithm.rollout_correction = correction
        metrics = {}
        assert trainer._compute_advantage(meta, metrics) == "written"
        return store, dict(written), metrics, saw

    return step
