# SPDX-License-Identifier: Apache-2.0
"""transformers' own InternVL, whose released checkpoints are called `-HF`. A run needs all four patches.

Not covered: videos, which vLLM and the agent loop refuse with an error. verl resizes every image to multiples of 28
pixels before any processor sees it, as for Qwen-VL. In conversations of several turns it leaves out the newline between
InternVL's turns. All parts of a run see the same images and the same ids, but they are not InternVL's own.
"""

import functools
from types import ModuleType, SimpleNamespace
from typing import Any

from verl_gndpo.families import INTERNVL, family_of
from verl_gndpo.verl_patches.patch import patches, replace


@patches("internvl_processor")
def accept_processor(tokenizer: ModuleType) -> bool:
    """Make `hf_processor` return InternVL's processor instead of None.

    verl accepts only the processors in its list of names. InternVL has one-dimensional positions, so its processor
    needs no `get_rope_index`.
    """
    original = tokenizer.hf_processor

    def hf_processor(name_or_path: str, **kwargs: Any) -> Any:
        """Run stock verl's function, except for a checkpoint of transformers' own InternVL."""
        from transformers import AutoConfig, AutoProcessor

        processor: Any = None
        try:
            config = AutoConfig.from_pretrained(name_or_path, **kwargs)
            if family_of(config) is INTERNVL:
                processor = AutoProcessor.from_pretrained(name_or_path, **kwargs)
        except Exception:  # Whatever is wrong with a checkpoint, stock verl has an answer to it.
            pass
        if not _is_internvl(processor):
            return original(name_or_path, **kwargs)
        processor.config = config
        return processor

    replace(tokenizer, "hf_processor", hf_processor)
    return True


@patches("internvl_pixel_values")
def cut_images_into_tiles(agent_loop: ModuleType) -> bool:
    """Make the agent loop's worker cut InternVL's images into tiles.

    verl calls the processor on a sequence's text without special tokens. InternVL's processor collects tiles by the
    placeholders in the text, and raises a ValueError when their number is not the number of images.
    """
    worker_class = agent_loop.AgentLoopWorker
    original = worker_class._compute_multi_modal_inputs

    def _compute_multi_modal_inputs(self: Any, output: Any, input_ids: Any) -> Any:
        """Run stock verl's method; with InternVL, on a text with one placeholder per image."""
        if _is_internvl(self.processor):
            text = self.processor.image_token * len((output.multi_modal_data or {}).get("images") or [])
            self = SimpleNamespace(
                processor=self.processor,
                tokenizer=SimpleNamespace(decode=lambda *_, **__: text),
                _get_mm_processor_kwargs=self._get_mm_processor_kwargs,
            )
        return original(self, output, input_ids)

    worker_class._compute_multi_modal_inputs = _compute_multi_modal_inputs
    return True


@patches("internvl_placeholders")
def collapse_placeholders(rollout_utils: ModuleType) -> bool:
    """Make `qwen2_5_vl_dedup_image_tokens` collapse InternVL's images for vLLM, too.

    vLLM replaces one `<IMG_CONTEXT>` with `<img>`, an image's tokens and `</img>`, so it must be given only that one.
    """
    original = rollout_utils.qwen2_5_vl_dedup_image_tokens
    np = rollout_utils.np

    def qwen2_5_vl_dedup_image_tokens(prompt_ids: list[int], processor: Any) -> list[int]:
        """Run stock verl's function; with InternVL, return ids with one bare `<IMG_CONTEXT>` per image."""
        if not _is_internvl(processor):
            return original(prompt_ids, processor)
        ids = np.array(prompt_ids)
        image = ids == processor.image_token_id
        keep = np.ones(len(ids), dtype=bool)
        keep[1:] &= ~(image[1:] & image[:-1])
        keep[:-1] &= ~((ids[:-1] == processor.start_image_token_id) & image[1:])
        keep[1:] &= ~((ids[1:] == processor.end_image_token_id) & image[:-1])
        return ids[keep].tolist()

    replace(rollout_utils, "qwen2_5_vl_dedup_image_tokens", qwen2_5_vl_dedup_image_tokens)
    return True


@patches("internvl_text_only")
def prepare_model(monkey_patch: ModuleType) -> bool:
    """Make `apply_monkey_patch` prepare InternVL as it does Qwen-VL.

    A micro-batch without images then runs an empty tile through the vision tower, so that all FSDP ranks gather the
    same weights. Two settings raise NotImplementedError: fused kernels, whose forward would drop the images without an
    error, and sequence parallelism, which would not slice the embeddings.
    """
    original = monkey_patch.apply_monkey_patch

    def run_vision_tower_always(model_class: Any) -> None:
        """Make the forward pass of `InternVLModel`, given as the class, run an empty tile where it gets no image."""
        original_forward = model_class.forward
        if getattr(original_forward, "runs_vision_tower", False):
            return

        @functools.wraps(original_forward)
        def forward(
            self: Any, input_ids: Any = None, pixel_values: Any = None, *, inputs_embeds: Any = None, **kwargs: Any
        ) -> Any:
            if pixel_values is None and inputs_embeds is None:
                config = self.config.vision_config
                inputs_embeds, input_ids = self.get_input_embeddings()(input_ids), None
                tile = inputs_embeds.new_zeros((1, config.num_channels, *config.image_size))
                features = self.get_image_features(pixel_values=tile, return_dict=True).pooler_output
                inputs_embeds = inputs_embeds + 0.0 * features.mean().to(inputs_embeds.dtype)
            return original_forward(
                self, input_ids=input_ids, pixel_values=pixel_values, inputs_embeds=inputs_embeds, **kwargs
            )

        vars(forward)["runs_vision_tower"] = True
        model_class.forward = forward

    def apply_monkey_patch(
        model: Any,
        ulysses_sp_size: int = 1,
        use_remove_padding: bool = True,
        use_fused_kernels: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run stock verl's function, after InternVL's own part of it."""
        if family_of(model) is INTERNVL:
            if ulysses_sp_size > 1:
                raise NotImplementedError("InternVL does not support Ulysses sequence parallelism yet")
            if use_fused_kernels:
                raise NotImplementedError("InternVL does not support use_fused_kernels yet")
            from transformers.models.internvl.modeling_internvl import InternVLModel

            run_vision_tower_always(InternVLModel)
        return original(model, ulysses_sp_size, use_remove_padding, use_fused_kernels, *args, **kwargs)

    replace(monkey_patch, "apply_monkey_patch", apply_monkey_patch)
    return True


def _is_internvl(processor: Any) -> bool:
    """Return whether it is transformers' InternVLProcessor. Asks by name, as verl does, which imports nothing."""
    return type(processor).__name__ == "InternVLProcessor"
