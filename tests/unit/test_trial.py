# SPDX-License-Identifier: Apache-2.0
"""The trial on a small model: what it finds out, what it refuses, and how it makes a model small."""

import copy

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.zoo import TEXT
from verl_gndpo.teacher import attention, scorer, trial
from verl_gndpo.teacher.packing import (
    PackedPass,
    PromptGroup,
    PromptPass,
    ResponsePass,
    RowsPass,
    concatenable,
    pad_right,
    plan,
)
from verl_gndpo.teacher.scoring import LogitsChange
from verl_gndpo.teacher.trial import Verdict, choose_sharing, logits_change, shrink

SMALL = TEXT | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def build(config, implementation):
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32)


def attend_wrongly(query, key, value, scaling, window):
    return value.repeat_interleave(query.shape[-3] // key.shape[-3], -3)[..., -query.shape[-2] :, :]


def forget_cache(cache, times, device):
    return hf.DynamicCache()


def test_the_fastest_exact_way_is_chosen(monkeypatch):
    """Each way is broken in turn, and the next one is taken, with the reason."""
    config = hf.Qwen3Config(**SMALL)
    assert choose_sharing(config, build=build) == Verdict("attention", True, LogitsChange())
    monkeypatch.setattr(attention, "_causal", attend_wrongly)
    verdict = choose_sharing(config, build=build)
    assert (verdict.sharing, list(verdict.reasons)) == ("cache", ["sharing=attention"])
    monkeypatch.setattr(scorer, "_repeat_cache", forget_cache)
    verdict = choose_sharing(config, build=build)
    assert (verdict.sharing, list(verdict.reasons)) == ("none", ["sharing=attention", "sharing=cache"])
    assert "each response runs with its own prompt; sharing=attention is not exact: log-probs differ by" in str(verdict)
    with pytest.raises(trial.TrialError, match=r"^sharing=cache: log-probs differ by [\d.]+ nats"):
        choose_sharing(config, build=build, sharing="cache")


def test_rows_that_a_model_mixes_run_one_by_one(monkeypatch):
    def mixing(config, implementation):
        model = build(config, implementation)
        model.model.norm.register_forward_hook(lambda _, __, out: out + out.mean(0, keepdim=True))
        return model

    monkeypatch.setattr(scorer, "_repeat_cache", forget_cache)
    monkeypatch.setattr(attention, "_causal", attend_wrongly)
    verdict = choose_sharing(hf.Qwen3Config(**SMALL), build=mixing)
    assert (verdict.sharing, verdict.side_by_side) == ("none", False)
    assert str(verdict).startswith("each response runs with its own prompt, one by one")


def test_a_model_that_fails_by_itself_is_refused_with_its_reason():
    def failing(config, implementation):
        model = build(config, implementation)
        model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel")))
        return model

    with pytest.raises(trial.TrialError, match="its forward pass fails: RuntimeError: no kernel"):
        choose_sharing(hf.Qwen3Config(**SMALL), build=failing)


@given(st.floats(0.01, 20.0), st.none() | st.floats(5.0, 100.0))
@settings(max_examples=20, deadline=None)
def test_what_a_model_does_with_its_logits_is_found_out(scale, cap):
    """Against a model that does it in its own way."""
    torch.manual_seed(0)
    model = build(hf.Qwen3Config(**SMALL), "eager")
    forward = model.forward

    def changed(**inputs):
        out = forward(**inputs)
        out.logits = out.logits * scale if cap is None else torch.tanh(out.logits * scale / cap) * cap
        return out

    model.forward = changed
    found = logits_change(model, trial._rows(model.config, None)[0])
    assert found.scale == pytest.approx(scale, rel=1e-4)
    assert found.cap == (None if cap is None else pytest.approx(cap, rel=1e-4))
    x = torch.linspace(-200, 200, 101)
    expected = x * scale if cap is None else torch.tanh(x * scale / cap) * cap
    torch.testing.assert_close(found.apply_(x.clone()), expected, rtol=1e-4, atol=1e-4)


def test_another_change_of_the_logits_is_refused():
    model = build(hf.Qwen3Config(**SMALL), "eager")
    forward = model.forward

    def changed(**inputs):
        out = forward(**inputs)
        out.logits = out.logits.relu() + 0.1 * out.logits
        return out

    model.forward = changed
    with pytest.raises(trial.TrialError, match="changes its logits by more than"):
        logits_change(model, trial._rows(model.config, None)[0])


RELEASED = {
    "Qwen3-32B": hf.Qwen3Config(
        hidden_size=5120, num_hidden_layers=64, num_attention_heads=64, intermediate_size=25600, vocab_size=151936
    ),
    "Qwen3-235B-A22B": hf.Qwen3MoeConfig(
        hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4, vocab_size=151936
    ),
    "Qwen3.5": hf.Qwen3_5Config(),
    "gpt-oss-20b": hf.GptOssConfig(num_hidden_layers=24, num_local_experts=32),
    "DeepSeek-V3": hf.DeepseekV3Config(),
    "Gemma 3 27B": hf.Gemma3Config(),
    "Llama-3-8B": hf.LlamaConfig(vocab_size=128256, num_key_value_heads=8, intermediate_size=14336),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_are_tried_on_a_small_model(name):
    config = copy.deepcopy(RELEASED[name])
    text = config.get_text_config()
    before = (text.vocab_size, getattr(text, "head_dim", None), getattr(text, "layer_types", None))

    def build_any(small, implementation):
        kind = hf.AutoModelForImageTextToText if hasattr(small, "vision_config") else hf.AutoModelForCausalLM
        model = kind.from_config(small, attn_implementation=implementation, dtype=torch.float32)
        if model.device.type != "meta":
            sizes.append(sum(parameter.numel() for parameter in model.parameters()))
        assert set(getattr(model.config.get_text_config(), "layer_types", None) or ()) == set(before[2] or ())
        return model

    sizes = []
    verdict = choose_sharing(config, build=build_any)
    assert verdict.sharing == ("cache" if name in ("Qwen3.5", "gpt-oss-20b") else "attention")
    assert max(sizes) < trial.LARGEST
    assert config.get_text_config().vocab_size == before[0]
    assert getattr(config.get_text_config(), "head_dim", None) == before[1]


def test_a_small_model_keeps_each_kind_of_layer():
    small = shrink(hf.Qwen3NextConfig(), "narrow")
    assert set(small.layer_types) == {"linear_attention", "full_attention"}
    # One more than the run that has both.
    assert len(small.layer_types) == small.num_hidden_layers == 5
    small = shrink(hf.DeepseekV3Config(), "narrow")
    assert (small.first_k_dense_replace, small.num_hidden_layers) == (1, 3)
    assert small.n_routed_experts == 16 >= 2 * small.num_experts_per_tok
    assert hf.Qwen3NextConfig().num_hidden_layers == 48


# --- plans ------------------------------------------------------------------------------------------------------------

GROUPS = st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(1, 30), min_size=1, max_size=6)), max_size=6)


