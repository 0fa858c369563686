# SPDX-License-Identifier: Apache-2.0
"""A tiny InternVL3.5 of transformers' own architecture (`-HF`) with random weights, made without a download.

It has the form of the released checkpoints: a Qwen3 language model and tiles of a fixed size. An image of several
tiles, followed by a thumbnail, is one `<img>` ... `</img>` run of `<IMG_CONTEXT>`. `tests/tiny_models.py` says why the
vocabulary is not padded and placeholders are improbable.
"""

from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2Tokenizer,
)

from examples.quickstart.tiny_vlm import build_tokenizer

IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
"""The image tokens, by the attributes under which `InternVLProcessor` looks for them in its tokenizer."""

VOCAB = 366
"""Ordinary tokens of `build_tokenizer`. Its 14 special tokens and the 4 above make it a multiple of 64."""

_HEAD_DIM = 32
_PATCH, _DOWNSAMPLE = 14, 0.5
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<IMG_CONTEXT>\\n' -}}
{%- elif part['type'] == 'video' -%}
{{- '<video>\\n' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def build_processor(path: Path, *, tile: int = 56, max_tiles: int = 3) -> InternVLProcessor:
    """Write tokenizer and processor into a folder. An image becomes one tile, or 2 to `max_tiles` and a thumbnail."""
    build_tokenizer(vocab=VOCAB).save_pretrained(path)
    tokenizer = Qwen2Tokenizer.from_pretrained(path, extra_special_tokens=IMAGE_TOKENS, chat_template=_CHAT_TEMPLATE)
    size = {"height": tile, "width": tile}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=False, min_patches=1, max_patches=max_tiles),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=int((tile // _PATCH * _DOWNSAMPLE) ** 2),
        chat_template=_CHAT_TEMPLATE,
    )
    processor.save_pretrained(path)
    return processor


def build_tiny_internvl(
    path: str | Path,
    *,
    seed: int,
    layers: int = 2,
    hidden_size: int = 128,
    vision_layers: int = 2,
    vision_hidden_size: int = 64,
    tile: int = 56,
    max_tiles: int = 3,
    initializer_range: float = 0.2,
) -> Path:
    """Write a tiny InternVL with random weights, its tokenizer and its processor into a folder.

    Args:
        path: the folder; made if missing.
        seed: of the weights.
        layers, vision_layers: depth of the language model and of the vision tower.
        hidden_size, vision_hidden_size: multiples of 32, the size of a head.
        tile: edge of a tile in pixels, a multiple of 28. A tile becomes `(tile / 28) ** 2` tokens.
        max_tiles: of one image, without its thumbnail.
        initializer_range: standard deviation of the weights.

    Returns:
        The folder.
    """
    path = Path(path)
    processor = build_processor(path, tile=tile, max_tiles=max_tiles)
    tokenizer = processor.tokenizer
    ends = {"bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = InternVLConfig(
        text_config={
            "model_type": "qwen3",
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": hidden_size * 2,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden_size // _HEAD_DIM,
            "num_key_value_heads": 1,
            "head_dim": _HEAD_DIM,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "initializer_range": initializer_range,
            "tie_word_embeddings": False,
            "pad_token_id": tokenizer.pad_token_id,
            **ends,
        },
        vision_config={
            "num_hidden_layers": vision_layers,
            "hidden_size": vision_hidden_size,
            "intermediate_size": vision_hidden_size * 2,
            "num_attention_heads": vision_hidden_size // _HEAD_DIM,
            "attention_bias": True,
            "image_size": [tile, tile],
            "patch_size": [_PATCH, _PATCH],
            "layer_scale_init_value": 1.0,
            "initializer_range": initializer_range,
        },
        image_token_id=processor.image_token_id,
        image_seq_length=processor.image_seq_length,
        downsample_ratio=_DOWNSAMPLE,
        tie_word_embeddings=False,
        architectures=["InternVLForConditionalGeneration"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config).to(torch.float32)
        # A new model has zeros here, and would not notice patches in the wrong order.
        embeddings = model.model.vision_tower.embeddings
        torch.nn.init.normal_(embeddings.position_embeddings, std=initializer_range)
        torch.nn.init.normal_(embeddings.cls_token, std=initializer_range)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS.values()))] = 0.0
    model.generation_config = GenerationConfig(
        bos_token_id=ends["bos_token_id"],
        eos_token_id=[ends["eos_token_id"], ends["bos_token_id"]],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(path)
    return path
