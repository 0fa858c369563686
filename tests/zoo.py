# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints with random weights of many architectures, rows for them, and an oracle that scores the rows.

tests/tiny_models.py has the five families that the real loop is tested with, and says how such models must be made.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from transformers.models.gemma3.image_processing_gemma3 import Gemma3ImageProcessor
from transformers.models.glm4v.image_processing_glm4v import Glm4vImageProcessor
from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from verl.utils.model import get_hf_auto_model_class

from examples.quickstart.tiny_vlm import build_tokenizer
from tests.tiny_models import FAMILIES, INITIALIZER_RANGE, PLACEHOLDERS, VOCAB, build_tiny
from verl_gndpo.families import family_of

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [12, 10, 10], "mrope_interleaved": True}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": INITIALIZER_RANGE,
    "rope_parameters": ROPE,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROUTED = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
DEEPSEEK = {
    **ROUTED,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LINEAR = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_hidden_layers": 4,
    # Linear attention adds up in chunks of 64 tokens, which begin elsewhere after a cached prompt. With larger weights,
    # routers amplify the rounding beyond 1e-4 nats.
    "initializer_range": INITIALIZER_RANGE / 2,
}
QWEN3_5 = {
    **LINEAR,
    "head_dim": 64,
    "rope_parameters": {**MROPE, "partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2]},
}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "chunk_size": 16, "n_groups": 2}
WINDOW = {"sliding_window": 6}

