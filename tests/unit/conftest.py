# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import torch
import transfer_queue
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from tests.helpers import verl_config
from verl_gndpo.config import read_signal_config
from verl_gndpo.teacher.routing import Routing


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
    store["teacher_kl"] = nested(lambda n: torch.rand(n, generator=generator))
    store["responses"] = nested(lambda n: torch.arange(n))
    store["prompts"] = nested(lambda n: torch.arange(2))
    store["data_source"] = ["geo", "geo", "mmk", "mmk"]
    written = {}

    def kv_batch_get(keys, partition_id, select_fields):
        data = TensorDict(batch_size=len(lengths))
        for name in store.keys() & set(select_fields):
            data[name] = store[name]
        data["uid"] = ["a", "a", "b", "b"]
        return data

    def kv_batch_put(keys, partition_id, fields):
        written.update({k: v.to_padded_tensor(0.0) for k, v in fields.items()})
        return KVBatchMeta(
            keys=keys, tags=meta.tags, partition_id=partition_id, fields=sorted({*store, *fields.keys()})
        )

    monkeypatch.setattr(transfer_queue, "kv_batch_get", kv_batch_get)
    monkeypatch.setattr(transfer_queue, "kv_batch_put", kv_batch_put)
    meta = KVBatchMeta(keys=[f"{u}_{i}_0" for i, u in enumerate("aabb")], tags=[{}] * 4, partition_id="train")
    return store, written, meta


class Letters:
    """A tokenizer of five tokens; `e` ends a response."""

    tokens = ("a", "1", "{", "e", "<image>")
    eos_token_id, all_special_ids = 3, [3, 4]

    def __len__(self):
        return len(self.tokens)

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.tokens[i] for i in ids)

    def batch_decode(self, rows):
        return [self.decode(ids) for ids in rows]


@pytest.fixture
def make_monitor(tmp_path, monkeypatch):
    """A function that builds the monitor of a student with the tokenizer `Letters`: (verl's config) -> monitor."""
    import verl_gndpo.observe.monitor as monitor_module

    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "metrics.jsonl"))
    monkeypatch.setattr(monitor_module, "copy_to_local", lambda path: path)
    monkeypatch.setattr(monitor_module, "get_generation_config", lambda path, **_: SimpleNamespace(eos_token_id=[3]))

    def make(config):
        settings = read_signal_config(config.algorithm, config.algorithm.adv_estimator)
        return monitor_module.SignalMonitor(config, settings, Letters(), SimpleNamespace(image_token_id=4))

    return make


@pytest.fixture
def make_trainer(monkeypatch):
    """A function that builds one of verl's trainers with the mixin: (overrides, mode, base) -> trainer.

    Its constructor runs as in a run, without the doctor, which has tests of its own and would look for models and data.
    With `base`, a subclass of a trainer of verl, the mixin is put in front of that.
    """
    from verl.trainer.ppo.v1 import get_trainer_cls

    import verl_gndpo.trainer as trainer_module

    monkeypatch.setattr(trainer_module, "raise_on_errors", lambda config: None)

    def make(*overrides, mode="sync", base=None):
        if mode == "separate_async":
            rollout = "actor_rollout_ref.rollout"
            overrides = (f"{rollout}.nnodes=1", f"{rollout}.checkpoint_engine.backend=nccl", *overrides)
        trainer_class = get_trainer_cls(mode)
        if base is not None:
            trainer_class = type("Trainer", (trainer_module.GNDPOTrainerMixin, base), {})
        trainer = trainer_class(verl_config(f"trainer.v1.trainer_mode={mode}", *overrides))
        # As verl's `fit` sets them for every step.
        trainer.timing_raw, trainer.global_steps = {}, 10
        return trainer

    return make


@pytest.fixture
def gndpo_step(queue, make_monitor, make_trainer, monkeypatch):
    """A function that runs the advantage step of the replaced `sync` trainer: (correction config, overrides, what
    scale=ema carries) -> (what the queue holds, what was written, metrics, what the estimator was called with)."""
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

    def step(correction=None, overrides=("algorithm.adv_estimator=gndpo",), state=None):
        trainer = make_trainer("+teacher.model.path=T", *overrides)
        if state is not None:
            trainer.signal_state = state
        # As `_setup` makes them, which needs Ray.
        trainer.monitor = make_monitor(trainer.config)
        trainer.teacher = SimpleNamespace(routing=Routing(trainer.teacher_config))
        trainer.config.algorithm.rollout_correction = correction
        metrics = {}
        assert trainer._compute_advantage(meta, metrics).keys == meta.keys
        return store, dict(written), metrics, saw

    return step
