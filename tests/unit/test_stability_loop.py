# SPDX-License-Identifier: Apache-2.0
"""The in-process training loop of the stability study, on tiny models that have learned nothing."""

import dataclasses

import numpy as np
import pytest
import torch
from verl.trainer.ppo.core_algos import compute_policy_loss_gspo
from verl.workers.config import FSDPActorConfig

from benchmarks.stability import loop, plan
from benchmarks.stability.world import STARTS, World, careless_responses, degrade
from examples.quickstart import diagrams, pretrain, tiny_vlm
from examples.quickstart.pretrain import Problems

SETTINGS = loop.Settings(
    steps=2, learning_rate=1e-2, prompts=3, n=2, evaluate_every=1, optimizer="sgd", grad_clip=None, max_new_tokens=6
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world():
    processor = tiny_vlm.build_processor(tiny_vlm.build_tokenizer())
    models = [
        tiny_vlm.build_model(processor.tokenizer, seed=seed, hidden_size=32 * (3 - seed), layers=2, vision_layers=1)
        .eval()
        .requires_grad_(False)
        for seed in (1, 2)
    ]
    # A random model hardly ever takes the end token, so that every tenth token is one: responses end early and late.
    for model in models:
        model.generation_config.eos_token_id = list(range(0, len(processor.tokenizer), 10))
    train = Problems(diagrams.make_problems("train", 8), processor)
    test = Problems(diagrams.make_problems("test", 6), processor)
    return World(models[0], {"tiny": models[1]}, {}, processor, train, degrade(train), test, test)


@pytest.fixture(scope="module")
def rollout(world):
    generator = torch.Generator().manual_seed(3)
    return loop.sample(
        world.teacher, world.train, [0, 5, 2, 7, 1, 3], 8, temperature=1.3, max_new_tokens=12, generator=generator
    )


def test_the_prompts_have_different_lengths(world):
    assert len({len(world.train.prompts[index]) for index in (0, 5, 2, 7, 1, 3)}) > 1


def test_responses_end_with_their_end_token(world, rollout):
    ends = torch.isin(rollout.responses, torch.tensor(world.teacher.generation_config.eos_token_id))
    assert 0 < rollout.finished.sum() < len(rollout.finished)
    for row, length, finished in zip(ends, rollout.lengths.tolist(), rollout.finished.tolist(), strict=True):
        assert not row[: length - 1].any()
        assert row[length - 1] == finished
        assert finished or length == 12


def test_sampled_log_probs_are_those_of_the_score(world, rollout):
    log_probs, full = loop.score(world.teacher, world.train, rollout, temperature=1.3)
    torch.testing.assert_close(log_probs, rollout.log_probs, atol=1e-4, rtol=0)
    outside = rollout.response_mask == 0
    assert outside.any() and not log_probs[outside].any() and not full[outside].any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_score_is_that_of_a_plain_forward_pass(world, rollout, temperature):
    responses = [ids[:length].tolist() for ids, length in zip(rollout.responses, rollout.lengths.tolist(), strict=True)]
    logits, targets = pretrain.response_logits(world.teacher, world.train, rollout.indices, responses)
    expected = torch.log_softmax(logits / temperature, -1)
    log_probs, full = loop.score(world.teacher, world.train, rollout, temperature=temperature)
    is_response = rollout.response_mask.bool()
    torch.testing.assert_close(full[is_response], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(log_probs[is_response], expected.gather(1, targets[:, None])[:, 0], atol=1e-4, rtol=0)


def test_the_gradient_is_that_of_a_plain_forward_pass(world, rollout):
    responses = [ids[:length].tolist() for ids, length in zip(rollout.responses, rollout.lengths.tolist(), strict=True)]
    ours, plain = world.student("tiny"), world.student("tiny")
    prompts = loop.read_prompts(ours, world.train, rollout.indices[:: rollout.n])
    loop.score(ours, world.train, rollout, prompts=prompts)[0].mean().backward()
    logits, targets = pretrain.response_logits(plain, world.train, rollout.indices, responses)
    log_probs = torch.log_softmax(logits, -1).gather(1, targets[:, None])
    (log_probs.sum() / rollout.responses.numel()).backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_greedy_responses_are_the_likeliest_tokens_of_the_score(world):
    greedy = loop.sample(world.teacher, world.test, range(6), 1, temperature=0.0)
    log_probs, full = loop.score(world.teacher, world.test, greedy)
    # Up to rounding: two tokens may be equally likely.
    torch.testing.assert_close(log_probs, full.max(-1).values, atol=1e-4, rtol=0)


def test_sampling_follows_the_distribution(world):
    """The first tokens of one prompt, in up to 16 groups of tokens that are about equally likely.

    The frequency of each group is within six standard deviations of its probability, which a right sampler misses once
    in 3e7 seeds. Single tokens are too rare for the normal distribution.
    """
    n = 20000
    rollout = loop.sample(
        world.teacher,
        world.train,
        [0],
        n,
        temperature=1.0,
        max_new_tokens=1,
        generator=torch.Generator().manual_seed(0),
    )
    p = loop.score(world.teacher, world.train, rollout)[1][0, 0].exp()
    frequency = torch.bincount(rollout.responses[:, 0], minlength=len(p)) / n
    order = p.argsort(descending=True)
    _, group = (16 * p[order].cumsum(0)).long().clamp(max=15).unique(return_inverse=True)
    p, frequency = (torch.zeros(group.max() + 1).index_add(0, group, x[order]) for x in (p, frequency))
    assert len(p) > 8 and p.min() > 0.02
    assert ((frequency - p).abs() < 6 * (p * (1 - p) / n).sqrt()).all()


def test_accuracy_is_the_share_of_right_answers(world, monkeypatch):
    monkeypatch.setattr(
        loop.reward, "compute_score", lambda source, text, answer: float(answer == world.test.answers[0])
    )
    expected = sum(answer == world.test.answers[0] for answer in world.test.answers) / len(world.test)
    assert loop.greedy_accuracy(world.teacher, world.test, batch_size=4) == pytest.approx(expected)


def scored_batch(world, rollout):
    with torch.no_grad():
        teacher = loop.score(world.teacher, world.train, rollout)
    log_probs, full = loop.score(world.student("tiny"), world.train, rollout)
    return loop.make_batch(world.train, rollout, teacher, (log_probs, full)), full


def test_kl_matches_numpy(world, rollout):
    batch, _ = scored_batch(world, rollout)
    p, q = batch.old_full.double().numpy(), batch.teacher_full.double().numpy()
    expected = (np.exp(p) * (p - q)).sum(-1) * rollout.response_mask.numpy()
    np.testing.assert_allclose(batch.kl.numpy(), expected, atol=1e-5)
    assert (batch.kl[rollout.response_mask.bool()] > 0).all()


def test_the_reward_lies_on_the_last_token(world, rollout, monkeypatch):
    monkeypatch.setattr(loop.reward, "compute_score", lambda *_: 1.0)
    batch, _ = scored_batch(world, rollout)
    assert torch.equal(batch.token_level_rewards.sum(-1), torch.ones(len(rollout.indices)))
    assert torch.equal(batch.token_level_rewards.argmax(-1), batch.lengths - 1)
    assert batch.index == [str(index) for index in (0, 5, 2, 7, 1, 3) for _ in range(8)]


def test_full_kl_has_the_gradient_of_the_kl(world, rollout):
    batch, full = scored_batch(world, rollout)
    (ours,) = torch.autograd.grad(loop.full_kl_loss(full, batch), full)
    leaf = full.detach().clone().requires_grad_(True)
    loss = 0.0
    for row, length in enumerate(batch.lengths.tolist()):
        student = torch.distributions.Categorical(logits=leaf[row, :length])
        teacher = torch.distributions.Categorical(logits=batch.teacher_full[row, :length])
        loss = loss + torch.distributions.kl_divergence(student, teacher).mean() / len(batch.lengths)
    (expected,) = torch.autograd.grad(loss, leaf)
    # Categorical normalises its logits once more, so the two differ by a multiple of p, which a change of logits that
    # keeps the log-probs normalised doesn't see: compare after the backward pass of log_softmax.
    mask = rollout.response_mask[..., None]

    def through_log_softmax(gradient):
        return (gradient - full.detach().exp() * gradient.sum(-1, keepdim=True)) * mask

    torch.testing.assert_close(through_log_softmax(ours), through_log_softmax(expected), atol=1e-6, rtol=1e-4)


def test_policy_gradients_of_all_tokens_average_to_the_gradient_of_the_kl(world):
    """The exact expectation of what the study samples: each token as a response of its own, by its probability."""
    student = world.student("tiny")
    size = len(student.lm_head.weight)
    every = loop.Rollout(
        indices=[5] * size,
        n=size,
        responses=torch.arange(size)[:, None],
        response_mask=torch.ones(size, 1, dtype=torch.long),
        finished=torch.zeros(size, dtype=torch.bool),
        log_probs=torch.zeros(size, 1),
    )
    with torch.no_grad():
        teacher = loop.score(world.teacher, world.train, every)
    log_probs, full = loop.score(student, world.train, every)
    batch = loop.make_batch(world.train, every, teacher, (log_probs, full))
    # The loss is the mean over the responses, which are equally many for each token.
    advantages = plan.advantage(plan.ARMS["opd_raw"], 0)(batch) * batch.old_log_probs.exp() * size
    loss, _ = compute_policy_loss_gspo(
        batch.old_log_probs,
        log_probs,
        advantages,
        batch.response_mask,
        loop.LOSS_AGG_MODE,
        FSDPActorConfig(strategy="fsdp2", use_dynamic_bsz=True, rollout_n=size),
    )
    parameters = dict(student.named_parameters())
    sampled = torch.autograd.grad(loss, parameters.values(), retain_graph=True)
    exact = torch.autograd.grad(loop.full_kl_loss(full, batch), parameters.values())
    for name, ours, expected in zip(parameters, sampled, exact, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def opd(batch):
    return (batch.teacher_log_probs - batch.old_log_probs).clamp(-5, 5) * batch.response_mask


@pytest.mark.parametrize("advantage", [opd, "full_kl"], ids=["opd", "full_kl"])
def test_the_same_seed_gives_the_same_records(world, advantage):
    first = loop.train(world, "tiny", advantage, SETTINGS)
    assert first == loop.train(world, "tiny", advantage, SETTINGS)
    assert first != loop.train(world, "tiny", advantage, dataclasses.replace(SETTINGS, seed=1))
    assert [record["step"] for record in first] == [0, 1, 2]
    assert all("accuracy" in record for record in first)


def last_weights(world, monkeypatch, advantage, **changes):
    """Train and return the weights after it, and the records."""
    models = []
    monkeypatch.setattr(
        World, "student", lambda self, start, make=World.student: models.append(make(self, start)) or models[-1]
    )
    records = loop.train(world, "tiny", advantage, dataclasses.replace(SETTINGS, **changes))
    monkeypatch.undo()
    return dict(models[0].named_parameters()), records


@pytest.mark.parametrize("optimizer, kept", [("sgd", 1.0), ("adamw", (1 - 1e-4) ** 2)])
def test_no_advantage_no_update_besides_the_weight_decay(world, monkeypatch, optimizer, kept):
    weights, records = last_weights(world, monkeypatch, lambda batch: torch.zeros_like(batch.kl), optimizer=optimizer)
    for name, before in world.starts["tiny"].named_parameters():
        torch.testing.assert_close(weights[name].detach(), before * kept, atol=1e-7, rtol=1e-5)
    assert records[-1]["grad_norm"] == 0 and records[-1]["skipped"] == 0


def test_an_update_with_a_gradient_that_is_not_finite_is_left_out(world, monkeypatch):
    weights, records = last_weights(world, monkeypatch, lambda batch: torch.full_like(batch.kl, float("nan")))
    for name, before in world.starts["tiny"].named_parameters():
        assert torch.equal(weights[name], before), name
    assert [record.get("skipped") for record in records] == [None, 1, 2]


def test_the_first_step_is_a_step_down_the_policy_gradient(world, monkeypatch):
    weights, records = last_weights(world, monkeypatch, opd, steps=1)
    student = world.student("tiny")
    indices = loop.prompt_order(8, 0, 3)
    rollout = loop.sample(
        student, world.train, indices, 2, temperature=1.0, max_new_tokens=6, generator=loop._generator(0, 1, 0)
    )
    log_probs, _ = loop.score(student, world.train, rollout)
    teacher, _ = loop.score(world.teacher, world.train, rollout)
    advantages = (teacher - log_probs).detach().clamp(-5, 5)
    (-(advantages * log_probs).sum(-1) / rollout.lengths).mean().backward()
    norm = sum(parameter.grad.square().sum() for parameter in student.parameters()).sqrt().item()
    assert records[1]["grad_norm"] == pytest.approx(norm, rel=1e-3)
    for name, parameter in student.named_parameters():
        expected = parameter - SETTINGS.learning_rate * parameter.grad
        torch.testing.assert_close(weights[name], expected, atol=1e-5, rtol=1e-4)


def test_corruption_reaches_the_signal_and_not_the_monitors(world):
    seen = []

    def corrupt(batch, generator):
        noise = torch.randn(batch.kl.shape, generator=generator)
        return dataclasses.replace(batch, teacher_log_probs=batch.teacher_log_probs + noise)

    def advantage(batch):
        seen.append(batch)
        return opd(batch)

    on_step = lambda batch, advantages: {"seen": batch is seen[-1], "rms": advantages.square().mean().item()}  # noqa: E731
    clean = loop.train(world, "tiny", opd, dataclasses.replace(SETTINGS, steps=1))
    dirty = loop.train(
        world, "tiny", advantage, dataclasses.replace(SETTINGS, steps=1), corrupt=corrupt, on_step=on_step
    )
    assert dirty[1]["seen"] and dirty[1]["rms"] > 0
    assert dirty[1]["k1"] == clean[1]["k1"] and dirty[1]["kl"] == clean[1]["kl"]
    assert dirty[1]["advantage_rms"] != clean[1]["advantage_rms"]


def test_bad_arguments_are_named(world):
    with pytest.raises(ValueError, match="adamw or sgd"):
        loop.Settings(steps=1, learning_rate=1, optimizer="adam")
    with pytest.raises(ValueError, match="full_kl"):
        loop.train(world, "tiny", "gndpo", SETTINGS)
    with pytest.raises(ValueError, match=r"\(6,\).*\(6, 6\)"):
        loop.train(world, "tiny", lambda batch: torch.zeros(6), SETTINGS)
    with pytest.raises(ValueError, match="use train"):
        world.problems("dev")


def test_degraded_images_change_and_nothing_else_does(world):
    assert not torch.equal(world.degraded._pixels, world.train._pixels)
    assert world.degraded.prompts is world.train.prompts
    assert torch.equal(degrade(world.train, 0.0)._pixels, world.train._pixels)
    assert torch.equal(degrade(world.train)._pixels, world.degraded._pixels)


def test_start_points_are_careless_about_their_dice_only():
    problems = diagrams.make_problems("train", 400)
    for name, start in STARTS.items():
        for problem, response in zip(problems, careless_responses(problems, name), strict=True):
            careless = any(
                start.careless(*die, place)
                for place, die in enumerate(zip(problem.asked, problem.addends, strict=True))
            )
            assert careless or response == problem.response
