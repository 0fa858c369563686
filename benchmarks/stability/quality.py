# SPDX-License-Identifier: Apache-2.0
"""Measure each signal's gradient at fixed weights: its variance over resampled batches, and its direction.

The reference is the gradient of KL(student || teacher) over the whole vocabulary at the positions that the student has
reached, averaged over all batches: what every estimator from sampled tokens stands in for.
"""

import json
import os
from pathlib import Path

import torch
from tqdm import tqdm
from verl.trainer.ppo.core_algos import compute_policy_loss_gspo
from verl.workers.config import FSDPActorConfig

from benchmarks.stability import loop, plan, world

BATCHES = 64
SEED = 2000


def measure(out: Path, regimes: tuple[str, ...], batches: int = BATCHES) -> Path:
    """Write `quality.jsonl`: a line a regime and arm, for the regime's start, problems and corruption.

    Returns its path. Each line has, over `batches` batches of the study's size: ``cosine_mean``, of the mean gradient
    with the reference; ``cosine``, the mean of those of single batches; ``noise``, trace of the covariance over the
    squared norm of the mean: how many batches it takes until noise and signal are equally large.
    """
    path = out / "quality.jsonl"
    lines = [line for line in _read(path) if line["plan"] == plan.fingerprint(line["regime"], line["arm"])]
    done = {(line["regime"], line["arm"]) for line in lines}
    todo = [name for name in regimes if any((name, arm) not in done for arm in _arms())]
    if todo:
        models = world.prepare(out, tuple(dict.fromkeys(plan.REGIMES[name].start for name in todo)))
        for name in todo:
            lines = [line for line in lines if line["regime"] != name] + _measure(models, name, batches)
            partial = path.with_name(path.name + ".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
            os.replace(partial, path)
    return path


def _arms() -> list[str]:
    """Return all arms that are not another arm times a constant."""
    return [arm for arm in plan.ARMS if plan.ARMS[arm].multiplier == 1.0]


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _measure(models: world.World, name: str, batches: int) -> list[dict]:
    regime = plan.REGIMES[name]
    settings = plan.settings(regime, 0.0, SEED, evaluate_on="validation")
    problems, model = models.problems(regime.problems), models.student(regime.start)
    parameters = list(model.parameters())
    config = FSDPActorConfig(strategy="fsdp2", use_dynamic_bsz=True, rollout_n=settings.n)
    order = loop.prompt_order(len(problems), SEED, batches * settings.prompts)
    signals = {arm: plan.advantage(plan.ARMS[arm], SEED) for arm in _arms()}
    corrupt = plan.corruption(regime)
    gradients: dict[str, list[torch.Tensor]] = {arm: [] for arm in signals}
    for i in tqdm(range(batches), desc=f"gradients, {name}", unit="batch", mininterval=5.0):
        indices = order[i * settings.prompts : (i + 1) * settings.prompts]
        generator = torch.Generator().manual_seed(SEED + i)
        rollout = loop.sample(model, problems, indices, settings.n, temperature=1.0, generator=generator)
        with torch.no_grad():
            teacher = loop.score(models.teacher, problems, rollout, temperature=settings.teacher_temperature)
        log_probs, full = loop.score(model, problems, rollout)
        batch = loop.make_batch(problems, rollout, teacher, (log_probs, full))
        seen = corrupt(batch, generator) if corrupt else batch
        for arm, signal in signals.items():
            if signal == "full_kl":
                loss = loop.full_kl_loss(full, batch)
            else:
                loss, _ = compute_policy_loss_gspo(
                    batch.old_log_probs, log_probs, signal(seen), batch.response_mask, loop.LOSS_AGG_MODE, config
                )
            gradient = torch.autograd.grad(loss, parameters, retain_graph=True)
            gradients[arm].append(torch.cat([g.flatten() for g in gradient]))
    reference = torch.stack(gradients["full_kl"]).mean(0)
    return [
        {"plan": plan.fingerprint(name, arm), "regime": name, "arm": arm, "batches": batches}
        | _describe(torch.stack(g), reference)
        for arm, g in gradients.items()
    ]


def _describe(gradients: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Args: gradients (batches, parameters); reference (parameters,)."""
    mean = gradients.mean(0)
    # The squared norm of a mean over few batches has the noise's share in it, which is taken off.
    variance = gradients.var(0).sum()
    signal = mean.square().sum() - variance / len(gradients)
    cosine = torch.nn.functional.cosine_similarity
    return {
        "cosine_mean": cosine(mean, reference, dim=0).item(),
        "cosine": cosine(gradients, reference[None], dim=1).mean().item(),
        "noise": (variance / signal).item() if signal > 0 else float("inf"),
    }