TEXT_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_untied": ("Qwen2", {}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 64}),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 64}),
    "mistral_window": ("Mistral", WINDOW),
    "seed_oss": ("SeedOss", {"head_dim": 64, "attention_bias": True}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {**WINDOW, "num_hidden_layers": 4}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "gemma3_text": ("Gemma3", {**WINDOW, "num_hidden_layers": 6, "head_dim": 32, "rope_parameters": None}),
    "glm4": ("Glm4", {"head_dim": 32}),
    "glm4_moe": ("Glm4Moe", {**ROUTED, "head_dim": 64, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    "hunyuan": ("HunYuanDenseV1", {"head_dim": 32}),
    "hy_v3": ("HYV3", {**EXPERTS, "head_dim": 64, "num_local_experts": 8}),
    "minimax_m2": ("MiniMaxM2", {"head_dim": 64, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 32}),
    "granite": ("Granite", {"logits_scaling": 6.0}),
    "cohere2": ("Cohere2", {**WINDOW, "num_hidden_layers": 4}),
    "gemma2": ("Gemma2", {**WINDOW, "head_dim": 32}),
    "gpt_oss": ("GptOss", {**WINDOW, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("DeepseekV2", {**DEEPSEEK, "q_lora_rank": None, "head_dim": 16}),
    "deepseek_v3": ("DeepseekV3", {**DEEPSEEK, "n_group": 2}),
    "moonlight": ("DeepseekV3", {**DEEPSEEK, "q_lora_rank": None}),
    "deepseek_v4": ("DeepseekV4", {"rope_parameters": None}),
    "glm_moe_dsa": ("GlmMoeDsa", {**DEEPSEEK, "index_topk": 8, "index_n_heads": 4, "index_head_dim": 32}),
    "qwen3_next": (
        "Qwen3Next",
        {**LINEAR, **EXPERTS, "head_dim": 64, "partial_rotary_factor": 0.5, "shared_expert_intermediate_size": 64},
    ),
    "nemotron_h": ("NemotronH", {**MAMBA, "num_hidden_layers": 4, "head_dim": 32}),
    "lfm2": ("Lfm2", {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}),
}
"""By name, the prefix of transformers' classes and what their configs have besides `TEXT`."""


def build(name: str, path: str | Path, *, seed: int = 3) -> Path:
    """Write a checkpoint with its tokenizer or processor.

    Args:
        name: one of `ZOO`.
        path: the folder; made if missing.
        seed: of the weights.

    Returns:
        The folder.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if name in FAMILIES:
        return build_tiny(name, path, seed=seed)
    tokenizer = build_tokenizer(vocab=VOCAB)
    if name in WITH_IMAGES:
        WITH_IMAGES[name](tokenizer, path, seed)
        return path
    prefix, settings = TEXT_ONLY[name]
    model_class = getattr(hf, f"{prefix}ForCausalLM")
    config_class = getattr(hf, f"{prefix}TextConfig", None) or getattr(hf, f"{prefix}Config")
    given = {key: value for key, value in (TEXT | _ends(tokenizer) | settings).items() if key != "rope_parameters"}
    rope = (TEXT | settings)["rope_parameters"]
    _write(
        model_class,
        config_class(**given, **({} if rope is None else {"rope_parameters": dict(rope)})),
        tokenizer,
        seed,
        path,
    )
    tokenizer.save_pretrained(path)
    return path


def _ends(tokenizer: hf.Qwen2Tokenizer) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _write(model_class: Any, config: Any, tokenizer: hf.Qwen2Tokenizer, seed: int, path: Path) -> None:
    config.architectures = [model_class.__name__]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms and biases begin as ones and zeros, and would hide that they are used.
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                elif not parameter.any():
                    parameter.normal_(std=INITIALIZER_RANGE)
            model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(list(PLACEHOLDERS))] = 0.0
    model.generation_config = hf.GenerationConfig(
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(path)


# --- models that see images -------------------------------------------------------------------------------------------


def _named_tokens(tokenizer: hf.Qwen2Tokenizer, path: Path, **names: str) -> hf.Qwen2Tokenizer:
    """Return the tokenizer with attributes for its image tokens, such as `image_token`, which processors read."""
    tokenizer.save_pretrained(path)
    return hf.Qwen2Tokenizer.from_pretrained(path, extra_special_tokens=names, chat_template=tokenizer.chat_template)


def _mark_ids(tokenizer: hf.Qwen2Tokenizer) -> dict[str, int]:
    """Return the ids of image, video, and the marks around them, by the names that Qwen's configs have."""
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}


def _size(edge: int, *, least: int = 4, most: int = 64) -> dict[str, int]:
    return {"shortest_edge": edge * edge * least, "longest_edge": edge * edge * most}


def _qwen3_vl_like(prefix: str, text: dict[str, Any], *, deep: bool) -> Callable[..., None]:
    """Return a builder of a relative of Qwen3-VL; `deep`: features of its tower's inner layers enter the decoder."""

    def make(tokenizer: hf.Qwen2Tokenizer, path: Path, seed: int) -> None:
        vision: dict[str, Any] = {
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "num_position_embeddings": 64,
            "initializer_range": INITIALIZER_RANGE,
        }
        if deep:
            vision["deepstack_visual_indexes"] = [0, 1]
        config = getattr(hf, f"{prefix}Config")(
            text_config={**TEXT, **_ends(tokenizer), "head_dim": 64, "rope_parameters": MROPE, **text},
            vision_config=vision,
            tie_word_embeddings=False,
            **_mark_ids(tokenizer),
        )
        _write(getattr(hf, f"{prefix}ForConditionalGeneration"), config, tokenizer, seed, path)
        hf.Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessor(
                patch_size=16, size=_size(32), image_mean=[0.5] * 3, image_std=[0.5] * 3
            ),
            video_processor=Qwen3VLVideoProcessor(size=_size(32)),
            tokenizer=tokenizer,
            chat_template=tokenizer.chat_template,
        ).save_pretrained(path)

    return make


def _qwen2_vl(tokenizer: hf.Qwen2Tokenizer, path: Path, seed: int) -> None:
    config = hf.Qwen2VLConfig(
        text_config={**TEXT, **_ends(tokenizer), "rope_parameters": {**ROPE, "mrope_section": [4, 6, 6]}},
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": TEXT["hidden_size"],
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "mlp_ratio": 2,
            "initializer_range": INITIALIZER_RANGE,
        },
        tie_word_embeddings=False,
        **_mark_ids(tokenizer),
    )
    _write(hf.Qwen2VLForConditionalGeneration, config, tokenizer, seed, path)
    hf.Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=_size(28)),
        video_processor=Qwen2VLVideoProcessor(size=_size(28)),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(path)


