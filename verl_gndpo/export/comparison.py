# SPDX-License-Identifier: Apache-2.0
"""Compare what was written with what was trained: weights, greedy tokens and their log-probs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig

from verl_gndpo.export.folders import ExportError
from verl_gndpo.families import family_of

QUESTION = "How many degrees are three angles of 40 degrees? Think step by step."
TOKENS = 8
"""Greedy tokens per question."""
LIKELY = 20
"""Log-probs of so many of the most likely tokens are compared at each of them."""
TOLERANCE = 1e-3
"""Nats. Rounding in float32 moves log-probs by less than 1e-4 on tiny models, and more on deep ones."""


@dataclass(frozen=True)
class Answer:
    """What a model says to one question."""

    question: str
    """"text" or "image"."""

    prompt: torch.Tensor
    """Token ids [1, prompt length]."""

    tokens: torch.Tensor
    """Greedy tokens [TOKENS]."""

    log_probs: torch.Tensor
    """Of every token of the vocabulary, before each of them: [TOKENS, vocabulary], in nats."""


def ask(model: Any, folder: Path, trust_remote_code: bool) -> list[Answer]:
    """Let a model answer one question in text and, if it sees images, one about an image.

    Args:
        model: in float32.
        folder: with tokenizer and processor.
    """
    answers = []
    for question, inputs in _questions(model, folder, trust_remote_code).items():
        # Without the model's own settings of generation, which may penalise repetitions.
        model.generation_config = GenerationConfig()
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                generation_config=GenerationConfig(
                    max_new_tokens=TOKENS,
                    do_sample=False,
                    pad_token_id=0,
                    return_dict_in_generate=True,
                    output_logits=True,
                ),
            )
        logits = torch.cat(output.logits).float()
        prompt = inputs["input_ids"]
        tokens = output.sequences[0, prompt.shape[1] :]
        answers.append(Answer(question, prompt, tokens, logits.log_softmax(-1)))
    return answers


def _questions(model: Any, folder: Path, trust_remote_code: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Return the inputs of the model by question."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    chat = [{"role": "user", "content": QUESTION}]
    text = (
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        if tokenizer.chat_template
        else QUESTION
    )
    inputs = {"text": dict(tokenizer(text, return_tensors="pt", return_token_type_ids=False))}
    if family_of(model.config).vision_config_of(model.config) is None:
        return inputs
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    # A tokenizer takes the place of a processor where the training had none.
    if hasattr(processor, "image_processor") and processor.chat_template:
        pixels = np.random.default_rng(0).integers(0, 255, (84, 112, 3), np.uint8)
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs["image"] = dict(processor(text=[text], images=[Image.fromarray(pixels)], return_tensors="pt"))
    return inputs


def largest_difference(trained: list[Answer], written: list[Answer]) -> float:
    """Return the largest difference of a log-prob, in nats.

    Where two tokens are almost equally likely, models that are equal up to rounding may go on with different ones.
    Therefore answers are compared up to the first token in which they differ, and there by their log-probs alone.

    Returns:
        The difference; inf if the models were asked different things.
    """
    found = 0.0
    for ours, theirs in zip(trained, written, strict=True):
        if not torch.equal(ours.prompt, theirs.prompt) or ours.log_probs.shape != theirs.log_probs.shape:
            return float("inf")
        same = (ours.tokens == theirs.tokens).long().cumprod(0).sum().item()
        steps = slice(0, min(same + 1, len(ours.tokens)))
        likely = ours.log_probs[steps].topk(min(LIKELY, ours.log_probs.shape[-1])).indices
        differences = (ours.log_probs[steps] - theirs.log_probs[steps]).gather(-1, likely).abs()
        # NaN is a difference, too.
        found = max(found, differences.nan_to_num(float("inf")).max().item())
    return found


def check_answers(trained: list[Answer], written: list[Answer], what: str) -> float:
    """Return the largest difference of a log-prob, in nats.

    Args:
        what: names the second model, for the message.

    Raises:
        ExportError: it is larger than TOLERANCE.
    """
    difference = largest_difference(trained, written)
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{what} is not the model of the checkpoint: log-probs of its greedy tokens differ by {difference:.2g} "
            f"nats (allowed: {TOLERANCE:g}), so it was removed -> report it, with the versions of verl and transformers"
        )
    return difference


def check_weights(expected: dict[str, torch.Tensor], model: Any) -> int:
    """Compare every weight of a model that was loaded from what was written.

    Args:
        expected: by name, in the type in which they were written.
        model: in the same type.

    Returns:
        The number of values.

    Raises:
        ExportError: a weight is missing, too many, or has another value.
    """
    loaded = model.state_dict()
    wrong = sorted(expected.keys() ^ loaded.keys())
    wrong += [name for name in expected.keys() & loaded.keys() if not torch.equal(expected[name], loaded[name])]
    if wrong:
        raise ExportError(
            f"{len(wrong)} of {len(expected)} weights are not those of the checkpoint when transformers loads what was "
            f"written, first {wrong[0]}, so it was removed -> report it, with the versions of verl and transformers"
        )
    return sum(weight.numel() for weight in expected.values())
