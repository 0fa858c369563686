# SPDX-License-Identifier: Apache-2.0
"""Run-time counterparts of `patches/verl-0.9.1/`: bugs of stock verl that a run with this plugin would hit.

Each fix takes the verl module that it corrects. `apply()` hands it over as soon as that module is imported, so that
importing this file costs nothing, and a module that a process never imports is never touched.
`patches/README.md` says what breaks without each of them.
"""

import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import wrapt

FIXED_VERL_VERSION = "0.9.1"
INTERNVL = "internvl"
"""`model_type` of transformers' own InternVL, whose released checkpoints are called `-HF`."""


def apply():
    """Have every fix applied to its module on import, or now where verl has imported it already. Safe to repeat."""
    for module_name, fix in FIXES.items():
        wrapt.register_post_import_hook(fix, module_name)


def fix_nested_position_ids(tensordict_utils):
    """Make `maybe_fix_3d_position_ids` of `verl.utils.tensordict_utils` repack mRoPE ids instead of relabelling them.

    Every engine calls it before it splits a batch. Rows are `(num_axes, seq_len)`; what the engines read is
    `values (num_axes, total_tokens)` with `offsets` in tokens and `_ragged_idx == 2`. Stock verl only sets that index,
    which is wrong for values that are packed along `num_axes`, as they are when all rows have one length.

    Returns:
        Whether the module was changed: only verl 0.9.1 is, because another version may have a fix of its own.
    """
    if _verl_version(tensordict_utils) != FIXED_VERL_VERSION:
        return False

    torch = tensordict_utils.torch

    def maybe_fix_3d_position_ids(data):
        """Repack `data["position_ids"]` along the sequence, in place in the TensorDict, if it is 3D and jagged."""
        position_ids = data.get("position_ids", None)
        if position_ids is None or position_ids.dim() != 3 or position_ids.layout != torch.jagged:
            return
        if position_ids._ragged_idx == 2:
            return
        # Index 1 is true of a batch of equally long rows, and false after TensorDict.consolidate and pickle, which
        # reset it. Offsets end where the packed dimension ends, and so tell which.
        if position_ids.values().size(0) == position_ids.offsets()[-1]:
            rows = list(position_ids.unbind())
            data["position_ids"] = tensordict_utils.nested_tensor_from_tensor_list(rows, ragged_idx=2)
        else:
            position_ids._ragged_idx = 2

    _replace(tensordict_utils, "maybe_fix_3d_position_ids", maybe_fix_3d_position_ids)
    return True


def fix_text_only_batches(qwen2_vl):
    """Make `_get_input_embeds` of `verl.models.transformers.qwen2_vl` accept a batch without images and videos.

    It runs such a batch's dummy image through the vision tower, so that all FSDP ranks gather the same weights, and
    takes the mean of what comes back. That was a tensor before transformers 5 and is an output object since.

    Returns:
        Whether the module was changed: only verl 0.9.1 is, because another version may have a fix of its own.
    """
    if _verl_version(qwen2_vl) != FIXED_VERL_VERSION:
        return False

    original = qwen2_vl._get_input_embeds

    def _get_input_embeds(
        model, input_ids, attention_mask=None, pixel_values=None, pixel_values_videos=None, *args, **kwargs
    ):
        """Stock verl's function; without images and videos, on a model whose vision tower returns a tensor."""
        if pixel_values is None and pixel_values_videos is None:
            tower = model.visual
            model = SimpleNamespace(
                config=model.config,
                get_input_embeddings=model.get_input_embeddings,
                visual=lambda *inputs, **options: qwen2_vl.unpack_visual_output(tower(*inputs, **options))[0],
            )
        return original(model, input_ids, attention_mask, pixel_values, pixel_values_videos, *args, **kwargs)

    _replace(qwen2_vl, "_get_input_embeds", _get_input_embeds)
    return True


def accept_internvl_processor(tokenizer):
    """Make `hf_processor` of `verl.utils.tokenizer.tokenizer` return InternVL's processor instead of None.

    It serves the processors that it knows by name. InternVL has one-dimensional positions, so that there is no
    `get_rope_index` to bind.

    Returns:
        Whether the module was changed: only verl 0.9.1 is, because another version may have a fix of its own.
    """
    if _verl_version(tokenizer) != FIXED_VERL_VERSION:
        return False

    original = tokenizer.hf_processor

    def hf_processor(name_or_path, **kwargs):
        """Stock verl's function, and InternVL's processor for a checkpoint of transformers' own InternVL."""
        from transformers import AutoConfig, AutoProcessor

        try:
            config = AutoConfig.from_pretrained(name_or_path, **kwargs)
            processor = AutoProcessor.from_pretrained(name_or_path, **kwargs) if config.model_type == INTERNVL else None
        except Exception:  # Whatever is wrong with a checkpoint, stock verl has an answer to it.
            processor = None
        if not _is_internvl(processor):
            return original(name_or_path, **kwargs)
        processor.config = config
        return processor

    _replace(tokenizer, "hf_processor", hf_processor)
    return True


def fix_internvl_pixel_values(agent_loop):
    """Make the worker of `verl.experimental.agent_loop.agent_loop` cut InternVL's images into tiles.

    It calls the processor on a sequence's text without special tokens. InternVL's collects tiles by the placeholders
    in the text, and raises a ValueError when there are not as many as images.

    Returns:
        Whether the module was changed: only verl 0.9.1 is, because another version may have a fix of its own.
    """
    if _verl_version(agent_loop) != FIXED_VERL_VERSION:
        return False

    worker_class = agent_loop.AgentLoopWorker
    original = worker_class._compute_multi_modal_inputs

    def _compute_multi_modal_inputs(self, output, input_ids):
        """Stock verl's method; with InternVL, on a text of as many placeholders as there are images."""
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


