# SPDX-License-Identifier: Apache-2.0
"""What installing the plugin does to a stock verl, and what it does not."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl_gndpo.config import read_signal_config, read_teacher_config
from verl_gndpo.trainer import GNDPOTrainerMixin

MODES = ("sync", "colocate_async", "separate_async")
OVERRIDDEN = {"__init__", "_setup", "_balance_batch", "_compute_advantage"}


def verl_config(*overrides):
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=["actor_rollout_ref.rollout.name=vllm", *overrides])


def test_an_existing_config_needs_two_overrides():
    config = verl_config("algorithm.adv_estimator=gndpo", "+teacher.model.path=teacher")
    assert read_teacher_config(config).model.path == "teacher"
    assert read_signal_config(config.algorithm, "gndpo").clip == 5.0


def test_hydra_finds_the_config_groups():
    config = verl_config("algorithm.adv_estimator=gndpo", "+teacher=worker", "+gndpo=default", "teacher.model.path=t")
    assert config.teacher.model.path == "t" and config.algorithm.gndpo.clip == 5.0
    # The groups and the typed defaults are one set of defaults.
    bare = verl_config("algorithm.adv_estimator=gndpo", "+teacher.model.path=t")
    assert read_teacher_config(config) == read_teacher_config(bare)
    assert read_signal_config(config.algorithm, "gndpo") == read_signal_config(bare.algorithm, "gndpo")


def test_the_teacher_follows_the_student_unless_told():
    config = verl_config(
        "+teacher.model.path=t",
        "actor_rollout_ref.rollout.temperature=0.6",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=777",
    )
    teacher = read_teacher_config(config)
    assert teacher.temperature == 0.6 and teacher.max_token_len_per_gpu == 777
    assert teacher.model.override_config == {"attn_implementation": "sdpa"}
    released = read_teacher_config(verl_config("+teacher.model.path=t", "+teacher.temperature=1.0"))
    assert released.temperature == 1.0


@pytest.mark.parametrize("mode", MODES)
def test_the_trainers_keep_name_and_behaviour(mode):
    from verl.trainer.ppo.v1 import get_trainer_cls
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    trainer = get_trainer_cls(mode)
    assert trainer.__mro__[1] is GNDPOTrainerMixin and issubclass(trainer, PPOTrainer)
    stock = trainer.__mro__[2]
    inherited = (
        {name for cls in stock.__mro__ for name in vars(cls)} - OVERRIDDEN - {"__doc__", "__module__", "__dict__"}
    )
    differing = {name for name in inherited if getattr(trainer, name, None) != getattr(stock, name, None)}
    assert differing <= {"__abstractmethods__", "_abc_impl", "__weakref__", "__init_subclass__", "__subclasshook__"}


@pytest.fixture
def grpo_batch(monkeypatch):
    """A finished batch in an in-memory TransferQueue, and the trainer attributes that the advantage step reads."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 5, 2, 4]

    def nested(make):
        return torch.nested.as_nested_tensor([make(n) for n in lengths], layout=torch.jagged)

    store = {
        "response_mask": nested(lambda n: torch.ones(n, dtype=torch.int64)),
        "rm_scores": nested(lambda n: torch.rand(n, generator=generator)),
        "old_log_probs": nested(lambda n: -torch.rand(n, generator=generator)),
    }
    written = {}

    def kv_batch_get(keys, partition_id, select_fields):
        data = TensorDict({k: store[k] for k in select_fields if k in store}, batch_size=len(lengths))
        data["uid"] = np.array(["a", "a", "b", "b"], dtype=object).tolist()
        return data

    def kv_batch_put(keys, partition_id, fields):
        written.update({k: v.to_padded_tensor(0.0) for k, v in fields.items()})
        return "written"

    import transfer_queue

    monkeypatch.setattr(transfer_queue, "kv_batch_get", kv_batch_get)
    monkeypatch.setattr(transfer_queue, "kv_batch_put", kv_batch_put)
    batch = KVBatchMeta(keys=[f"{u}_{i}_0" for i, u in enumerate("aabb")], tags=[{}] * 4, partition_id="train")
    return batch, written


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_other_estimators_get_the_same_advantages_and_metrics(grpo_batch, estimator):
    """The advantage step of the replaced trainer and of the stock one, on the same batch."""
    from verl.trainer.ppo.v1 import get_trainer_cls

    batch, written = grpo_batch
    trainer = get_trainer_cls("sync")
    config = verl_config(f"algorithm.adv_estimator={estimator}")
    results = []
    for cls in (trainer, trainer.__mro__[2]):
        instance = object.__new__(cls)
        instance.config, instance.uses_gndpo = config, False
        metrics = {}
        written.clear()
        assert instance._compute_advantage(batch, metrics) == "written"
        results.append((dict(written), metrics))
    (ours, our_metrics), (stock, stock_metrics) = results
    assert our_metrics == stock_metrics and ours.keys() == stock.keys()
    assert all(torch.equal(ours[k], stock[k]) for k in ours) and ours["advantages"].abs().max() > 0


def test_no_teacher_is_started_for_other_estimators(monkeypatch):
    """__init__, _setup and _balance_batch of the mixin do nothing but call verl's."""
    calls = []

    class Stock:
        def __init__(self, config):
            calls.append("init")
            self.replay_buffer = SimpleNamespace(poll_interval=2.0)

        def _setup(self):
            calls.append("setup")

        def _balance_batch(self, batch, metrics, **kwargs):
            calls.append(("balance", kwargs))
            return batch

    trainer = type("Trainer", (GNDPOTrainerMixin, Stock), {})(verl_config("algorithm.adv_estimator=grpo"))
    trainer._setup()
    assert trainer._balance_batch("batch", {}, keep_minibatch=True) == "batch"
    assert calls == ["init", "setup", ("balance", {"keep_minibatch": True})]
    assert trainer.replay_buffer.poll_interval == 2.0 and not hasattr(trainer, "teacher_wg")


def run_python(code, **env):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_verl_loads_the_plugin_and_none_of_its_heavy_parts():
    """The time itself is in docs/benchmarks.md."""
    loaded = run_python("import verl, sys; print(*sys.modules)").split()
    assert "verl_gndpo.plugin" in loaded
    heavy = {"verl_gndpo.trainer", "verl_gndpo.teacher.worker", "verl_gndpo.estimators"}
    heavy |= {"verl.trainer.ppo.v1", "verl.trainer.ppo.core_algos", "hydra.core.plugins", "vllm", "torchvision"}
    assert heavy.isdisjoint(loaded)


def test_the_plugin_can_be_left_out():
    code = "import verl; from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY as r; print('gndpo' in r)"
    assert run_python(code, VERL_USE_EXTERNAL_PLUGINS="none") == "False"
