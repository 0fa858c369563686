# SPDX-License-Identifier: Apache-2.0
"""Ranks that share a row of tokens: how heads are dealt out, and what of a decoder's inputs each rank gets.

tests/integration/test_teacher_engine.py runs them on four ranks.
"""

import pytest
import torch

from tests.unit.packed import RanksOfRow, groups_of, tiny
from verl_gndpo.families import QWEN_VL, UNDECLARED
from verl_gndpo.teacher.attention import SharedPromptAttention
from verl_gndpo.teacher.packing import Layout
from verl_gndpo.teacher.sequence_parallel import check_sequence_parallel, take_part

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("heads", "shared", "possible"),
    [(4, 2, [1, 2, 4]), (4, 1, [1, 2, 4]), (28, 4, [1, 2, 4, 28]), (12, 3, [1, 3, 6, 12]), (6, 6, [1, 2, 3, 6])],
)
def test_heads_are_dealt_out_evenly_or_not_at_all(heads, shared, possible):
    from transformers import Qwen2_5_VLConfig, Qwen2Config

    text = {"num_attention_heads": heads, "num_key_value_heads": shared}
    for config in (Qwen2Config(**text), Qwen2_5_VLConfig(text_config=text)):
        for ranks in range(1, 30):
            if ranks in possible:
                check_sequence_parallel(config, ranks)
                continue
            with pytest.raises(
                ValueError, match=rf"size={ranks} does not fit .* {heads} attention heads and {shared} of"
            ):
                check_sequence_parallel(config, ranks)


def test_each_rank_gets_its_part_of_every_input():
    """Of seven tokens, two ranks get four and three, and one more for padding."""
    groups = groups_of([(3, [2, 2])])
    visual = torch.tensor([[False, True, True, False, True, False, False]])
    features = [torch.arange(6.0).view(3, 2), torch.arange(6.0).view(3, 2) + 10]
    kwargs = {
        "input_ids": None,
        "inputs_embeds": torch.arange(7.0)[None, :, None],
        "position_ids": torch.arange(7).expand(4, 1, 7),
        "attention_mask": None,
        "use_cache": False,
        "visual_pos_masks": visual,
        "deepstack_visual_embeds": features,
    }
    expected = [
        ([0, 1, 2, 3], [False, True, True, False], slice(0, 2)),
        ([4, 5, 6, 0], [True, False, False, False], slice(2, 3)),
    ]
    for rank, (tokens, mask, seen) in enumerate(expected):
        layout = Layout(groups, CPU, RanksOfRow(2, rank))
        args, taken = take_part(layout, QWEN_VL, torch.nn.Identity(), (), kwargs)
        assert args == () and taken.keys() == kwargs.keys()
        assert taken["inputs_embeds"][0, :, 0].tolist() == tokens
        assert taken["position_ids"][3, 0].tolist() == tokens
        assert taken["visual_pos_masks"][0].tolist() == mask
        assert all(torch.equal(a, b[seen]) for a, b in zip(taken["deepstack_visual_embeds"], features, strict=True))
        # A family that does not declare its inputs is refused.
        with pytest.raises(NotImplementedError, match="Identity is given visual_pos_masks, which"):
            take_part(layout, UNDECLARED, torch.nn.Identity(), (), kwargs)


def test_inputs_that_cannot_be_cut_into_parts_are_refused():
    model = tiny("Qwen2")
    attention = SharedPromptAttention(model)
    tokens = torch.arange(5)[None]
    layout = Layout(groups_of([(3, [2])]), CPU, RanksOfRow(2, 0))
    with pytest.raises(NotImplementedError, match="Qwen2Model is given cache_position"), attention.attending(layout):
        model(input_ids=tokens, position_ids=tokens, use_cache=False, cache_position=tokens[0])
    with pytest.raises(NotImplementedError, match="input 0 without a name"), attention.attending(layout):
        model.model(tokens)
