# SPDX-License-Identifier: Apache-2.0
"""Models and problems of the stability study: the quickstart's teacher, students of four qualities, problems.

A start point is the quickstart's student, fine-tuned on responses of somebody who mostly sees one pip too few on
certain dice and reads all others right (`STARTS`). Its greedy accuracy follows from how many problems ask for one of
these dice, and the right reading keeps some probability, so that on-policy distillation can raise it.
"""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from examples.quickstart import diagrams, pretrain, tiny_vlm
from examples.quickstart.pretrain import Problems

TRAIN_PROBLEMS, VALIDATION_PROBLEMS, TEST_PROBLEMS, TRAIN_SEED = 2048, 256, 448, 2
CARELESSNESS = 0.7
TOLERANCE = 0.04
"""Largest difference between a start point's accuracy and its share. Start 40 was measured 0.003 to 0.013 below it,
over other seeds of the models and ATEN_CPU_CAPABILITY default, avx2 and avx512."""
DEGRADED_STRENGTH = 2.25
"""The strength of `degrade` that `World.degraded` has: the teacher solves about 0.7 of such problems."""

_NOISE = 60.0
_STEPS, _LEARNING_RATE, _WARMUP, _BATCH_SIZE, _EXAMPLES = 120, 1e-3, 10, 40, 4800


@dataclass(frozen=True)
class Start:
    """A student of a certain quality.

    Attributes:
        share: its greedy accuracy on the test problems as a share of the teacher's.
        careless: whether a die is read carelessly: (colour, pips, place in the question from 0).
    """

    share: float
    careless: Callable[[str, int, int], bool]


STARTS = {
    "40": Start(0.40, lambda c, pips, place: (c == "purple" and pips >= 2) or (c == "orange" and pips >= 5)),
    "60": Start(0.60, lambda c, pips, place: c == "purple" and pips >= 3),
    "80": Start(0.80, lambda c, pips, place: c == "purple" and (pips >= 5 or (pips == 4 and place == 0))),
    "95": Start(0.95, lambda c, pips, place: c == "purple" and pips == 6 and place < 2),
}


@dataclass(frozen=True, eq=False)
class World:
    """Models and problems of the study.

    Attributes:
        teacher: the quickstart's, in eval mode, without gradients.
        starts: by name, a student that nobody trains; `student` copies it.
        start_accuracy: by name, greedy accuracy on the test problems, and "teacher".
        processor: of all of them.
        train: 2048 problems that the models have not been pretrained on.
        degraded: the same problems with images that are hard to read (`degrade`).
        validation: 256 problems to choose settings by.
        test: 448 problems to report.
    """

    teacher: torch.nn.Module
    starts: dict[str, torch.nn.Module]
    start_accuracy: dict[str, float]
    processor: object
    train: Problems
    degraded: Problems
    validation: Problems
    test: Problems

    def student(self, start: str) -> torch.nn.Module:
        """Return a fresh copy of a start point, to be trained. KeyError if there is no such name."""
        return copy.deepcopy(self.starts[start]).requires_grad_(True)

    def problems(self, name: str) -> Problems:
        """Return a problem set by its name: "train", "degraded", "validation" or "test"."""
        if name not in ("train", "degraded", "validation", "test"):
            raise ValueError(f"no problem set {name!r}: use train, degraded, validation or test")
        return getattr(self, name)


def degrade(problems: Problems, strength: float = DEGRADED_STRENGTH, seed: int = 0) -> Problems:
    """Return the problems with images that are hard to read; prompts, answers and responses are shared.

    Args:
        problems: what to degrade; not changed.
        strength: 0 changes nothing. The share of a 3x3 box blur in the image (1 at most), and the deviation of the
            Gaussian noise that is added afterwards, in units of 60 of 255 grey levels.
        seed: of the noise.
    """
    pixels = problems._pixels.permute(0, 3, 1, 2).float()
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate")
    blurred = torch.nn.functional.avg_pool2d(padded, 3, stride=1)
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    pixels = torch.lerp(pixels, blurred, min(strength, 1.0)) + strength * _NOISE * noise
    result = copy.copy(problems)
    # Rounded to bytes as any image file would be, which also keeps 2048 boards at 43 MB.
    result._pixels = pixels.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return result


def careless_responses(problems: Sequence[diagrams.Problem], start: str, seed: int = 0) -> list[str]:
    """Return how the teacher of a start point answers the problems: wrong with probability 0.7 on each careless die."""
    careless, rng = STARTS[start].careless, random.Random(seed)
    responses = []
    for problem in problems:
        read = [
            pips - 1 if careless(colour, pips, place) and rng.random() < CARELESSNESS else pips
            for place, (colour, pips) in enumerate(zip(problem.asked, problem.addends, strict=True))
        ]
        responses.append(problem.reasoning(read))
    return responses


