# SPDX-License-Identifier: Apache-2.0
"""Train the quickstart's teacher and student.

    python -m examples.quickstart.pretrain --out DIR

writes ``DIR/teacher``, ``DIR/student`` (checkpoints with their processor) and ``DIR/pretrain.json``. The teacher learns
from correct responses. The student is smaller and learns from careless responses, which mostly read one pip too few on
purple dice. Therefore it fails on problems that ask for a purple die of two or more pips, about half of all problems.
The correct reading keeps some probability, and on-policy distillation can raise it.

A student whose training stops early would be a worse example. It would need many more steps to learn what it cannot see
yet, and their number would depend on the processor's rounding.

A second call with the same code, settings and library versions returns at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from tqdm import tqdm

from examples.quickstart import diagrams, reward, tiny_vlm

if TYPE_CHECKING:  # tiny_vlm has to prepare torchvision before the processor is imported
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

RESULT = "pretrain.json"
TEACHER_AT_LEAST = 0.90
"""Greedy accuracy on the test split. Measured 0.995 to 0.998 over other seeds and ATEN_CPU_CAPABILITY default, avx2 and
avx512."""
STUDENT_BETWEEN = (0.30, 0.65)
"""The same; measured 0.498 to 0.518: half of the problems ask for a die that the student misreads."""

_TRAIN_PROBLEMS, _DEV_PROBLEMS, _TEST_PROBLEMS = 8000, 256, 448
_PATCH, _MERGE, _TEMPORAL = 14, 2, 2
_GRID = diagrams.SIDE * diagrams.CELL // _PATCH


@dataclass(frozen=True)
class Recipe:
    """The settings with which one of the two models is built and trained.

    Attributes:
        hidden_size, layers, vision_layers: as for `tiny_vlm.build_model`.
        seed: seed of the weights and of the order of the problems.
        carelessness: of the training responses (`diagrams.Problem.careless_response`); 0 makes them correct.
        stop_at: greedy accuracy on the dev split at which the cool-down begins.
        cooldown: number of steps of the cool-down, in which the learning rate falls to 0.
        learning_rate: learning rate of AdamW, after a linear warm-up over `warmup` steps.
        batch_size: problems per step.
        check_below: training loss in nats per token. Below it, the accuracy is measured every `check_every` steps.
        max_steps: the number of steps after which the training gives up.
    """

    hidden_size: int
    seed: int
    carelessness: float
    stop_at: float
    cooldown: int = 60
    learning_rate: float = 2e-3
    layers: int = 2
    vision_layers: int = 1
    batch_size: int = 64
    warmup: int = 40
    check_every: int = 20
    check_below: float = 0.1
    max_steps: int = 1500


RECIPES = {
    "teacher": Recipe(hidden_size=128, seed=1, carelessness=0.0, stop_at=0.95),
    "student": Recipe(hidden_size=96, seed=11, carelessness=0.7, stop_at=0.45),
}


class Problems:
    """Problems as tensors.

    Every prompt starts with the same tokens up to the end of the image, and every image has the same size. The batches
    below rely on both.
    """

    def __init__(
        self, problems: Sequence[diagrams.Problem], processor: Qwen2_5_VLProcessor, carelessness: float = 0.0
    ) -> None:
        """Tokenize the problems and draw their boards.

        Args:
            problems: the problems.
            processor: provides the tokenizer and the normalisation.
            carelessness: of the responses; 0 makes them correct.
        """
        self.tokenizer = processor.tokenizer
        self.image_token = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.answers = [problem.answer for problem in problems]
        self._pixels = torch.from_numpy(np.stack([problem.pixels() for problem in problems]))
        self._mean = torch.tensor(processor.image_processor.image_mean).view(1, 3, 1, 1)
        self._std = torch.tensor(processor.image_processor.image_std).view(1, 3, 1, 1)
        # Render the template only once. Rendering it for every problem would take seconds.
        messages = [{"role": "user", "content": "{}"}]
        template = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        image = f"<|vision_start|>{'<|image_pad|>' * (_GRID // _MERGE) ** 2}<|vision_end|>"
        prompts = [template.replace("{}", image + problem.question) for problem in problems]
        self.prompts = self.tokenizer(prompts).input_ids
        rng = random.Random(0)
        responses = [problem.careless_response(rng, carelessness) for problem in problems]
        self.responses = [[*ids, self.tokenizer.eos_token_id] for ids in self.tokenizer(responses).input_ids]

    def __len__(self) -> int:
        return len(self.answers)

    def images(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return what the processor would return for n boards, about fifty times faster.

        Returns:
            ``pixel_values``, shape (36 * n, 1176), float32, and ``image_grid_thw``, shape (n, 3).
        """
        count = len(indices)
        pixels = (self._pixels[list(indices)].permute(0, 3, 1, 2) / 255 - self._mean) / self._std
        blocks = _GRID // _MERGE
        patches = pixels.reshape(count, 3, blocks, _MERGE, _PATCH, blocks, _MERGE, _PATCH)
        patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
        patches = patches.expand(-1, -1, -1, -1, -1, -1, _TEMPORAL, -1, -1)
        return {
            "pixel_values": patches.reshape(count * _GRID * _GRID, 3 * _TEMPORAL * _PATCH * _PATCH),
            "image_grid_thw": torch.tensor([[1, _GRID, _GRID]] * count),
        }


