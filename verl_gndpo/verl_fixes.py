# SPDX-License-Identifier: Apache-2.0
"""Run-time counterparts of `patches/verl-0.9.1/`: bugs of stock verl that a run with this plugin would hit.

Each fix takes the verl module that it corrects. `apply()` hands it over as soon as that module is imported, so that
importing this file costs nothing, and a module that a process never imports is never touched.
`patches/README.md` says what breaks without each of them.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import wrapt

FIXED_VERL_VERSION = "0.9.1"


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
}
