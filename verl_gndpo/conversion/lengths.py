# SPDX-License-Identifier: Apache-2.0
"""Measure prompts in the tokens of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ConversionError, DroppedRow, one_line
from .report import OVERLONG
from .row import ConvertedRow
from .text import IMAGE_PLACEHOLDER

_SPECIAL = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def structured(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return the messages in the form that chat templates read, with placeholders as image parts."""
    result = []
    for message in messages:
        parts = [
            {"type": "image"} if part == IMAGE_PLACEHOLDER else {"type": "text", "text": part}
            for part in re.split(f"({IMAGE_PLACEHOLDER})", message["content"])
            if part
        ]
        result.append({"role": message["role"], "content": parts})
    return result


@dataclass(frozen=True)
class Measure:
    """Measure prompts with a tokenizer and a processor, of a model or built here.

    Args:
        tokenizer: a tokenizer of transformers.
        processor: a processor of transformers; None for a model without images.
        name: description of both, for the report.
        template: arguments of the chat template.
    """

    tokenizer: Any
    processor: Any
    name: str
    template: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, messages: list[dict[str, str]], sizes: list[tuple[int, int]]) -> tuple[int, int]:
        """Return the number of tokens of the prompt, and how many of them are image tokens, without any pixels.

        Args:
            messages: the messages as stored, with placeholders in the text.
            sizes: (width, height) of each image.

        Raises:
            Exception: any error that the processor raises on a shape that it refuses.
        """
        # verl leaves the messages of a row without images as they are, too.
        content = structured(messages) if sizes else messages
        writer = self.processor or self.tokenizer
        text = writer.apply_chat_template(content, add_generation_prompt=True, tokenize=False, **self.template)
        tokens = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not sizes:
            return tokens, 0
        resized = [self.resized(width, height) for width, height in sizes]
        images = sum(self.processor._get_num_multimodal_tokens(image_sizes=resized)["num_image_tokens"])
        return tokens - len(sizes) + images, images

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return (height, width) after the resizing that verl's agent loop applies before the processor."""
        from qwen_vl_utils import vision_process

        patch = getattr(self.processor.image_processor, "patch_size", 14)
        return vision_process.smart_resize(height, width, factor=patch * vision_process.SPATIAL_MERGE_SIZE)


@dataclass(frozen=True)
class Limit:
    """Return why a row must be dropped if its prompt has more than `tokens` tokens, else None."""

    measure: Measure
    tokens: int

    def __call__(self, row: ConvertedRow) -> DroppedRow | None:
        try:
            tokens, _ = self.measure(row.values["prompt"], [picture.size for picture in row.pictures])
        except Exception as error:  # verl's own prompt filter would swallow it and drop the row silently
            return DroppedRow("processor refuses the row", one_line(error))
        return DroppedRow(OVERLONG, f"{tokens} tokens") if tokens > self.tokens else None


def load_measure(model: str | None) -> Measure:
    """Load the tokenizer and processor of a model.

    Args:
        model: folder or hub id. None builds a tokenizer of bytes and Qwen2.5-VL's processor, without any download.

    Raises:
        ConversionError: the model cannot be loaded, or its processor cannot count image tokens.
    """
    if model is None:
        return Measure(*_built(), "bytes as text tokens, an upper bound, and Qwen2.5-VL's image tokens")
    try:
        measure = measure_of(model)
    except Exception as error:
        raise ConversionError(f"--model {model} cannot be loaded ({one_line(error)}).") from error
    if measure.processor is None:
        raise ConversionError(f"--model {model} has no processor that verl can load, so it cannot read images.")
    if not hasattr(measure.processor, "_get_num_multimodal_tokens"):
        kind = type(measure.processor).__name__
        raise ConversionError(f"--model {model}: {kind} cannot say how many tokens an image takes.")
    return measure


def measure_of(model: str, trust_remote_code: bool = False, template: Mapping[str, Any] | None = None) -> Measure:
    """Load the tokenizer and processor of a model as verl does.

    Args:
        model: folder or hub id.
        trust_remote_code: run code that comes with the model.
        template: as for `Measure`.

    Raises:
        Exception: whatever transformers raises on a model that it cannot load.
    """
    from verl.utils import hf_processor, hf_tokenizer

    tokenizer = hf_tokenizer(model, trust_remote_code=trust_remote_code)
    processor = hf_processor(model, trust_remote_code=trust_remote_code)
    return Measure(tokenizer, processor, f"tokenizer and processor of {model}", template or {})


def _built() -> tuple[Any, Any]:
    """Build a tokenizer with one token per byte, and Qwen2.5-VL's processor."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2_5_VLProcessor, Qwen2Tokenizer
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    tokenizer = Qwen2Tokenizer(
        vocab={symbol: number for number, symbol in enumerate(sorted(ByteLevel.alphabet()))},
        merges=[],
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(_SPECIAL),
        chat_template=_CHAT_TEMPLATE,
    )
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 16384 * 28 * 28}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(size)),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=dict(size)),
        chat_template=_CHAT_TEMPLATE,
    )
    return tokenizer, processor