def _glm4v(tokenizer: hf.Qwen2Tokenizer, path: Path, seed: int) -> None:
    marks = _mark_ids(tokenizer)
    ends = {"start": marks.pop("vision_start_token_id"), "end": marks.pop("vision_end_token_id")}
    marks |= {f"{medium}_{end}_token_id": i for medium in ("image", "video") for end, i in ends.items()}
    config = hf.Glm4vConfig(
        text_config={**TEXT, **_ends(tokenizer), "rope_parameters": {**ROPE, "mrope_section": [4, 6, 6]}},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 2,
            "image_size": 224,
            "patch_size": 14,
            "out_hidden_size": TEXT["hidden_size"],
            "intermediate_size": 128,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": INITIALIZER_RANGE,
        },
        tie_word_embeddings=False,
        **marks,
    )
    _write(hf.Glm4vForConditionalGeneration, config, tokenizer, seed, path)
    hf.Glm4vProcessor(
        image_processor=Glm4vImageProcessor(size=_size(28, least=8, most=128)),
        video_processor=Glm4vVideoProcessor(size=_size(28, least=8, most=128)),
        tokenizer=_named_tokens(tokenizer, path, image_token=PLACEHOLDERS[0], video_token=PLACEHOLDERS[1]),
        chat_template=tokenizer.chat_template,
    ).save_pretrained(path)


TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "initializer_range": INITIALIZER_RANGE,
}
SQUARE = {"height": 56, "width": 56}
PINPOINTS = [[56, 56], [56, 112], [112, 56]]
BEGIN, END = "<|vision_start|>", "<|vision_end|>"
PLAIN_BEGIN = "<start_of_image>"
"""A mark of Gemma's processors, which take it for a regular expression."""


def _text_config(model_type: str, tokenizer: hf.Qwen2Tokenizer, **settings: Any) -> dict[str, Any]:
    return {"model_type": model_type, **TEXT, **_ends(tokenizer), **settings}


def _with_tokens(*added: str) -> hf.Qwen2Tokenizer:
    """Return a tokenizer that has special tokens instead of as many ordinary ones."""
    tokenizer = build_tokenizer(vocab=VOCAB - len(added))
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)}, replace_extra_special_tokens=False)
    return tokenizer


def _gemma3(tokenizer: hf.Qwen2Tokenizer, path: Path, seed: int) -> None:
    tokenizer = _with_tokens(PLAIN_BEGIN)
    marks = _mark_ids(tokenizer)
    text = _text_config("gemma3_text", tokenizer, **WINDOW, num_hidden_layers=6, head_dim=32)
    del text["rope_parameters"]
    config = hf.Gemma3Config(
        text_config=text,
        vision_config={"model_type": "siglip_vision_model", **TOWER},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids(PLAIN_BEGIN),
        eoi_token_index=marks["vision_end_token_id"],
        image_token_index=marks["image_token_id"],
        tie_word_embeddings=False,
    )
    _write(hf.Gemma3ForConditionalGeneration, config, tokenizer, seed, path)
    # The processor puts the image tokens behind the first mark.
    template = tokenizer.chat_template.replace(f"{BEGIN}{PLACEHOLDERS[0]}{END}", PLAIN_BEGIN)
    named = _named_tokens(tokenizer, path, image_token=PLACEHOLDERS[0], boi_token=PLAIN_BEGIN, eoi_token=END)
    named.chat_template = template
    hf.Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size=SQUARE), tokenizer=named, image_seq_length=4, chat_template=template
    ).save_pretrained(path)


