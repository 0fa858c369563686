# SPDX-License-Identifier: Apache-2.0
"""Position ids of Qwen-VL models (mRoPE) in batches whose sequences all have one length.

Responses that all reach `max_response_length` on prompts of one length, or one sequence per worker, make such a batch.

Not covered: `concat_tensordict` of two batches of which the first has equal lengths and the second others. In verl
0.9.1 only rollout-skip replays with `parameter_sync_step` above 1 do that. It fails with an error, as in stock verl.
"""

from types import ModuleType
from typing import Any

from verl_gndpo.verl_patches.patch import patches, replace


@patches("position_ids")
def repack_position_ids(tensordict_utils: ModuleType) -> bool:
    """Make `maybe_fix_3d_position_ids` repack the ids along the sequence instead of relabelling them.

    Every engine calls it before it splits a batch. Rows are `(num_axes, seq_len)`. The engines read `values
    (num_axes, total_tokens)` with `offsets` in tokens and `_ragged_idx == 2`. Stock verl only sets that index, which
    is wrong for values that are packed along `num_axes`, as they are when all rows have one length.
    """
    torch = tensordict_utils.torch

    def maybe_fix_3d_position_ids(data: Any) -> None:
        """Repack `data["position_ids"]` along the sequence, in place in the TensorDict, if it is 3D and jagged."""
        position_ids = data.get("position_ids", None)
        if position_ids is None or position_ids.dim() != 3 or position_ids.layout != torch.jagged:
            return
        if position_ids._ragged_idx == 2:
            return
        # Index 1 is true for a batch of equally long rows. It is false after TensorDict.consolidate and pickle, which
        # reset it. The offsets tell which: they end at the size of the packed dimension.
        if position_ids.values().size(0) == position_ids.offsets()[-1]:
            rows = list(position_ids.unbind())
            data["position_ids"] = tensordict_utils.nested_tensor_from_tensor_list(rows, ragged_idx=2)
        else:
            position_ids._ragged_idx = 2

    replace(tensordict_utils, "maybe_fix_3d_position_ids", maybe_fix_3d_position_ids)
    return True