def response_logits(
    model: Qwen2_5_VLForConditionalGeneration,
    problems: Problems,
    indices: Sequence[int],
    responses: Sequence[Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the model over prompts and responses, and compute logits for the response tokens only.

    Args:
        model: the Qwen2.5-VL.
        problems: the source of the prompts and images.
        indices: n indices into `problems`.
        responses: n token lists, one response for each index.

    Returns:
        The logits, shape (number of response tokens, vocabulary), and their targets, shape (number of response tokens).
        The tokens of the first response come first.
    """
    prompts = [problems.prompts[index] for index in indices]
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    # Padding on the right needs no mask, because a token does not attend to later ones.
    input_ids = torch.full((len(rows), max(map(len, rows))), problems.tokenizer.pad_token_id)
    is_response = torch.zeros_like(input_ids, dtype=torch.bool)
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        input_ids[index, : len(row)] = torch.tensor(row)
        is_response[index, len(prompt) : len(row)] = True
    images = problems.images(indices)
    # The image has the same place in every row, so all rows share the positions of the first one.
    position_ids, _ = model.model.get_rope_index(
        input_ids[:1], (input_ids[:1] == problems.image_token).int(), images["image_grid_thw"][:1]
    )
    hidden = model.model(
        input_ids=input_ids, position_ids=position_ids.expand(-1, len(rows), -1), use_cache=False, **images
    ).last_hidden_state
    return model.lm_head(hidden[:, :-1][is_response[:, 1:]]), input_ids[is_response]


@torch.no_grad()
def greedy_accuracy(
    model: Qwen2_5_VLForConditionalGeneration, problems: Problems, *, max_new_tokens: int = 24, batch_size: int = 256
) -> float:
    """Return the fraction of the problems that the model solves with greedy decoding."""
    model.eval()
    tokenizer = problems.tokenizer
    score = 0.0
    for start in range(0, len(problems), batch_size):
        indices = range(start, min(start + batch_size, len(problems)))
        batch = tokenizer.pad({"input_ids": problems.prompts[start : indices.stop]}, padding_side="left")
        input_ids = torch.tensor(batch["input_ids"])
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.tensor(batch["attention_mask"]),
            mm_token_type_ids=(input_ids == problems.image_token).int(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            **problems.images(indices),
        )
        texts = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            score += reward.compute_score(diagrams.DATA_SOURCE, text, problems.answers[index])
    return score / len(problems)


def train(
    recipe: Recipe, name: str, train_set: Problems, dev_set: Problems
) -> tuple[Qwen2_5_VLForConditionalGeneration, dict[str, Any]]:
    """Train one model on the responses of a training set until it reaches the accuracy of its recipe.

    Args:
        recipe: what to build and when to stop.
        name: a key of `RECIPES`, shown in the progress bar.
        train_set: the problems to learn from.
        dev_set: the problems on which the accuracy decides when to stop.

    Returns:
        The model, and a dict with its number of steps and its accuracy on `dev_set`.

    Raises:
        RuntimeError: the accuracy is not reached within the recipe's `max_steps`.
    """
    model = tiny_vlm.build_model(
        train_set.tokenizer,
        seed=recipe.seed,
        hidden_size=recipe.hidden_size,
        layers=recipe.layers,
        vision_layers=recipe.vision_layers,
        initializer_range=0.05,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    rng = random.Random(recipe.seed)
    loss_average, accuracy, last_step = None, 0.0, None
    model.train()
    with tqdm(desc=name, unit="step", mininterval=1.0, position=list(RECIPES).index(name)) as progress:
        for step in range(1, recipe.max_steps + 1):
            fraction = min(1.0, step / recipe.warmup)
            if last_step is not None:
                fraction = (last_step - step + 1) / recipe.cooldown
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * fraction
            indices = rng.sample(range(len(train_set)), recipe.batch_size)
            logits, targets = response_logits(
                model, train_set, indices, [train_set.responses[index] for index in indices]
            )
            loss = torch.nn.functional.cross_entropy(logits, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss_average = loss.item() if loss_average is None else 0.8 * loss_average + 0.2 * loss.item()
            progress.update()
            progress.set_postfix(loss=f"{loss_average:.3f}", dev_accuracy=f"{accuracy:.3f}", refresh=False)
            if step == last_step:
                break
            if last_step is None and loss_average < recipe.check_below and step % recipe.check_every == 0:
                accuracy = greedy_accuracy(model, dev_set)
                model.train()
                if accuracy >= recipe.stop_at:
                    last_step = step + recipe.cooldown
        else:
            raise RuntimeError(
                f"the {name} reached a dev accuracy of {accuracy:.3f} in {recipe.max_steps} steps instead of "
                f"{recipe.stop_at}: try another seed in examples/quickstart/pretrain.py"
            )
    model.eval()
    return model, {"steps": step, "dev_accuracy": greedy_accuracy(model, dev_set)}


def fingerprint() -> str:
    """Return a digest of everything that determines the two models: the task's code and the libraries' versions."""
    digest = hashlib.sha256()
    for module in (diagrams, reward, tiny_vlm):
        digest.update(Path(module.__file__).read_bytes())
    digest.update(Path(__file__).read_bytes())
    digest.update(f"torch {torch.__version__} transformers {transformers.__version__} {np.__version__}".encode())
    return digest.hexdigest()


def _make(name: str, out: Path) -> dict[str, Any]:
    """Train one of the two models, save it under its name, and return its entry in ``pretrain.json``."""
    # The two models train side by side. With more than one thread, the threads of a model would wait for each other,
    # which is very slow while something else uses the same cores.
    torch.set_num_threads(1)
    began = time.perf_counter()
    recipe = RECIPES[name]
    processor = tiny_vlm.build_processor(tiny_vlm.build_tokenizer())
    # The distillation's prompts have another seed.
    problems = diagrams.make_problems("train", _TRAIN_PROBLEMS, seed=1)
    dev_set = Problems(diagrams.make_problems("dev", _DEV_PROBLEMS), processor)
    test_set = Problems(diagrams.make_problems("test", _TEST_PROBLEMS), processor)
    model, outcome = train(recipe, name, Problems(problems, processor, recipe.carelessness), dev_set)
    outcome["accuracy"] = greedy_accuracy(model, test_set)
    partial = out / f"{name}.partial"
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    shutil.rmtree(out / name, ignore_errors=True)
    os.replace(partial, out / name)
    return {
        **outcome,
        "seconds": round(time.perf_counter() - began, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "recipe": dataclasses.asdict(recipe),
    }


def pretrain(out: Path, *, side_by_side: bool = True) -> dict[str, Any]:
    """Train teacher and student into a folder, or reuse those that are there.

    Args:
        out: the folder. Older models of the same names in it are replaced.
        side_by_side: train each model in its own process, which takes half the time on two cores. The weights are the
            same either way.

    Returns:
        The content of ``pretrain.json``: ``teacher`` and ``student``, each with ``accuracy`` (greedy, on the test
        split), ``dev_accuracy``, ``steps``, ``seconds``, ``parameters`` and ``recipe``; the total ``seconds``; and
        ``fingerprint``.

    Raises:
        RuntimeError: the teacher is below 0.90 on the test split, or the student is outside 0.30 to 0.65.
    """
    result_path = out / RESULT
    if result_path.exists():
        result = json.loads(result_path.read_text())
        if result["fingerprint"] == fingerprint() and all((out / name).is_dir() for name in RECIPES):
            return result
        result_path.unlink()
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    if side_by_side:
        with ProcessPoolExecutor(len(RECIPES), mp_context=multiprocessing.get_context("spawn")) as pool:
            entries = list(pool.map(_make, RECIPES, [out] * len(RECIPES)))
    else:
        entries = [_make(name, out) for name in RECIPES]
    result = {
        "fingerprint": fingerprint(),
        "seconds": round(time.perf_counter() - began, 1),
        **dict(zip(RECIPES, entries, strict=True)),
    }
    teacher, student = result["teacher"]["accuracy"], result["student"]["accuracy"]
    low, high = STUDENT_BETWEEN
    if teacher < TEACHER_AT_LEAST or not low <= student <= high:
        raise RuntimeError(
            f"on {_TEST_PROBLEMS} held-out problems the teacher solves {teacher:.3f} (at least {TEACHER_AT_LEAST} is "
            f"needed) and the student {student:.3f} (needed: {low} to {high}); change the recipes' seeds in "
            "examples/quickstart/pretrain.py"
        )
    partial_result = out / f"{RESULT}.partial"
    partial_result.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(partial_result, result_path)
    return result


def main() -> None:
    """Run the command line: train, or reuse what was trained before, and print the accuracies."""
    parser = argparse.ArgumentParser(description="Train the quickstart's teacher and student.")
    parser.add_argument("--out", type=Path, required=True, help="folder for teacher, student and pretrain.json")
    result = pretrain(parser.parse_args().out)
    print(
        f"held-out accuracy: teacher {result['teacher']['accuracy']:.3f}, student {result['student']['accuracy']:.3f} "
        f"(trained in {result['seconds']:.0f} s)"
    )


if __name__ == "__main__":
    main()