def _llava_onevision(tokenizer: hf.Qwen2Tokenizer, path: Path, seed: int) -> None:
    marks = _mark_ids(tokenizer)
    config = hf.LlavaOnevisionConfig(
        text_config=_text_config("qwen2", tokenizer),
        vision_config={"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False},
        image_token_index=marks["image_token_id"],
        video_token_index=marks["video_token_id"],
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    _write(hf.LlavaOnevisionForConditionalGeneration, config, tokenizer, seed, path)
    hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS),
        tokenizer=tokenizer,
        video_processor=hf.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
        image_token=PLACEHOLDERS[0],
        video_token=PLACEHOLDERS[1],
    ).save_pretrained(path)


def _llava_next(tokenizer: hf.Qwen2Tokenizer, path: Path, seed: int) -> None:
    config = hf.LlavaNextConfig(
        text_config=_text_config("llama", tokenizer),
        vision_config={"model_type": "clip_vision_model", **TOWER},
        image_token_index=_mark_ids(tokenizer)["image_token_id"],
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    _write(hf.LlavaNextForConditionalGeneration, config, tokenizer, seed, path)
    hf.LlavaNextProcessor(
        image_processor=hf.LlavaNextImageProcessor(
            size={"shortest_edge": 56}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=_named_tokens(tokenizer, path, image_token=PLACEHOLDERS[0]),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(path)


def _mistral3(tokenizer: hf.Qwen2Tokenizer, path: Path, seed: int) -> None:
    config = hf.Mistral3Config(
        text_config=_text_config("mistral", tokenizer, sliding_window=None, head_dim=32),
        vision_config={"model_type": "pixtral", **TOWER, "head_dim": 32, "image_size": 112},
        image_token_index=_mark_ids(tokenizer)["image_token_id"],
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    _write(hf.Mistral3ForConditionalGeneration, config, tokenizer, seed, path)
    # The processor marks the end of each row of patches, and of the image.
    template = tokenizer.chat_template.replace(f"{BEGIN}{PLACEHOLDERS[0]}{END}", PLACEHOLDERS[0])
    named = _named_tokens(tokenizer, path)
    named.chat_template = template
    hf.PixtralProcessor(
        image_processor=hf.PixtralImageProcessor(size={"longest_edge": 112}, patch_size=14),
        tokenizer=named,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=template,
        image_token=PLACEHOLDERS[0],
        image_break_token=BEGIN,
        image_end_token=END,
    ).save_pretrained(path)


def _gemma4(tokenizer: hf.Qwen2Tokenizer, path: Path, seed: int) -> None:
    tokenizer = _with_tokens(PLAIN_BEGIN)
    marks = _mark_ids(tokenizer)
    text = _text_config("gemma4_text", tokenizer, **WINDOW, num_hidden_layers=6, head_dim=32)
    text["layer_types"] = ["sliding_attention", "full_attention"] * 3
    del text["rope_parameters"]
    text |= {"global_head_dim": 64, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": len(tokenizer)}
    text |= {"num_kv_shared_layers": 2, "final_logit_softcapping": 30.0, "use_bidirectional_attention": "vision"}
    config = hf.Gemma4Config(
        text_config=text,
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "patch_size": 8,
            "position_embedding_size": 64,
            "initializer_range": INITIALIZER_RANGE,
        },
        audio_config=None,
        boi_token_id=tokenizer.convert_tokens_to_ids(PLAIN_BEGIN),
        eoi_token_id=marks["vision_end_token_id"],
        image_token_id=marks["image_token_id"],
        video_token_id=marks["video_token_id"],
        audio_token_id=None,
        tie_word_embeddings=False,
    )
    _write(hf.Gemma4ForConditionalGeneration, config, tokenizer, seed, path)
    template = tokenizer.chat_template.replace(f"{BEGIN}{PLACEHOLDERS[0]}{END}", PLACEHOLDERS[0])
    named = _named_tokens(tokenizer, path, image_token=PLACEHOLDERS[0], boi_token=PLAIN_BEGIN, eoi_token=END)
    named.chat_template = template
    hf.Gemma4Processor(
        feature_extractor=hf.Gemma4AudioFeatureExtractor(),
        image_processor=hf.Gemma4ImageProcessor(patch_size=8, max_soft_tokens=70),
        tokenizer=named,
        video_processor=hf.Gemma4VideoProcessor(),
        chat_template=template,
        image_seq_length=70,
    ).save_pretrained(path)


def _smolvlm(tokenizer: hf.Qwen2Tokenizer, path: Path, seed: int) -> None:
    image = "<image>"
    tokenizer = _with_tokens(image, "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    config = hf.SmolVLMConfig(
        text_config=_text_config("llama", tokenizer),
        vision_config=TOWER,
        image_token_id=tokenizer.convert_tokens_to_ids(image),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    _write(hf.SmolVLMForConditionalGeneration, config, tokenizer, seed, path)
    # SmolVLM's own processor needs a package that spells numbers, for videos. This one makes the same image inputs.
    tokenizer.chat_template = tokenizer.chat_template.replace(f"{BEGIN}{PLACEHOLDERS[0]}{END}", image)
    size = {"longest_edge": 56}
    hf.Idefics3Processor(
        image_processor=hf.Idefics3ImageProcessor(size=size, max_image_size=size, do_image_splitting=False),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(path)


def _qwen2_5_omni_thinker(tokenizer: hf.Qwen2Tokenizer, path: Path, seed: int) -> None:
    marks = _mark_ids(tokenizer)
    config = hf.Qwen2_5OmniThinkerConfig(
        text_config={**TEXT, **_ends(tokenizer), "rope_parameters": {**ROPE, "mrope_section": [4, 6, 6]}},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "fullatt_block_indexes": [1],
            "initializer_range": INITIALIZER_RANGE,
        },
        audio_config={
            "d_model": 64,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 128,
            "output_dim": TEXT["hidden_size"],
        },
        image_token_index=marks["image_token_id"],
        video_token_index=marks["video_token_id"],
        vision_start_token_id=marks["vision_start_token_id"],
        vision_end_token_id=marks["vision_end_token_id"],
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=False,
    )
    _write(hf.Qwen2_5OmniThinkerForConditionalGeneration, config, tokenizer, seed, path)
    hf.Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=_size(28)),
        video_processor=Qwen2VLVideoProcessor(size=_size(28)),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(path)


MIMO_CONFIG = """
from transformers import Qwen2Config

class MiMoConfig(Qwen2Config):
    model_type = "mimo"
"""
MIMO_MODEL = """
from transformers import Qwen2ForCausalLM
from .configuration_mimo import MiMoConfig

class MiMoForCausalLM(Qwen2ForCausalLM):
    config_class = MiMoConfig
"""


def build_with_own_code(path: Path, *, seed: int) -> Path:
    """Write a Qwen2 that brings its own classes, as MiMo does; `trust_remote_code` loads it."""
    build("qwen2_untied", path, seed=seed)
    (path / "configuration_mimo.py").write_text(MIMO_CONFIG)
    (path / "modeling_mimo.py").write_text(MIMO_MODEL)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "mimo", "architectures": ["MiMoForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "configuration_mimo.MiMoConfig",
        "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM",
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


WITH_IMAGES: dict[str, Callable[[hf.Qwen2Tokenizer, Path, int], None]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl_moe": _qwen3_vl_like("Qwen3VLMoe", EXPERTS, deep=True),
    "qwen3_5": _qwen3_vl_like("Qwen3_5", QWEN3_5, deep=False),
    "qwen3_5_moe": _qwen3_vl_like(
        "Qwen3_5Moe", {**QWEN3_5, **EXPERTS, "shared_expert_intermediate_size": 64}, deep=False
    ),
    "glm4v": _glm4v,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "llava_onevision": _llava_onevision,
    "llava_next": _llava_next,
    "mistral3": _mistral3,
    "smolvlm": _smolvlm,
    "qwen2_5_omni_thinker": _qwen2_5_omni_thinker,
}
IMAGE_FAMILIES = {"qwen2_5_vl", "qwen3_vl", "internvl"} | WITH_IMAGES.keys()
ZOO = (*FAMILIES, *TEXT_ONLY, *WITH_IMAGES)

EAGER_ONLY = {"gpt_oss", "deepseek_v4", "gemma2", "glm_moe_dsa"}
"""Members whose attention torch's scaled_dot_product_attention does not compute: with it, transformers refuses to build
them or leaves out a part."""


def attention_of(name: str) -> str:
    """Return the attention implementation with which a member runs on the CPU."""
    return "eager" if name in EAGER_ONLY else "sdpa"


# --- rows and their oracle --------------------------------------------------------------------------------------------


def load_plain(path: str | Path) -> Any:
    """Load a checkpoint into transformers' own class, in float32, with eager attention."""
    model_class = get_hf_auto_model_class(hf.AutoConfig.from_pretrained(path))
    return model_class.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def rows_of(path: str | Path, images_per_prompt: list[int], response_lengths: list[list[int]]) -> list[dict]:
    """Make responses to prompts with images of different sizes, in mixed order, as verl's agent loop does.

    Args:
        path: a checkpoint with its processor, or with only its tokenizer.
        images_per_prompt: number of images of each prompt.
        response_lengths: for each prompt, the lengths of its responses in tokens.

    Returns:
        Rows {ids, positions, inputs, response}; see `tests.integration.helpers.make_rows`.
    """
    config = hf.AutoConfig.from_pretrained(path)
    processor = hf.AutoProcessor.from_pretrained(path)
    on_axes = "mrope_section" in (getattr(config.get_text_config(), "rope_parameters", None) or {})
    rng = np.random.default_rng(0)
    rows = []
    for n_images, lengths in zip(images_per_prompt, response_lengths, strict=True):
        images = [
            Image.fromarray(rng.integers(0, 255, (28 * rng.integers(2, 5), 28 * rng.integers(2, 5), 3), np.uint8))
            for _ in range(n_images)
        ]
        words = "how many? " * int(rng.integers(1, 6))
        content = [{"type": "image"}] * n_images + [{"type": "text", "text": words}] if n_images else words
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        pictures = {"images": images} if images else {}
        inputs = dict(processor(text=[text], return_tensors="pt", **pictures))
        prompt = inputs.pop("input_ids")[0]
        for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
            inputs.pop(name, None)
        for length in lengths:
            # Ordinary text tokens, because the special ones are at the end of the vocabulary.
            response = torch.from_numpy(rng.integers(0, 200, length))
            ids = torch.cat([prompt, response])
            place = torch.arange(len(ids))
            # The axes of images differ from that of text, whatever the model would count itself.
            axes = torch.stack([place, place // 2, place % 7, place]) if on_axes else place
            copies = {name: value.clone() for name, value in inputs.items()}
            rows.append({"ids": ids, "positions": axes, "inputs": copies, "response": response})
    return [rows[i] for i in rng.permutation(len(rows))]


def plain_log_probs(path: str | Path, rows: list[dict], temperature: float) -> list[torch.Tensor]:
    """Return each row's log-probs of its response tokens, in float64, from a forward pass of that row alone."""
    model = load_plain(path)
    placeholders = torch.tensor(list(family_of(model).placeholder_ids(model.config).values()), dtype=torch.long)
    accepted = inspect.signature(model.forward).parameters
    log_probs = []
    for row in rows:
        ids, positions, inputs = row["ids"][None], row["positions"], dict(row["inputs"])
        # transformers takes positions of rotary axes with or without the axis of text in front.
        positions = positions[None] if positions.dim() == 1 else positions[:, None]
        if inputs:
            kinds = torch.isin(ids, placeholders).long()
            inputs |= {name: kinds for name in ("token_type_ids", "mm_token_type_ids") if name in accepted}
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=positions, use_cache=False, **inputs).logits[0].double()
        scores = (logits[:-1] / temperature).log_softmax(-1)[-len(row["response"]) :]
        log_probs.append(scores.gather(-1, ids[0, -len(scores) :, None])[:, 0])
    return log_probs
