# SPDX-License-Identifier: Apache-2.0
"""Build a tiny Qwen2.5-VL with its tokenizer and processor, without a download.

    python -m examples.quickstart.tiny_vlm --out DIR

The folder is an ordinary checkpoint of the class ``Qwen2_5_VLForConditionalGeneration``. transformers, vLLM and verl
load it by its path, offline. It differs from a released checkpoint only in its sizes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from examples.quickstart import diagrams
from verl_gndpo.platforms import torchvision_ops

# This has to run before the Qwen-VL processors are imported, because they import torchvision.
torchvision_ops.install()

from transformers import (  # noqa: E402
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX  # noqa: E402
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor  # noqa: E402
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor  # noqa: E402

HEAD_DIM = 32
"""Size of an attention head in the text and the vision model: the smallest with CPU kernels in vLLM."""

_END_OF_TEXT, _END_OF_TURN = "<|endoftext|>", "<|im_end|>"
_OTHER_SPECIAL = (
    "<|im_start|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' or 'video' in part -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
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


def build_tokenizer(texts: Iterable[str] | None = None, *, vocab: int = 448) -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer in Qwen's format, which can encode any text.

    Args:
        texts: the training texts; None stands for the quickstart's questions and answers.
        vocab: maximum number of tokens besides the 14 special ones. 256 of them are the single bytes.

    Raises:
        ValueError: `vocab` is too small for the bytes.
    """
    if vocab < 256:
        raise ValueError(f"vocab={vocab} is below 256; without a token for each byte some text can't be encoded")
    bpe = Tokenizer(models.BPE())
    # The same steps as in Qwen2Tokenizer. Otherwise the trainer learns merges that its splitting never allows.
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [*(diagrams.texts() if texts is None else texts), "system\nuser\nassistant\nYou are a helpful assistant."],
        trainers.BpeTrainer(
            vocab_size=vocab,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[],
            show_progress=False,
        ),
    )
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        unk_token=_END_OF_TEXT,
        eos_token=_END_OF_TURN,
        pad_token=_END_OF_TEXT,
        additional_special_tokens=list(_OTHER_SPECIAL),
        chat_template=_CHAT_TEMPLATE,
    )
    tokenizer.model_max_length = 32768
    return tokenizer


def build_processor(tokenizer: Qwen2Tokenizer, *, max_pixels: int = 28 * 28 * 64) -> Qwen2_5_VLProcessor:
    """Combine a tokenizer with Qwen's image processor, which reduces images to at most `max_pixels`."""
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": max_pixels}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(size)),
        video_processor=Qwen2VLVideoProcessor(size=dict(size)),
        tokenizer=tokenizer,
        chat_template=_CHAT_TEMPLATE,
    )


def build_model(
    tokenizer: Qwen2Tokenizer,
    *,
    seed: int,
    hidden_size: int = 128,
    layers: int = 2,
    vision_hidden_size: int = 64,
    vision_layers: int = 2,
    initializer_range: float = 0.2,
) -> Qwen2_5_VLForConditionalGeneration:
    """Build a Qwen2.5-VL with random float32 weights for a tokenizer. Keep torch's global random state.

    Args:
        tokenizer: determines the vocabulary, which is padded to a multiple of 64, as in released models.
        seed: seed of the weights.
        hidden_size, vision_hidden_size: widths; multiples of 32, the size of a head.
        layers, vision_layers: numbers of layers of the text and the vision model.
        initializer_range: standard deviation of the weights. With 0.2 the next-token distribution is far from uniform,
            as tests of log-probs need it. Training needs about 0.05.

    Raises:
        ValueError: a width is not a multiple of 32.
    """
    for name, size in (("hidden_size", hidden_size), ("vision_hidden_size", vision_hidden_size)):
        if size % HEAD_DIM:
            raise ValueError(f"{name}={size} is not a multiple of {HEAD_DIM}, the size of an attention head")
    token_id = tokenizer.convert_tokens_to_ids
    ends = {
        "bos_token_id": token_id(_END_OF_TEXT),
        "eos_token_id": token_id(_END_OF_TURN),
        "pad_token_id": token_id(_END_OF_TEXT),
    }
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": hidden_size,
            "intermediate_size": hidden_size * 2,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden_size // HEAD_DIM,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "type": "default",
                "mrope_section": [4, 6, 6],
                "rope_theta": 10000.0,
            },
            "initializer_range": initializer_range,
            "tie_word_embeddings": False,
            **ends,
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": vision_hidden_size,
            "intermediate_size": vision_hidden_size * 2,
            "num_heads": vision_hidden_size // HEAD_DIM,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "out_hidden_size": hidden_size,
            "fullatt_block_indexes": [vision_layers - 1],
            "tokens_per_second": 2,
            "initializer_range": initializer_range,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=False,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config).to(torch.float32)
    model.generation_config = GenerationConfig(
        bos_token_id=ends["bos_token_id"],
        eos_token_id=[ends["eos_token_id"], ends["bos_token_id"]],
        pad_token_id=ends["pad_token_id"],
    )
    return model


def build_tiny_vlm(path: str | Path, *, seed: int, vocab: int = 448, **sizes: Any) -> Path:
    """Write a tiny Qwen2.5-VL with random weights, its tokenizer and its processor into a folder.

    Args:
        path: the folder, which is created if it is missing.
        seed: seed of the weights.
        vocab: as for `build_tokenizer`.
        sizes: as for `build_model`: hidden_size, layers, vision_hidden_size, vision_layers, initializer_range.

    Returns:
        The folder.

    Raises:
        ValueError: as in `build_tokenizer` and `build_model`.
    """
    path = Path(path)
    tokenizer = build_tokenizer(vocab=vocab)
    build_model(tokenizer, seed=seed, **sizes).save_pretrained(path)
    build_processor(tokenizer).save_pretrained(path)
    return path


def main() -> None:
    """Run the command line: write one model with random weights."""
    parser = argparse.ArgumentParser(description="Build a tiny Qwen2.5-VL with random weights.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    build_tiny_vlm(arguments.out, seed=arguments.seed, hidden_size=arguments.hidden_size, layers=arguments.layers)
    print(f"wrote a Qwen2.5-VL with random weights to {arguments.out}")


if __name__ == "__main__":
    main()
