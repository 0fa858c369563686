# SPDX-License-Identifier: Apache-2.0
"""One test for each defect of the method's released code that no other test covers yet.

Elsewhere: the clamped baseline and whitening of one token (test_advantage.py), scoring without padding removal and the
teacher's temperature (integration/test_teacher_worker.py), unlike tokenizers (test_doctor_checks.py), the missing
diagnostics (test_observe.py, end_to_end).
"""

import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import FSDPActorConfig

from verl_gndpo.blockwise import log_ratio_advantages
from verl_gndpo.teacher.engine import TeacherEngine, TeacherEngineConfig


def gspo_gradient(lengths, micro_batches, length=12, rows=8):
    """Gradient of our recipes' loss on the live log-probs, accumulated over micro-batches as verl's engines do."""
    config = FSDPActorConfig(strategy="fsdp2", use_dynamic_bsz=True, rollout_n=1)
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(rows, length, generator=g)
    log_prob = old.clone().requires_grad_()
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).float()
    advantages = torch.randn(rows, length, generator=g) * mask
    config.global_batch_info.update(dp_size=1, batch_num_tokens=mask.sum().item(), global_batch_size=rows)
    config.global_batch_info["loss_scale_factor"] = None
    for part in torch.arange(rows).split(rows // micro_batches):
        loss, _ = get_policy_loss_fn("gspo")(
            old_log_prob=old[part],
            log_prob=log_prob[part],
            advantages=advantages[part],
            response_mask=mask[part],
            loss_agg_mode="seq-mean-token-mean",
            config=config,
        )
        loss.backward()
    return log_prob.grad, advantages, mask


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
def test_1_the_loss_scale_depends_on_sequences_alone(micro_batches):
    """The released code divided multimodal micro-batches by their number of dict keys."""
    gradient, advantages, mask = gspo_gradient([12, 3, 5, 1, 7, 12, 2, 9], micro_batches)
    torch.testing.assert_close(gradient, -advantages / mask.sum(-1, keepdim=True) / 8)


def test_6_a_row_without_valid_tokens_has_no_nan_in_the_loss():
    gradient, _, _ = gspo_gradient([12, 0, 5, 1, 0, 12, 2, 9], micro_batches=2)
    assert torch.isfinite(gradient).all() and (gradient[[1, 4]] == 0).all()


def test_3_what_the_teacher_likes_is_reinforced():
    """The released Megatron teacher had the sign wrong."""
    student = torch.tensor([[-2.0, -2.0, -2.0]])
    teacher = torch.tensor([[-0.5, -2.0, -4.0]])
    advantages, _ = log_ratio_advantages(teacher, student, torch.ones(1, 3))
    assert advantages[0, 0] > advantages[0, 1] > advantages[0, 2] and advantages[0, 0] > 0 > advantages[0, 2]


@pytest.mark.parametrize("offload", [True, False])
def test_7_the_offload_flag_means_what_it_says(monkeypatch, offload):
    """Weights move to the device and back once a call, or not at all; the released teacher did both per micro-batch."""
    from verl.workers.engine.fsdp import transformer_impl

    moves = []
    monkeypatch.setattr(transformer_impl, "get_device_name", lambda: "accelerator")
    monkeypatch.setattr("verl.workers.engine.base.get_device_name", lambda: "accelerator")
    monkeypatch.setattr(transformer_impl, "load_fsdp_model_to_gpu", lambda module: moves.append("up"))
    monkeypatch.setattr(transformer_impl, "offload_fsdp_model_to_cpu", lambda module: moves.append("down"))
    engine = object.__new__(TeacherEngine)
    engine.engine_config = TeacherEngineConfig(strategy="fsdp2", param_offload=offload)
    engine._is_offload_param, engine._is_offload_optimizer = offload, False
    engine.optimizer, engine.ulysses_parallel_group = None, None
    engine.module = torch.nn.Linear(1, 1)
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
    expected, moments = log_ratio_advantages(
        store["teacher_log_probs"].to_padded_tensor(0.0), store["old_log_probs"].to_padded_tensor(0.0), mask
    )
    assert torch.equal(written["advantages"], expected)
    assert metrics["gndpo/mu"] == pytest.approx(moments.mean) and metrics["gndpo/tokens"] == mask.sum()
    assert estimator_saw["index"] == ["a", "a", "b", "b"]
    assert estimator_saw["token_level_rewards"].shape == mask.shape


def test_rollout_correction_still_applies(gndpo_step):
    """Importance weights of truncated rollout correction are computed and written as for verl's own estimators."""
    correction = OmegaConf.create({"rollout_is": "token", "rollout_is_threshold": 2.0, "bypass_mode": False})
    _, written, metrics, _ = gndpo_step(correction)
    assert written.keys() == {"advantages", "returns", "response_mask", "rollout_is_weights"}
    assert any(name.startswith("rollout_corr/") for name in metrics)