def collapse_internvl_placeholders(rollout_utils):
    """Make `qwen2_5_vl_dedup_image_tokens` of `verl.workers.rollout.utils` collapse InternVL's images for vLLM, too.

    vLLM replaces one `<IMG_CONTEXT>` with `<img>`, an image's tokens and `</img>`, so that it must get the one only.

    Returns:
        Whether the module was changed: only verl 0.9.1 is, because another version may have a fix of its own.
    """
    if _verl_version(rollout_utils) != FIXED_VERL_VERSION:
        return False

    original = rollout_utils.qwen2_5_vl_dedup_image_tokens
    np = rollout_utils.np

    def qwen2_5_vl_dedup_image_tokens(prompt_ids, processor):
        """Stock verl's function; with InternVL, ids with one `<IMG_CONTEXT>` an image and without its frame."""
        if not _is_internvl(processor):
            return original(prompt_ids, processor)
        ids = np.array(prompt_ids)
        image = ids == processor.image_token_id
        keep = np.ones(len(ids), dtype=bool)
        keep[1:] &= ~(image[1:] & image[:-1])
        keep[:-1] &= ~((ids[:-1] == processor.start_image_token_id) & image[1:])
        keep[1:] &= ~((ids[1:] == processor.end_image_token_id) & image[:-1])
        return ids[keep].tolist()

    _replace(rollout_utils, "qwen2_5_vl_dedup_image_tokens", qwen2_5_vl_dedup_image_tokens)
    return True


def fix_internvl_text_only_batches(monkey_patch):
    """Make `apply_monkey_patch` of `verl.models.transformers.monkey_patch` prepare InternVL as it does Qwen-VL.

    A micro-batch without images then runs an empty tile through the vision tower, so that all FSDP ranks gather the
    same weights. Fused kernels, whose forward would drop the images without a word, and sequence parallelism, which
    would not slice the embeddings, raise NotImplementedError.

    Returns:
        Whether the module was changed: only verl 0.9.1 is, because another version may have a fix of its own.
    """
    if _verl_version(monkey_patch) != FIXED_VERL_VERSION:
        return False

    original = monkey_patch.apply_monkey_patch

    def apply_monkey_patch(model, ulysses_sp_size=1, use_remove_padding=True, use_fused_kernels=False, *args, **kwargs):
        """Stock verl's function, and InternVL's own part of it."""
        if model.config.model_type == INTERNVL:
            if ulysses_sp_size > 1:
                raise NotImplementedError("InternVL does not support Ulysses sequence parallelism yet")
            if use_fused_kernels:
                raise NotImplementedError("InternVL does not support use_fused_kernels yet")
            from transformers.models.internvl.modeling_internvl import InternVLModel

            _run_vision_tower_always(InternVLModel)
        return original(model, ulysses_sp_size, use_remove_padding, use_fused_kernels, *args, **kwargs)

    _replace(monkey_patch, "apply_monkey_patch", apply_monkey_patch)
    return True


def _run_vision_tower_always(model_class):
    """Have the forward pass of `model_class`, an `InternVLModel`, run an empty tile where it gets no image."""
    original = model_class.forward
    if getattr(original, "_runs_vision_tower", False):
        return

    @functools.wraps(original)
    def forward(self, input_ids=None, pixel_values=None, *, inputs_embeds=None, **kwargs):
        if pixel_values is None and inputs_embeds is None:
            config = self.config.vision_config
            inputs_embeds, input_ids = self.get_input_embeddings()(input_ids), None
            tile = inputs_embeds.new_zeros((1, config.num_channels, *config.image_size))
            features = self.get_image_features(pixel_values=tile, return_dict=True).pooler_output
            inputs_embeds = inputs_embeds + 0.0 * features.mean().to(inputs_embeds.dtype)
        return original(self, input_ids=input_ids, pixel_values=pixel_values, inputs_embeds=inputs_embeds, **kwargs)

    forward._runs_vision_tower = True
    model_class.forward = forward


def _is_internvl(processor):
    """Whether it is transformers' InternVLProcessor; asked by name, as verl does, and without importing it."""
    return type(processor).__name__ == "InternVLProcessor"


def _verl_version(module):
    """The version of the verl that `module` belongs to: not always the installed one, as importlib.metadata has it."""
    files = (folder / "version" / "version" for folder in Path(module.__file__).parents)
    return next(file for file in files if file.is_file()).read_text().strip()


def _replace(module, name, function):
    """Replace `module.name`, also where a verl module has bound it already by `from module import name`."""
    original = getattr(module, name)
    setattr(module, name, function)
    # Another plugin, loaded before this one, may have imported verl's workers.
    for importer_name, importer in list(sys.modules.items()):
        # vars(): getattr on a lazily loaded package would import what it looks for.
        if importer_name.startswith("verl.") and vars(importer).get(name) is original:
            setattr(importer, name, function)


FIXES = {
    "verl.utils.tensordict_utils": fix_nested_position_ids,
    "verl.models.transformers.qwen2_vl": fix_text_only_batches,
    "verl.utils.tokenizer.tokenizer": accept_internvl_processor,
    "verl.experimental.agent_loop.agent_loop": fix_internvl_pixel_values,
    "verl.workers.rollout.utils": collapse_internvl_placeholders,
    "verl.models.transformers.monkey_patch": fix_internvl_text_only_batches,
}
