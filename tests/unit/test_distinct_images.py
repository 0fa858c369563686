# SPDX-License-Identifier: Apache-2.0
"""Vision towers that encode each distinct image of a call once, against towers that encode every copy."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_gndpo.teacher.distinct_images import DistinctImages, encode_distinct_images


class Tower(torch.nn.Module):
    """Like a Qwen-VL tower, takes patches and returns rows of patches, rows of merged tokens, and a list of these."""

    spatial_merge_size = 2

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, pixel_values, grid_thw):
        self.seen.append(len(pixel_values))
        merged = pixel_values.view(-1, 4, pixel_values.shape[-1]).mean(1)
        return {"last_hidden_state": pixel_values * 2, "pooler_output": merged, "deepstack": [merged, merged + 1]}


class TileTower(torch.nn.Module):
    """Like InternVL's tower, takes and returns one row per tile."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, pixel_values, bool_masked_pos=None, **options):
        self.seen.append(len(pixel_values))
        tokens = pixel_values.flatten(2).transpose(1, 2)
        return {"last_hidden_state": tokens * 2, "hidden_states": (tokens, tokens + 1), "attentions": None}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_each_distinct_image_is_encoded_once(order):
    """The output equals that of encoding every copy, however often images repeat."""
    torch.manual_seed(0)
    grids = torch.tensor([[1, 2, 2], [1, 2, 4], [1, 4, 2], [1, 2, 2]])
    images = [torch.randn(int(grid.prod()), 3) for grid in grids]
    pixels, grid = torch.cat([images[i] for i in order]), grids[order]
    expected = Tower()(pixels, grid_thw=grid)
    tower = Tower()
    DistinctImages(tower)
    encoded = tower(pixels, grid_thw=grid)
    assert tower.seen == [sum(len(images[i]) for i in set(order))]
    for key in ("last_hidden_state", "pooler_output"):
        assert torch.equal(encoded[key], expected[key])
    assert all(torch.equal(a, b) for a, b in zip(encoded["deepstack"], expected["deepstack"], strict=True))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_each_distinct_tile_is_encoded_once(order):
    torch.manual_seed(0)
    tiles = torch.randn(4, 3, 2, 2)[order]
    expected = TileTower()(tiles)
    tower = TileTower()
    DistinctImages(tower)
    encoded = tower(pixel_values=tiles, return_dict=True)
    assert tower.seen == [len(set(order))]
    assert torch.equal(encoded["last_hidden_state"], expected["last_hidden_state"]) and encoded["attentions"] is None
    assert all(torch.equal(a, b) for a, b in zip(encoded["hidden_states"], expected["hidden_states"], strict=True))


def test_tiles_that_come_with_a_tensor_of_their_own_are_all_encoded():
    """That tensor may make equal tiles differ."""
    tower = TileTower()
    DistinctImages(tower)
    tower(torch.zeros(3, 3, 2, 2), bool_masked_pos=torch.eye(3))
    assert tower.seen == [3]


def test_output_that_belongs_to_no_image_is_refused():
    class Pooling(TileTower):
        def forward(self, pixel_values):
            return torch.cat([pixel_values, pixel_values.mean(0, keepdim=True)])

    tower = Pooling()
    DistinctImages(tower)
    with pytest.raises(ValueError, match=r"2 rows for images that have \[1\]"):
        tower(torch.zeros(3, 3, 2, 2))


def model_with(model_type, name, tower):
    """Build a model with what the code reads of a Hugging Face model: its type, and a tower of this name."""
    model = torch.nn.Module()
    model.config = SimpleNamespace(model_type=model_type)
    model.model = torch.nn.Module()
    model.model.add_module(name, tower)
    return model


@pytest.mark.parametrize(
    ("model_type", "name", "tower", "inputs", "encoded"),
    [
        (
            "qwen2_vl",
            "visual",
            Tower,
            {"pixel_values": torch.zeros(8, 3), "grid_thw": torch.tensor([[1, 2, 2]] * 2)},
            4,
        ),
        ("internvl", "vision_tower", TileTower, {"pixel_values": torch.zeros(2, 3, 2, 2)}, 1),
        ("internvl", "audio_tower", TileTower, {"pixel_values": torch.zeros(2, 3, 2, 2)}, 2),
    ],
)
def test_the_tower_is_the_one_that_the_family_declares(model_type, name, tower, inputs, encoded):
    model = model_with(model_type, name, tower())
    encode_distinct_images(model)
    found = model.model.get_submodule(name)
    found(**inputs)
    assert found.seen == [encoded]


def test_a_tower_whose_inputs_cannot_be_cut_into_images_stays_as_it_is():
    class Ragged(torch.nn.Module):
        def forward(self, hidden_states, cu_seqlens):
            return hidden_states

    model = model_with("qwen2_vl", "visual", Ragged())
    encode_distinct_images(model)
    assert torch.equal(model.model.visual(torch.zeros(4, 2), torch.tensor([0, 2, 4])), torch.zeros(4, 2))


def test_different_images_with_equal_sums_are_both_encoded():
    images = torch.tensor([[1.0], [2.0], [3.0], [4.0], [4.0], [3.0], [2.0], [1.0]])
    tower = Tower()
    DistinctImages(tower)
    encoded = tower(images, grid_thw=torch.tensor([[1, 2, 2], [1, 2, 2]]))
    assert torch.equal(encoded["last_hidden_state"], images * 2) and tower.seen == [8]