@given(GROUPS, st.sampled_from(["attention", "cache", "none"]), st.integers(1, 120), st.sets(st.integers(0, 8)))
@settings(deadline=None)
def test_each_row_is_scored_once_after_its_prompt(shapes, sharing, limit, alone):
    groups, count = [], 0
    for prompt, responses in shapes:
        groups.append(PromptGroup(tuple(range(count, count + len(responses))), prompt, tuple(responses)))
        count += len(responses)
    length = {row: (g.prompt, n) for g in groups for row, n in zip(g.rows, g.responses, strict=True)}
    filled = None
    scored = []
    for step in plan(groups, sharing, limit, alone):
        scored += step.rows
        match step:
            case PackedPass():
                assert sharing == "attention"
            case PromptPass():
                assert sharing == "cache"
                assert len(step.group.rows) > 1
                filled = step.group
            case ResponsePass():
                assert set(step.rows) <= set(filled.rows)
                assert alone.isdisjoint(filled.rows)
                assert step.responses == tuple(length[row][1] for row in step.rows)
                total = len(step.rows) * (step.prompt + max(step.responses))
                assert total <= limit or len(step.rows) == 1
            case RowsPass():
                assert sharing != "attention"
                total = len(step.rows) * max(sum(length[row]) for row in step.rows)
                assert total <= limit or len(step.rows) == 1
    assert sorted(scored) == list(range(count))


def test_images_that_can_t_be_concatenated_run_apart():
    groups = [PromptGroup((row,), 3, (2,)) for row in range(5)]
    wide, high = {"pixel_values": torch.zeros(1, 3, 4, 8)}, {"pixel_values": torch.zeros(2, 3, 8, 4)}
    images = [{}, wide, high, dict(wide), {}]
    parts = concatenable(groups, images)
    assert [[group.rows[0] for group in part] for part in parts] == [[0, 4, 1, 3], [2]]
    assert concatenable(groups[:1], images) == [groups[:1]]
    assert concatenable([], images) == []


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans())
def test_padding_repeats_the_last_value(lengths, on_axes):
    rows = [torch.arange(10 * n, 10 * n + length) for n, length in enumerate(lengths)]
    padded = pad_right([torch.stack([row, -row]) for row in rows] if on_axes else rows)
    assert padded.shape == ((2,) if on_axes else ()) + (len(rows), max(lengths))
    for n, row in enumerate(rows):
        values = padded[0, n] if on_axes else padded[n]
        assert values.tolist() == row.tolist() + [row[-1].item()] * (max(lengths) - len(row))
