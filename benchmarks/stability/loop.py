# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation in one process: sample, score with the teacher, turn into advantages, one update.

Each of verl's workers is a function here, on the same modules of Hugging Face and with verl's own GSPO
loss, so that hundreds of short trainings fit on two cores. A prompt with its image is run once (`read_prompts`); its
keys and values serve all responses to it, for sampling and for scoring.

Shapes: N prompts of at most P tokens, n responses to each, R = N * n rows (those of a prompt are neighbours), T
response tokens, V vocabulary. Log-probs are in nats. Whatever is beyond the end of a response is 0.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache
from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_gspo
from verl.workers.config import FSDPActorConfig

from benchmarks.stability.world import World
from examples.quickstart import diagrams, reward
from examples.quickstart.pretrain import Problems

MAX_NEW_TOKENS = 24
LOSS_AGG_MODE = "seq-mean-token-mean"

_SAMPLING, _CORRUPTION = 0, 1
_HIDDEN = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Prompts:
    """Prompts that a model has read.

    Attributes:
        cache: keys and values of every layer, two tensors of shape (N, heads, P, head size).
        hidden: last hidden state of each prompt, shape (N, hidden size): what its first response token follows from.
        lengths: tokens of each prompt, shape (N,).
        next_position: rotary position of the first response token, shape (N,).
    """

    cache: list[tuple[torch.Tensor, torch.Tensor]]
    hidden: torch.Tensor
    lengths: torch.Tensor
    next_position: torch.Tensor

    def detach(self) -> Prompts:
        """Return the same without gradients."""
        cache = [(keys.detach(), values.detach()) for keys, values in self.cache]
        return dataclasses.replace(self, cache=cache, hidden=self.hidden.detach())

    def expand(self, n: int) -> tuple[DynamicCache, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Repeat every prompt n times: a cache to go on from, hidden states, next positions and a mask.

        The mask has the shape (R, P) and is to be added to attention scores; it hides the padding of short prompts.
        """
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.cache):
            cache.update(keys.repeat_interleave(n, 0), values.repeat_interleave(n, 0), layer)
        is_padding = torch.arange(self.cache[0][0].shape[2]) >= self.lengths[:, None]
        mask = torch.zeros(is_padding.shape).masked_fill_(is_padding, _HIDDEN)
        return cache, *(x.repeat_interleave(n, 0) for x in (self.hidden, self.next_position, mask))


@dataclass(frozen=True)
class Rollout:
    """Responses that a model has given.

    Attributes:
        indices: R indices into the problems.
        n: responses to each prompt, in neighbouring rows.
        responses: token ids, shape (R, T), int64, with the padding token behind the end.
        response_mask: shape (R, T), int64; 1 on every token of the response, its end token included.
        finished: shape (R,), bool; whether the response has an end token.
        log_probs: of the tokens at the sampler's temperature, shape (R, T), float32.
    """

    indices: list[int]
    n: int
    responses: torch.Tensor
    response_mask: torch.Tensor
    finished: torch.Tensor
    log_probs: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """Return the number of tokens of each response, (R,), int64."""
        return self.response_mask.sum(-1)


@dataclass
class Batch:
    """The inputs of a signal for one step, all without gradients.

    Attributes:
        teacher_log_probs, old_log_probs: of the sampled tokens, shape (R, T), float32.
        response_mask: shape (R, T), int64.
        teacher_full, old_full: of the whole vocabulary, shape (R, T, V), float32.
        kl: KL(student || teacher) at every position in closed form, shape (R, T), float32.
        token_level_rewards: the task reward, 0 or 1, on the last token of each response, shape (R, T), float32.
        index: id of each row's prompt, R strings; the same for the responses to one prompt, as verl's ``uid``.
        finished: shape (R,), bool.
        lengths: tokens of each response, shape (R,), int64.
    """

    teacher_log_probs: torch.Tensor
    old_log_probs: torch.Tensor
    response_mask: torch.Tensor
    teacher_full: torch.Tensor
    old_full: torch.Tensor
    kl: torch.Tensor
    token_level_rewards: torch.Tensor
    index: list[str]
    finished: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class Settings:
    """Settings of one training.

    Attributes:
        steps: updates.
        learning_rate: constant.
        seed: of the order of prompts and of the sampling; the same in all arms makes them comparable in pairs.
        prompts, n: number of prompts per step, and of responses to each.
        optimizer: "adamw" (betas 0.9 and 0.999, weight decay 0.01) or "sgd" (without momentum).
        grad_clip: bound of the gradient's norm; None for no clipping.
        temperature: of sampling and of all log-probs.
        teacher_temperature: divides the teacher's logits once more; below 1 the teacher is sharper than it is.
        evaluate_every: steps between two measurements of the accuracy; there is one before and after the training too.
        problems: what is trained on, "train" or "degraded".
        evaluate_on: "validation" or "test".
        max_new_tokens: bound of a response's length.
    """

    steps: int
    learning_rate: float
    seed: int = 0
    prompts: int = 16
    n: int = 4
    optimizer: str = "adamw"
    grad_clip: float | None = 1.0
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    evaluate_every: int = 10
    problems: str = "train"
    evaluate_on: str = "validation"
    max_new_tokens: int = MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer={self.optimizer!r}: use adamw or sgd")
        for name in ("temperature", "teacher_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: training needs a positive one")


def read_prompts(model, problems: Problems, indices: Sequence[int]) -> Prompts:
    """Run the model over N prompts with their images, with gradients where they are enabled.

    Args:
        model: a Qwen2.5-VL.
        problems: where prompts and images come from.
        indices: N indices into `problems`.
    """
    prompts = [problems.prompts[index] for index in indices]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = max(prompts, key=len)
    pad = problems.tokenizer.pad_token_id
    input_ids = torch.tensor([prompt + [pad] * (len(longest) - len(prompt)) for prompt in prompts])
    images = problems.images(indices)
    # Every prompt starts alike and every image has the same size, so the positions of the longest are those of all.
    position_ids, _ = model.model.get_rope_index(
        torch.tensor([longest]),
        (torch.tensor([longest]) == problems.image_token).int(),
        images["image_grid_thw"][:1],
    )
    seen = model.model.visual(images["pixel_values"], grid_thw=images["image_grid_thw"]).pooler_output
    first = longest.index(problems.image_token)
    embeddings = model.model.language_model.embed_tokens(input_ids)
    seen = seen.view(len(prompts), -1, embeddings.shape[-1])
    embeddings = torch.cat([embeddings[:, :first], seen, embeddings[:, first + seen.shape[1] :]], dim=1)
    cache = DynamicCache()
    # The padding is on the right, where no prompt token sees it: causality is mask enough.
    hidden = model.model.language_model(
        inputs_embeds=embeddings,
        position_ids=position_ids.expand(-1, len(prompts), -1),
        attention_mask={"full_attention": None},
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return Prompts(
        cache=[(layer.keys, layer.values) for layer in cache.layers],
        hidden=hidden[torch.arange(len(prompts)), lengths - 1],
        lengths=lengths,
        next_position=position_ids[0, 0][lengths - 1] + 1,
    )


def _go_on(model, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache) -> torch.Tensor:
    """Hidden states of response tokens, shape (R, q, hidden); tokens and positions (R, q), mask (R, 1, q, keys)."""
    return model.model.language_model(
        inputs_embeds=model.model.language_model.embed_tokens(tokens),
        position_ids=positions.expand(3, -1, -1),
        attention_mask={"full_attention": mask},
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state


@torch.no_grad()
def sample(
    model,
    problems: Problems,
    indices: Sequence[int],
    n: int,
    *,
    temperature: float,
    max_new_tokens: int = MAX_NEW_TOKENS,
    generator: torch.Generator | None = None,
    prompts: Prompts | None = None,
) -> Rollout:
    """Let a model answer.

    Which random numbers a token gets depends on the generator, its place and its row, and on nothing that the model
    does: two models that are almost the same give almost the same responses.

    Args:
        model: a Qwen2.5-VL.
        problems: where prompts and images come from.
        indices: N indices into `problems`.
        n: responses to each.
        temperature: divides the logits; 0 takes the likeliest token, and the log-probs are those at 1.
        max_new_tokens: longest response.
        generator: of the random numbers; not needed at temperature 0.
        prompts: what `read_prompts` returned for the same weights and indices, to save time.
    """
    if temperature > 0 and generator is None:
        raise ValueError("sampling needs a generator")
    indices = list(indices)
    prompts = read_prompts(model, problems, indices) if prompts is None else prompts.detach()
    cache, hidden, position, prompt_mask = prompts.expand(n)
    rows, longest = prompt_mask.shape
    mask = torch.cat([prompt_mask, torch.zeros(rows, max_new_tokens)], dim=1)[:, None, None]
    ends = torch.tensor(model.generation_config.eos_token_id)
    running = torch.ones(rows, dtype=torch.bool)
    tokens, masks, log_probs = [], [], []
    for step in range(max_new_tokens):
        log_softmax = torch.log_softmax(model.lm_head(hidden) / (temperature or 1.0), dim=-1)
        if temperature > 0:
            # The Gumbel-max trick. rand() may return 0 but never 1, so the noise is -inf at worst and never +inf.
            noise = torch.rand(log_softmax.shape, generator=generator).log_().neg_().log_().neg_()
            token = (log_softmax + noise).argmax(-1)
        else:
            token = log_softmax.argmax(-1)
        token = torch.where(running, token, problems.tokenizer.pad_token_id)
        tokens.append(token)
        masks.append(running)
        log_probs.append(log_softmax.gather(-1, token[:, None])[:, 0] * running)
        running = running & ~torch.isin(token, ends)
        if step + 1 == max_new_tokens or not running.any():
            break
        hidden = _go_on(model, token[:, None], (position + step)[:, None], mask[..., : longest + step + 1], cache)[:, 0]
    return Rollout(
        indices=[index for index in indices for _ in range(n)],
        n=n,
        responses=torch.stack(tokens, dim=1),
        response_mask=torch.stack(masks, dim=1).long(),
        finished=~running,
        log_probs=torch.stack(log_probs, dim=1),
    )


def score(
    model, problems: Problems, rollout: Rollout, *, temperature: float = 1.0, prompts: Prompts | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how likely a model finds responses, with gradients where they are enabled.

    Args:
        model: a Qwen2.5-VL.
        problems: what the rollout was made from.
        rollout: the responses.
        temperature: divides the logits.
        prompts: what `read_prompts` returned for the same weights and prompts, to save time.

    Returns the log-probs of the tokens, shape (R, T), and those of the whole vocabulary, shape (R, T, V); float32, 0
    outside the response mask.
    """
    if prompts is None:
        prompts = read_prompts(model, problems, rollout.indices[:: rollout.n])
    cache, first, position, prompt_mask = prompts.expand(rollout.n)
    rows, length = rollout.responses.shape
    hidden = first[:, None]
    if length > 1:
        causal = torch.full((length - 1, length - 1), _HIDDEN).triu(1)
        mask = torch.cat(
            [prompt_mask[:, None].expand(-1, length - 1, -1), causal.expand(rows, -1, -1)], dim=-1
        ).unsqueeze(1)
        positions = position[:, None] + torch.arange(length - 1)
        hidden = torch.cat([hidden, _go_on(model, rollout.responses[:, :-1], positions, mask, cache)], dim=1)
    is_response = rollout.response_mask.bool()
    flat = torch.log_softmax(model.lm_head(hidden[is_response]) / temperature, dim=-1)
    full = flat.new_zeros(rows, length, flat.shape[-1])
    full[is_response] = flat
    return full.gather(-1, rollout.responses[..., None])[..., 0], full


def task_rewards(problems: Problems, rollout: Rollout) -> torch.Tensor:
    """Return the 0/1 reward of each response, shape (R,), float32."""
    texts = problems.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    return torch.tensor(
        [
            reward.compute_score(diagrams.DATA_SOURCE, text, problems.answers[index])
            for index, text in zip(rollout.indices, texts, strict=True)
        ]
    )


def greedy_accuracy(model, problems: Problems, *, batch_size: int = 128, max_new_tokens: int = MAX_NEW_TOKENS) -> float:
    """Return what `pretrain.greedy_accuracy` does, several times faster."""
    score = 0.0
    for start in range(0, len(problems), batch_size):
        indices = range(start, min(start + batch_size, len(problems)))
        rollout = sample(model, problems, indices, 1, temperature=0.0, max_new_tokens=max_new_tokens)
        score += task_rewards(problems, rollout).sum().item()
    return score / len(problems)


def closed_form_kl(student_full: torch.Tensor, teacher_full: torch.Tensor) -> torch.Tensor:
    """Return KL(student || teacher) in nats at every position, shape (R, T), from log-probs of shape (R, T, V).

    0 where both are 0 throughout, as beyond the end of a response.
    """
    return (student_full.exp() * (student_full - teacher_full)).sum(-1)


def make_batch(
    problems: Problems,
    rollout: Rollout,
    teacher: tuple[torch.Tensor, torch.Tensor],
    student: tuple[torch.Tensor, torch.Tensor],
) -> Batch:
    """Collect the inputs of a signal; `teacher` and `student` are results of `score`."""
    lengths = rollout.lengths
    rewards = torch.zeros(rollout.responses.shape)
    rewards[torch.arange(len(lengths)), lengths - 1] = task_rewards(problems, rollout)
    old_full, teacher_full = student[1].detach(), teacher[1].detach()
    return Batch(
        teacher_log_probs=teacher[0].detach(),
        old_log_probs=student[0].detach(),
        response_mask=rollout.response_mask,
        teacher_full=teacher_full,
        old_full=old_full,
        kl=closed_form_kl(old_full, teacher_full),
        token_level_rewards=rewards,
        index=[str(index) for index in rollout.indices],
        finished=rollout.finished,
        lengths=lengths,
    )


def full_kl_loss(full: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the loss of "full_kl": the closed form with gradient, mean over each response's tokens and over rows."""
    return agg_loss(closed_form_kl(full, batch.teacher_full), batch.response_mask, LOSS_AGG_MODE)


def _generator(seed: int, step: int, purpose: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, step, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def prompt_order(count: int, seed: int, needed: int) -> list[int]:
    """Return which problems a seed's training sees: permutations of all `count`, joined until `needed` are there."""
    rng, order = random.Random(f"prompts/{seed}"), []
    while len(order) < needed:
        order += rng.sample(range(count), count)
    return order[:needed]


@functools.lru_cache(maxsize=32)
def _start_accuracy(world: World, start: str, evaluate_on: str) -> float:
    # All arms and seeds begin with the same weights.
    return greedy_accuracy(world.starts[start], world.problems(evaluate_on))


def _optimizer(model, settings: Settings) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=settings.learning_rate, foreach=True)
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.999), weight_decay=0.01, fused=True)


