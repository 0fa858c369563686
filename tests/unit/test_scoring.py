# SPDX-License-Identifier: Apache-2.0
"""The parts of response-only scoring that need no model; the whole of it is in integration/test_teacher_worker.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_gndpo.teacher.scoring import DistinctImages, ScoringHead, encode_distinct_images, token_log_probs


@given(st.integers(1, 30), st.lists(st.integers(0, 29), max_size=40), st.integers(1, 7), st.booleans())
@settings(max_examples=100, deadline=None)
def test_blocks_of_logits_equal_all_logits(length, rows, chunk, bias):
    """Any rows in any order, any chunk: the log-probs of a full log-softmax."""
    torch.manual_seed(0)
    rows = torch.tensor(rows, dtype=torch.int64) % length
    ids = torch.randint(0, 11, (len(rows),))
    hidden = torch.randn(1, length, 4)
    lm_head = torch.nn.Linear(4, 11, bias=bias)
    with torch.no_grad():
        expected = (lm_head(hidden)[0].double() / 0.7).log_softmax(-1)[rows, ids]
        head = ScoringHead(lm_head, chunk)
        with head.scoring(rows, ids, 0.7):
            scored = lm_head(hidden)
    torch.testing.assert_close(scored[0, :, 0].double(), expected, atol=1e-6, rtol=1e-6)
    # Outside of the context it is an ordinary projection again.
    assert lm_head(hidden).shape == (1, length, 11)


@pytest.mark.parametrize("columns", [1, 3, 999, 1000])
def test_log_probs_of_bfloat16_logits_are_computed_in_float32(columns):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8).bfloat16(), torch.randn(1000, 8).bfloat16()
    ids = torch.tensor([0, 1, 500, 998, 999])
    expected = torch.nn.functional.linear(hidden, weight).double().log_softmax(-1)[range(5), ids]
    scored = token_log_probs(hidden, ids, weight, None, 1.0, columns)
    assert scored.dtype == torch.float32
    torch.testing.assert_close(scored.double(), expected, atol=1e-5, rtol=0)


def test_logits_beyond_what_exp_can_hold_are_no_trouble():
    """In whichever block the largest stands."""
    hidden, weight = torch.eye(2), torch.tensor([[300.0, -300.0], [0.0, 0.0], [-300.0, 300.0]])
    for columns in (1, 2, 3):
        scored = token_log_probs(hidden, torch.tensor([0, 0]), weight, None, 1.0, columns)
        assert scored.tolist() == [0.0, -600.0]


class Tower(torch.nn.Module):
    """As a Qwen-VL tower: patches in, an output with rows of patches, of merged tokens, and a list of such."""

    spatial_merge_size = 2

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, pixel_values, grid_thw):
        self.seen.append(len(pixel_values))
        merged = pixel_values.view(-1, 4, pixel_values.shape[-1]).mean(1)
        return {"last_hidden_state": pixel_values * 2, "pooler_output": merged, "deepstack": [merged, merged + 1]}


class TileTower(torch.nn.Module):
    """As InternVL's tower: tiles in, rows of tiles out."""

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
    """Whatever the repetitions, the output is that of encoding every copy."""
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
    """It may tell equal tiles apart."""
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


@pytest.mark.parametrize(
    ("name", "tower", "inputs", "encoded"),
    [
        ("visual", Tower, {"pixel_values": torch.zeros(8, 3), "grid_thw": torch.tensor([[1, 2, 2]] * 2)}, 4),
        ("vision_tower", TileTower, {"pixel_values": torch.zeros(2, 3, 2, 2)}, 1),
        ("audio_tower", TileTower, {"pixel_values": torch.zeros(2, 3, 2, 2)}, 2),
    ],
)
def test_the_tower_is_found_by_its_name(name, tower, inputs, encoded):
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.add_module(name, tower())
    encode_distinct_images(model)
    found = model.model.get_submodule(name)
    found(**inputs)
    assert found.seen == [encoded]


def test_a_tower_whose_images_cannot_be_told_apart_is_left_alone():
    class Ragged(torch.nn.Module):
        def forward(self, hidden_states, cu_seqlens):
            return hidden_states

    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.visual = Ragged()
    encode_distinct_images(model)
    assert torch.equal(model.model.visual(torch.zeros(4, 2), torch.tensor([0, 2, 4])), torch.zeros(4, 2))


def test_images_with_one_sum_are_still_told_apart():
    images = torch.tensor([[1.0], [2.0], [3.0], [4.0], [4.0], [3.0], [2.0], [1.0]])
    tower = Tower()
    DistinctImages(tower)
    encoded = tower(images, grid_thw=torch.tensor([[1, 2, 2], [1, 2, 2]]))
    assert torch.equal(encoded["last_hidden_state"], images * 2) and tower.seen == [8]


@pytest.mark.parametrize("key", ["final_logit_softcapping", "logits_scaling", "logit_scale"])
def test_models_that_change_logits_after_the_projection_are_refused(key, monkeypatch):
    from types import SimpleNamespace

    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    from verl_gndpo.teacher.engine import TeacherEngine

    text_config = SimpleNamespace(**{key: 30.0})
    module = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text_config))
    monkeypatch.setattr(FSDPEngineWithLMHead, "_build_module", lambda self: module)
    engine = object.__new__(TeacherEngine)
    engine.model_config = SimpleNamespace(path="some/model")
    with pytest.raises(NotImplementedError, match=f"some/model.*{key}"):
        engine._build_module()
