# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL and Qwen2.5-VL on micro-batches without images and videos.

A mixed data set meets one sooner or later, a text-only one at the first step. Qwen3-VL needs no patch.
"""

import inspect
import re
from types import ModuleType, SimpleNamespace
from typing import Any

from verl_gndpo.verl_patches.patch import patches, replace


def unpacks_itself(function: Any) -> bool:
    """Return whether a function of verl unpacks what the vision tower returns, wherever it calls the tower."""
    source = inspect.getsource(function)
    calls, unpacked = (len(re.findall(rf"{before}model\.\w+\(.*grid_thw=", source)) for before in ("", r"unpack_\w+\("))
    return calls == unpacked


@patches("qwen2_vl_text_only")
def unpack_text_only_output(qwen2_vl: ModuleType) -> bool:
    """Make `_get_input_embeds` accept a batch without images and videos.

    For such a batch, verl runs a dummy image through the vision tower, so that all FSDP ranks gather the same weights,
    and takes the mean of the result. The result was a tensor before transformers 5 and is an output object since.
    """
    original = qwen2_vl._get_input_embeds
    if unpacks_itself(original):
        return False

    def _get_input_embeds(
        model: Any,
        input_ids: Any,
        attention_mask: Any = None,
        pixel_values: Any = None,
        pixel_values_videos: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run stock verl's function; without images and videos, on a model whose vision tower returns a tensor."""
        if pixel_values is None and pixel_values_videos is None:
            tower = model.visual
            model = SimpleNamespace(
                config=model.config,
                get_input_embeddings=model.get_input_embeddings,
                visual=lambda *inputs, **options: qwen2_vl.unpack_visual_output(tower(*inputs, **options))[0],
            )
        return original(model, input_ids, attention_mask, pixel_values, pixel_values_videos, *args, **kwargs)

    replace(qwen2_vl, "_get_input_embeds", _get_input_embeds)
    return True