def train(
    world: World,
    start: str,
    advantage: Callable[[Batch], torch.Tensor] | str,
    settings: Settings,
    *,
    corrupt: Callable[[Batch, torch.Generator], Batch] | None = None,
    on_step: Callable[[Batch, torch.Tensor | None], dict] | None = None,
) -> list[dict]:
    """Distil the teacher into a start point, strictly on-policy: one update per batch of responses.

    Args:
        world: models and problems.
        start: name of the student to start from.
        advantage: from a batch to advantages, shape (R, T), for verl's GSPO loss (clip ratio 0.2); or "full_kl", whose
            loss is KL(student || teacher) over the whole vocabulary with its gradient. Both are averaged over the
            tokens of each response and then over responses.
        settings: everything else. Prompts and random numbers depend on its seed and the step only.
        corrupt: from a batch and a generator of its own to the batch that the signal sees instead.
        on_step: from that batch and the advantages (None for "full_kl") to entries of the step's record.

    Returns `settings.steps` + 1 records. Step 0 is before the training: ``step`` and ``accuracy``. The others have, of
    step s: ``reward`` (mean), ``k1`` (mean over tokens of log student - log teacher, nats), ``kl`` (mean over tokens of
    the closed form, nats), both before `corrupt`; ``grad_norm`` before clipping; ``skipped`` updates so far, because
    their gradient was not finite; ``advantage_rms`` and ``advantage_abs_max`` over tokens (None for "full_kl");
    ``length`` (mean tokens of a response), ``truncated`` (share without an end), and every `evaluate_every` steps and
    at the last one ``accuracy`` after the update.

    Raises:
        ValueError: if the advantages do not have the shape of the response mask, or `advantage` is an unknown name.
    """
    if isinstance(advantage, str) and advantage != "full_kl":
        raise ValueError(f"advantage={advantage!r}: a function or 'full_kl'")
    problems, evaluation = world.problems(settings.problems), world.problems(settings.evaluate_on)
    model = world.student(start)
    parameters = list(model.parameters())
    optimizer = _optimizer(model, settings)
    config = FSDPActorConfig(strategy="fsdp2", use_dynamic_bsz=True, rollout_n=settings.n)
    order = prompt_order(len(problems), settings.seed, settings.steps * settings.prompts)
    records = [{"step": 0, "accuracy": _start_accuracy(world, start, settings.evaluate_on)}]
    skipped = 0
    for step in range(1, settings.steps + 1):
        indices = order[(step - 1) * settings.prompts : step * settings.prompts]
        # The weights do not change between sampling and scoring, so the prompts are read once for both.
        prompts = read_prompts(model, problems, indices)
        rollout = sample(
            model,
            problems,
            indices,
            settings.n,
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            generator=_generator(settings.seed, step, _SAMPLING),
            prompts=prompts,
        )
        with torch.no_grad():
            sharpness = settings.temperature * settings.teacher_temperature
            teacher = score(world.teacher, problems, rollout, temperature=sharpness)
        log_probs, full = score(model, problems, rollout, temperature=settings.temperature, prompts=prompts)
        batch = make_batch(problems, rollout, teacher, (log_probs, full))
        tokens = batch.response_mask.sum()
        record = {
            "step": step,
            "reward": batch.token_level_rewards.sum().item() / len(rollout.indices),
            "k1": ((batch.old_log_probs - batch.teacher_log_probs).sum() / tokens).item(),
            "kl": (batch.kl.sum() / tokens).item(),
            "length": batch.lengths.float().mean().item(),
            "truncated": 1 - batch.finished.float().mean().item(),
        }
        if corrupt is not None:
            batch = corrupt(batch, _generator(settings.seed, step, _CORRUPTION))
        if isinstance(advantage, str):
            advantages = record["advantage_rms"] = record["advantage_abs_max"] = None
            loss = full_kl_loss(full, batch)
        else:
            advantages = advantage(batch).detach()
            if advantages.shape != batch.response_mask.shape:
                raise ValueError(
                    f"step {step}: advantages have the shape {tuple(advantages.shape)} and the response mask "
                    f"{tuple(batch.response_mask.shape)}"
                )
            valid = advantages[batch.response_mask.bool()]
            record["advantage_rms"] = valid.square().mean().sqrt().item()
            record["advantage_abs_max"] = valid.abs().max().item()
            loss, _ = compute_policy_loss_gspo(
                batch.old_log_probs, log_probs, advantages, batch.response_mask, LOSS_AGG_MODE, config
            )
        loss.backward()
        # A gradient is clipped as verl's FSDP engine does it, and an update without a finite one is left out.
        grad_norm = torch.nn.utils.clip_grad_norm_(
            parameters, float("inf") if settings.grad_clip is None else settings.grad_clip
        )
        if torch.isfinite(grad_norm):
            optimizer.step()
        else:
            skipped += 1
        optimizer.zero_grad()
        record.update(grad_norm=grad_norm.item(), skipped=skipped)
        if on_step is not None:
            record.update(on_step(batch, advantages))
        if step % settings.evaluate_every == 0 or step == settings.steps:
            record["accuracy"] = greedy_accuracy(model, evaluation)
        records.append(record)
    return records
