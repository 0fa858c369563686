# SPDX-License-Identifier: Apache-2.0
"""One test for each defect of the method's released code that no other test covers yet.

Elsewhere: the clamped baseline and whitening of one token (test_advantage.py), scoring without padding removal and the
teacher's temperature (integration/test_teacher_worker.py), unlike tokenizers (test_doctor_checks.py), the missing
diagnostics (test_observe.py, end_to_end).
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
import transfer_queue
from omegaconf import OmegaConf
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from transfer_queue import KVBatchMeta
from transformers import AutoProcessor, Qwen3Config
from verl.trainer.config import CheckpointConfig
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig
from verl.workers.engine_workers import ActorRolloutRefWorker

from tests.helpers import verl_config
from tests.integration.helpers import as_batch, load, make_rows, nested, one_rank
from tests.tiny_models import build_tiny
from verl_gndpo.config import read_signal_config
from verl_gndpo.observe.monitor import SignalMonitor
from verl_gndpo.presets import PRESETS
from verl_gndpo.teacher.engine import TeacherEngine, TeacherEngineConfig
from verl_gndpo.teacher.routing import Routing

REPO = Path(__file__).parents[2]
RECIPE = "examples/run_qwen2_5vl_gndpo.sh"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The overrides that the example script hands to verl, as it would on a machine without an accelerator."""
    folder = tmp_path_factory.mktemp("recipe")
    python = folder / "python"
    python.write_text('#!/bin/sh\n[ "$2" = verl.trainer.main_ppo ] && shift 2 && printf "%s\\n" "$@"\nexit 0\n')
    python.chmod(0o755)
    settings = {"PYTHON": str(python), "PROFILE": "cpu", "FREEZE_VISION": "False", "OUTPUT_DIR": str(folder / "out")}
    result = subprocess.run(["bash", RECIPE], cwd=REPO, env=os.environ | settings, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


class Recipe:
    """The example script's trainer and its actor in this process, with a batch in place of Ray, rollout and queue."""

    restarts = 0

    def __init__(self, trainer, rows, monkeypatch):
        """
        Args:
            trainer: verl's, with the mixin.
            rows: of `make_rows`; each is the answer to a prompt of its own.
        """
        self.trainer, self.fields = trainer, dict(as_batch(rows).items())
        self.fields["loss_mask"] = self.fields["response_mask"]
        self.fields["responses"] = nested(row["response"] for row in rows)
        self.fields["prompts"] = nested(row["ids"][: -len(row["response"])] for row in rows)
        self.fields["rm_scores"] = nested(torch.zeros(len(row["response"])) for row in rows)
        self.fields["rollout_log_probs"] = self.fields["rm_scores"]
        self.fields["uid"] = NonTensorStack(*map(str, range(len(rows))))
        self.fields["data_source"] = NonTensorStack(*["geo"] * len(rows))
        self.worker = ActorRolloutRefWorker(trainer.config.actor_rollout_ref, role="actor")
        self.worker.init_model()
        trainer.actor_rollout_wg, trainer.teacher = self, self
        self.routing = Routing(trainer.teacher_config)
        self.micro_batches = 0
        self.gradients = {}
        engine = self.worker.actor.engine
        forward, step = engine.forward_step, engine.optimizer_step

        def forward_step(*args, **kwargs):
            self.micro_batches += 1
            return forward(*args, **kwargs)

        def optimizer_step():
            found = ((name, p.grad) for name, p in engine.module.named_parameters())
            self.gradients = {name: grad.full_tensor().clone() for name, grad in found if grad is not None}
            return step()

        monkeypatch.setattr(engine, "forward_step", forward_step)
        monkeypatch.setattr(engine, "optimizer_step", optimizer_step)
        monkeypatch.setattr(transfer_queue, "kv_batch_get", self._get)
        monkeypatch.setattr(transfer_queue, "kv_batch_put", self._put)

    def step(self):
        """Everything after the rollout, as verl's trainer calls it."""
        batch, metrics = self._meta(), {}
        batch.extra_info["temperature"] = 1.0
        self.trainer._run_until("student", batch, metrics)
        batch = self.trainer._compute_old_log_prob(batch, metrics)
        batch = self.trainer._compute_advantage(batch, metrics)
        self.micro_batches = 0
        self.trainer._update_actor(batch, metrics)

    # What the trainer asks of its actor and of its teacher:

    def compute_log_prob(self, batch):
        return self._put(batch.keys, batch.partition_id, self.worker.compute_log_prob(self._data(batch)))

    def update_actor(self, batch):
        return self.worker.update_actor(self._data(batch))

    def score(self, batch):
        chance = torch.Generator().manual_seed(0)
        self.fields["teacher_log_probs"] = nested(
            -5 * torch.rand(len(row), generator=chance) for row in self.fields["responses"].unbind()
        )
        return {}

    def _data(self, batch):
        data = self._get(batch.keys, batch.partition_id, batch.fields)
        tu.assign_non_tensor(data, **batch.extra_info)
        return data

    def _get(self, keys, partition_id, select_fields):
        return TensorDict({n: self.fields[n] for n in select_fields if n in self.fields}, batch_size=len(keys))

    def _put(self, keys, partition_id, fields):
        self.fields |= {name: fields[name] for name in fields.keys() if name not in ("metrics",)}
        return self._meta()

    def _meta(self):
        keys = [f"{uid}_0_0" for uid in self.fields["uid"]]
        return KVBatchMeta(keys=keys, tags=[{}] * len(keys), partition_id="train", fields=list(self.fields))


def plain_gradients(path, rows, advantages):
    """Gradients of the mean over rows of the mean over tokens of -advantage x log-prob; of each row alone, with
    transformers' own model."""
    model = load(path)
    for row, of_row in zip(rows, advantages, strict=True):
        kinds = (row["ids"][None] == model.config.image_token_id).int()
        logits = model(input_ids=row["ids"][None], mm_token_type_ids=kinds, **row["inputs"]).logits[0]
        length = len(row["response"])
        log_probs = logits.log_softmax(-1)[-length - 1 : -1].gather(-1, row["response"][:, None])[:, 0]
        (-(of_row * log_probs).mean() / len(rows)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("max_tokens", "micro_batches"), [(10_000, 1), (120, 4)])
def test_1_the_loss_scale_of_multimodal_rows_depends_on_sequences_alone(
    recipe, max_tokens, micro_batches, make_trainer, monkeypatch, tmp_path
):
    """The released code divided the loss of a multimodal micro-batch by its number of dict keys.

    One step of the example script on rows with two images, one and none.
    """
    student = build_tiny("qwen2_5_vl", tmp_path / "student", seed=0)
    rows = make_rows(student, [1, 0, 2, 1], [[9, 2], [5], [1, 12], [7, 3]])
    trainer = make_trainer(
        *recipe,
        f"actor_rollout_ref.model.path={student}",
        "teacher.model.path=T",
        f"data.train_batch_size={len(rows)}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={len(rows)}",
        "actor_rollout_ref.rollout.n=1",
        f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={max_tokens}",
    )
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "metrics.jsonl"))
    processor = AutoProcessor.from_pretrained(student)
    trainer.monitor = SignalMonitor(trainer.config, trainer._gndpo, processor.tokenizer, processor)
    with one_rank():
        run = Recipe(trainer, rows, monkeypatch)
        run.step()
    assert run.micro_batches == micro_batches
    expected = plain_gradients(student, rows, run.fields["advantages"].unbind())
    assert run.gradients.keys() == expected.keys() and any("visual" in name for name in expected)
    for name, gradient in expected.items():
        tolerance = 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(
            run.gradients[name], gradient, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def recipe_config(recipe):
    return verl_config(*recipe, "teacher.model.path=T")


def estimate(config, estimator, mask):
    """What one of our estimators makes of three rows of four tokens: (student's log-probs, advantages)."""
    config.algorithm.adv_estimator = estimator
    chance = torch.Generator().manual_seed(0)
    old, teacher, negative_kl, rewards = (-3 * torch.rand(3, 4, generator=chance) for _ in range(4))
    needs_kl = read_signal_config(config.algorithm, estimator).signal.baseline == "kl"
    advantages, _ = get_adv_estimator_fn(estimator)(
        token_level_rewards=rewards,
        response_mask=mask,
        index=["a", "a", "b"],
        config=config.algorithm,
        teacher_log_probs=teacher,
        old_log_probs=old,
        **({"kl": -negative_kl} if needs_kl else {}),
    )
    return old, advantages


MASKS = {
    "a row is masked out": [[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]],
    "one token in the batch": [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("estimator", PRESETS)
def test_6_rows_without_valid_tokens_get_no_nan_and_no_gradient(recipe_config, estimator, mask):
    """Through our estimators, and the policy loss of the example script with its way to add up tokens and rows.

    The released code whitened one token by a deviation of NaN, and took the mean over the tokens of an empty row.
    """
    mask = torch.tensor(mask)
    old, advantages = estimate(recipe_config, estimator, mask)
    assert torch.isfinite(advantages).all() and (advantages[mask == 0] == 0).all()

    actor = omega_conf_to_dataclass(recipe_config.actor_rollout_ref.actor)
    totals = {"dp_size": 1, "batch_num_tokens": int(mask.sum()), "global_batch_size": 3, "loss_scale_factor": None}
    actor.global_batch_info.update(totals)
    log_prob = old.clone().requires_grad_()
    loss, _ = get_policy_loss_fn(actor.policy_loss.loss_mode)(
        old_log_prob=old,
        log_prob=log_prob,
        advantages=advantages,
        response_mask=mask.bool(),
        loss_agg_mode=actor.loss_agg_mode,
        config=actor,
    )
    loss.backward()
    torch.testing.assert_close(log_prob.grad, -advantages / mask.sum(-1, keepdim=True).clamp(min=1) / 3)


def test_6_a_batch_without_valid_tokens_is_refused(recipe_config):
    with pytest.raises(ValueError, match="no valid response token in a batch of shape \\(3, 4\\)"):
        estimate(recipe_config, "gndpo", torch.zeros(3, 4))


def test_3_what_the_teacher_likes_is_reinforced():
    """The released Megatron teacher had the sign wrong."""
    student = torch.tensor([[-2.0, -2.0, -2.0]])
    teacher = torch.tensor([[-0.5, -2.0, -4.0]])
    config = verl_config("algorithm.adv_estimator=gndpo").algorithm
    advantages, _ = get_adv_estimator_fn("gndpo")(
        teacher_log_probs=teacher, old_log_probs=student, response_mask=torch.ones(1, 3), config=config
    )
    assert advantages[0, 0] > advantages[0, 1] > advantages[0, 2] and advantages[0, 0] > 0 > advantages[0, 2]


@pytest.mark.parametrize("offload", [True, False])
def test_7_the_offload_flag_means_what_it_says(monkeypatch, tmp_path, offload):
    """Weights move to the device and back once a call, or not at all; the released teacher did both per micro-batch."""
    from verl.workers.engine.fsdp import transformer_impl

    moves = []
    Qwen3Config(architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path)
    model = HFModelConfig(path=str(tmp_path), load_tokenizer=False, use_remove_padding=False)
    settings = TeacherEngineConfig(strategy="fsdp2", param_offload=offload, use_torch_compile=False)
    with one_rank():
        torch.distributed.init_process_group("gloo")
        engine = TeacherEngine(model, settings, None, CheckpointConfig())
        # As `initialize` builds them, in place of a model.
        engine.module, engine.optimizer = torch.nn.Linear(1, 1), None
        monkeypatch.setattr(transformer_impl, "get_device_name", lambda: "accelerator")
        monkeypatch.setattr("verl.workers.engine.base.get_device_name", lambda: "accelerator")
        monkeypatch.setattr(transformer_impl, "load_fsdp_model_to_gpu", lambda module: moves.append("up"))
        monkeypatch.setattr(transformer_impl, "offload_fsdp_model_to_cpu", lambda module: moves.append("down"))
        assert not engine.engine_config.forward_only, "verl's forward-only engines ignore the flag"
        with engine.eval_mode():
            # Any number of micro-batches.
            assert moves == (["up"] if offload else [])
    assert moves == (["up", "down"] if offload else [])


def test_8_rewards_keep_their_name(gndpo_step):
    """The released code renamed rm_scores, after which ordinary reward models no longer worked."""
    store, written, metrics, _ = gndpo_step()
    assert "rm_scores" not in written and store["rm_scores"].values().abs().max() > 0
    assert written.keys() == {"advantages", "returns"}
    assert all(name.startswith("gndpo/") for name in metrics)


def test_the_mixin_hands_the_batch_to_the_estimator(gndpo_step):
    store, written, metrics, estimator_saw = gndpo_step()
    mask = store["response_mask"].to_padded_tensor(0)
    teacher, old = (store[name].to_padded_tensor(0.0).double() for name in ("teacher_log_probs", "old_log_probs"))
    log_ratio = (teacher - old).clamp(-5, 5)
    valid = log_ratio[mask.bool()]
    expected = (log_ratio - valid.mean()) / (valid.var() + 1e-8).sqrt() * mask
    torch.testing.assert_close(written["advantages"].double(), expected, atol=1e-6, rtol=0)
    assert metrics["gndpo/mu"] == pytest.approx(valid.mean().item(), rel=1e-5) and metrics["gndpo/tokens"] == mask.sum()
    assert estimator_saw["index"] == ["a", "a", "b", "b"]
    assert estimator_saw["token_level_rewards"].shape == mask.shape


def test_rollout_correction_still_applies(gndpo_step):
    """Importance weights of truncated rollout correction are computed and written as for verl's own estimators."""
    correction = OmegaConf.create({"rollout_is": "token", "rollout_is_threshold": 2.0, "bypass_mode": False})
    _, written, metrics, _ = gndpo_step(correction)
    assert written.keys() == {"advantages", "returns", "response_mask", "rollout_is_weights"}
    assert any(name.startswith("rollout_corr/") for name in metrics)
