# SPDX-License-Identifier: Apache-2.0
"""GLM-4.1V with transformers 5, whose vision tower returns an output object and no longer a tensor."""

from types import ModuleType, SimpleNamespace
from typing import Any

from verl_gndpo.verl_patches.patch import patches, replace
from verl_gndpo.verl_patches.qwen2_vl import unpacks_itself


@patches("glm4v_vision_output")
def unpack_vision_output(glm4v: ModuleType) -> bool:
    """Make `_get_input_embeds` take the merged features out of what the vision tower returns."""
    original = glm4v._get_input_embeds
    if unpacks_itself(original):
        return False

    def _get_input_embeds(model: Any, *args: Any, **kwargs: Any) -> Any:
        """Run stock verl's function on a model whose vision tower returns a tensor."""
        from verl.utils.transformers_compat import unpack_visual_output

        tower = model.visual

        def visual(*inputs: Any, **options: Any) -> Any:
            return unpack_visual_output(tower(*inputs, **options))[0]

        visual.dtype = tower.dtype  # type: ignore[attr-defined]  # verl converts pixels to it
        seen = SimpleNamespace(config=model.config, get_input_embeddings=model.get_input_embeddings, visual=visual)
        return original(seen, *args, **kwargs)

    replace(glm4v, "_get_input_embeds", _get_input_embeds)
    return True
