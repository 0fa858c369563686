# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints with random weights of every architecture that the tests cover, made without a download.

verl's rollout never samples from the padded tail of a vocabulary, nor an image placeholder. A trained model gives them
next to no probability anyway, but a random model gives them as much as other tokens, so that the rollout's
probabilities could not equal the actor's. Therefore no vocabulary is padded, and placeholders are made improbable.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from examples.quickstart.tiny_vlm import build_tiny_vlm, build_tokenizer

VOCAB = 370
"""Ordinary tokens of `build_tokenizer`. Its 14 special tokens make it a multiple of 64, so that no model pads it."""
PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>")
INITIALIZER_RANGE = 0.2
"""Makes next-token distributions far from uniform, so that a wrong position or image shows in every log-prob."""

_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": INITIALIZER_RANGE,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def build_tiny(family: str, path: str | Path, *, seed: int, layers: int = 2) -> Path:
    """Write a checkpoint with its tokenizer or processor; transformers, vLLM and verl load it by its path.

    Args:
        family: a key of `FAMILIES`, or "uneven": a `qwen3` that two and three ranks share unevenly.
        path: the folder; made if missing.
        seed: of the weights.
        layers: of the language model.

    Returns:
        The folder.
    """
    path = Path(path)
    _BUILDERS[family](path, seed, layers)
    return path


def _qwen2_5_vl(path: Path, seed: int, layers: int) -> None:
    build_tiny_vlm(path, seed=seed, layers=layers, vocab=VOCAB)
    weights = load_file(path / "model.safetensors")
    tokenizer = Qwen2Tokenizer.from_pretrained(path)
    assert len(weights["lm_head.weight"]) == len(tokenizer)
    weights["lm_head.weight"][tokenizer.convert_tokens_to_ids(PLACEHOLDERS)] = 0.0
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def _qwen3_vl(path: Path, seed: int, layers: int) -> None:
    tokenizer = build_tokenizer(vocab=VOCAB)
    token_id = tokenizer.convert_tokens_to_ids
    text = _TEXT | {"vocab_size": len(tokenizer), "num_hidden_layers": layers, "pad_token_id": tokenizer.pad_token_id}
    text |= {
        "head_dim": 64,
        "rope_parameters": _ROPE | {"mrope_section": [12, 10, 10], "mrope_interleaved": True},
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": _TEXT["hidden_size"],
            # A grid of 8 x 8: the tests' images are larger or smaller, so that it is interpolated.
            "num_position_embeddings": 64,
            # As in released models, features of early and middle layers enter the first layers of the language model.
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": INITIALIZER_RANGE,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=False,
        architectures=["Qwen3VLForConditionalGeneration"],
    )
    _write(Qwen3VLForConditionalGeneration, config, tokenizer, seed, path)
    size = {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 64}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=16, size=dict(size), image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
        ),
        video_processor=Qwen3VLVideoProcessor(size=dict(size)),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(path)


def _qwen2(path: Path, seed: int, layers: int) -> None:
    # Input and output embeddings are tied, as in the released models below 7B.
    _text_only(Qwen2ForCausalLM, Qwen2Config(**_TEXT, num_hidden_layers=layers, tie_word_embeddings=True), seed, path)


def _qwen3(path: Path, seed: int, layers: int) -> None:
    # Heads larger than hidden_size / heads, as in the released models.
    _text_only(Qwen3ForCausalLM, Qwen3Config(**_TEXT, num_hidden_layers=layers, head_dim=64), seed, path)


def _uneven(path: Path, seed: int, layers: int) -> None:
    # Two and three ranks get shards of different sizes of every layer's norms and of three of its projections.
    sizes = _TEXT | {"hidden_size": 67, "intermediate_size": 131}
    _text_only(Qwen3ForCausalLM, Qwen3Config(**sizes, num_hidden_layers=layers, head_dim=64), seed, path)


def _text_only(model_class: type[PreTrainedModel], config: Qwen2Config | Qwen3Config, seed: int, path: Path) -> None:
    tokenizer = build_tokenizer(vocab=VOCAB)
    config.vocab_size = len(tokenizer)
    config.rope_parameters = dict(_ROPE)
    config.bos_token_id = config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.architectures = [model_class.__name__]
    _write(model_class, config, tokenizer, seed, path)
    tokenizer.save_pretrained(path)


def _write(model_class: type[PreTrainedModel], config, tokenizer: Qwen2Tokenizer, seed: int, path: Path) -> None:
    assert len(tokenizer) % 64 == 0, "the vocabulary would be padded"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(PLACEHOLDERS)] = 0.0
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(path)


def _internvl(path: Path, seed: int, layers: int) -> None:
    from tests.tiny_internvl import build_tiny_internvl

    build_tiny_internvl(path, seed=seed, layers=layers)


FAMILIES = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
_BUILDERS = FAMILIES | {"uneven": _uneven}