def fingerprint() -> str:
    """Return a digest of what the start points depend on: `pretrain.fingerprint` and this module."""
    digest = hashlib.sha256(pretrain.fingerprint().encode())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()


def _load(path: Path) -> torch.nn.Module:
    return tiny_vlm.Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()


def _make(start: str, out: Path, position: int, made_by: str) -> None:
    """Fine-tune one start point and save it with the fingerprint `made_by`."""
    # As in pretrain: two models train side by side.
    torch.set_num_threads(1)
    processor = tiny_vlm.build_processor(tiny_vlm.build_tokenizer())
    # The seed of the pretraining: a start point must not have seen the study's problems.
    examples = diagrams.make_problems("train", _EXAMPLES, seed=1)
    problems = Problems(examples, processor)
    responses = [
        [*ids, processor.tokenizer.eos_token_id]
        for ids in processor.tokenizer(careless_responses(examples, start)).input_ids
    ]
    model = _load(out / "models" / "student").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    rng = random.Random(0)
    with tqdm(total=_STEPS, desc=f"start {start}", unit="step", mininterval=1.0, position=position) as progress:
        for step in range(_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * min((step + 1) / _WARMUP, 1 - step / _STEPS)
            indices = rng.sample(range(len(problems)), _BATCH_SIZE)
            logits, targets = pretrain.response_logits(model, problems, indices, [responses[i] for i in indices])
            loss = torch.nn.functional.cross_entropy(logits, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    test = Problems(diagrams.make_problems("test", TEST_PROBLEMS), processor)
    content = {
        "fingerprint": made_by,
        "accuracy": pretrain.greedy_accuracy(model, test),
        "state": model.state_dict(),
    }
    partial = out / "starts" / f"{start}.pt.partial"
    torch.save(content, partial)
    os.replace(partial, out / "starts" / f"{start}.pt")


def _read(path: Path, made_by: str) -> dict | None:
    """Return what `_make` saved, or None where it is missing or was made by other code."""
    if not path.exists():
        return None
    content = torch.load(path, weights_only=True)
    return content if content["fingerprint"] == made_by else None


def prepare(out: Path, names: Sequence[str] = tuple(STARTS)) -> World:
    """Make teacher and start points in a folder, or find them there, and draw the problems.

    Args:
        names: of the start points that are wanted.
        out: holds ``models`` (of `pretrain.pretrain`) and ``starts/<name>.pt`` afterwards.

    Raises:
        RuntimeError: if a start point's greedy accuracy on the test problems is not within 0.04 of what it should be.
    """
    out = Path(out)
    # Once, so that an edit during the training does not put a wrong name on what was trained.
    made_by = fingerprint()
    accuracy = {"teacher": pretrain.pretrain(out / "models")["teacher"]["accuracy"]}
    paths = {name: out / "starts" / f"{name}.pt" for name in names}
    missing = [name for name, path in paths.items() if _read(path, made_by) is None]
    if missing:
        (out / "starts").mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            count = len(missing)
            list(pool.map(_make, missing, [out] * count, range(count), [made_by] * count))
    starts = {}
    for name, path in paths.items():
        content = _read(path, made_by)
        accuracy[name] = content["accuracy"]
        starts[name] = _load(out / "models" / "student").requires_grad_(False)
        starts[name].load_state_dict(content["state"])
    off = {
        name: f"{accuracy[name]:.3f} and not {STARTS[name].share * accuracy['teacher']:.3f}"
        for name in names
        if abs(accuracy[name] - STARTS[name].share * accuracy["teacher"]) > TOLERANCE
    }
    if off:
        raise RuntimeError(
            f"start points are more than {TOLERANCE} off their greedy accuracy on {TEST_PROBLEMS} test problems: "
            f"{off}; change STARTS or the number of steps in benchmarks/stability/world.py"
        )
    processor = tiny_vlm.build_processor(tiny_vlm.build_tokenizer())
    train = Problems(diagrams.make_problems("train", TRAIN_PROBLEMS, TRAIN_SEED), processor)
    return World(
        teacher=_load(out / "models" / "teacher").requires_grad_(False),
        starts=starts,
        start_accuracy=accuracy,
        processor=processor,
        train=train,
        degraded=degrade(train),
        validation=Problems(diagrams.make_problems("dev", VALIDATION_PROBLEMS), processor),
        test=Problems(diagrams.make_problems("test", TEST_PROBLEMS), processor),
    )
