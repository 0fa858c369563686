# SPDX-License-Identifier: Apache-2.0
"""What a step logs about its signal, against a float64 oracle in pandas; worst tokens and warnings by hand."""

import json
import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tests.helpers import trace_of
from tests.unit.conftest import Letters
from tests.unit.test_advantage import batch, batches
from tests.unit.test_stages import oracle
from verl_gndpo.advantage import compute_advantages
from verl_gndpo.config import Warn, WorstTokens, read_signal_config
from verl_gndpo.doctor.inputs import Inputs
from verl_gndpo.doctor.settings import check_settings
from verl_gndpo.observe import worst_tokens
from verl_gndpo.observe.limits import CORRELATION, FIRST_STEPS, REPEAT_AFTER_STEPS, SignalWarnings
from verl_gndpo.observe.metrics import (
    NO_ADVANTAGE,
    Tokens,
    describe_classes,
    describe_positions,
    describe_responses,
    describe_signal,
    describe_sources,
    describe_teachers,
    sum_parts,
)
from verl_gndpo.observe.token_classes import CLASSES, classify_tokens, classify_vocabulary
from verl_gndpo.observe.worst_tokens import WorstTokenLog, find_worst, locate, show_in_context, why_not_writable
from verl_gndpo.presets import PRESETS

STAGES = {
    # float64 of the stages themselves is tested in test_stages.py; here it is what the metrics make of them.
    **{name: {"preset": name} for name in PRESETS if name != "v_opd"},
    "gain_limit": {"gain_limit": 0.5},
    "masked and whitened": {"preset": "uni_opd", "limit": 1.0, "baseline": "batch", "scale": "batch"},
    "rank": {"bound": "tanh", "scale": "rank"},
}


def table(teacher, old, mask, advantages, config, lengths):
    """Return one row per valid token, in float64."""
    valid = mask.bool()
    rows, positions = (x.numpy() for x in valid.nonzero(as_tuple=True))
    d = (teacher.double() - old.double())[valid].numpy()
    alone = replace(config, baseline="none", scale="none")
    # The oracle sets dropped tokens to 0; their k is D.
    k = d if config.bound == "mask" else oracle(teacher, old, mask, alone, None, None, old)[valid.numpy()]
    a = advantages[valid].double().numpy()
    frame = pd.DataFrame({"row": rows, "position": positions, "d": d, "k": k, "a": a})
    frame["part"] = 10 * frame.position // lengths[rows]
    return frame


def deviation(x):
    return x.std(ddof=1) if len(x) > 1 else 0.0


@given(batches(), st.sampled_from(list(STAGES)), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_every_number_of_the_signal_against_pandas(data, stages, random):
    teacher, old, mask = data
    config = read_signal_config({"gndpo": STAGES[stages]}, "gndpo").signal
    groups = ["a"] * len(mask)
    advantages = compute_advantages(teacher, old, mask, config, groups=groups)
    width = mask.shape[1]
    ends = [int(row.nonzero().max()) + 1 if row.any() else 1 for row in mask]
    lengths = np.array([random.randint(end, width) for end in ends])
    sources = [random.choice(["x", "y/z"]) for _ in mask]
    tokens = Tokens(trace_of(teacher, old, mask, config, groups=groups))
    parts = sum_parts(tokens, lengths)
    found = describe_signal(tokens) | describe_positions(parts) | describe_sources(tokens, parts, sources)
    assert all(isinstance(x, float) and math.isfinite(x) for x in found.values()), found

    frame = table(teacher, old, mask, advantages, config, lengths)
    d, k, a, n = frame.d, frame.k, frame.a, len(frame)
    limit = {
        "clamp": config.parameters.get("limit"),
        "mask": config.parameters.get("limit"),
        "soft_clamp": config.parameters.get("soft_clamp_factor", 0) * d.abs().mean(),
    }.get(config.bound, math.inf)
    kept = k[d.abs() <= limit] if config.bound == "mask" else k
    expected = {
        "log_ratio/mean": d.mean(),
        "log_ratio/std": deviation(d),
        "log_ratio/min": d.min(),
        "log_ratio/max": d.max(),
        **{f"log_ratio/p{p:02}": np.sort(d)[int(p / 100 * n)] for p in (1, 5, 50, 95, 99)},
        "advantage_abs_max": a.abs().max(),
        "k1": -d.mean(),
        "tokens": n,
    }
    # float32 rounding may move a ratio across a limit.
    near = np.isclose(d.abs(), limit, rtol=1e-5, atol=1e-5).sum()
    if not near or config.bound != "mask":
        expected |= {"mu": kept.mean() if len(kept) else 0.0, "sigma": deviation(kept)}
    for name, value in expected.items():
        assert found[f"gndpo/{name}"] == pytest.approx(value, rel=1e-4, abs=3e-5), name
    assert abs(found["gndpo/clipped_low_share"] - (d < -limit).mean()) <= near / n
    assert abs(found["gndpo/clipped_high_share"] - (d > limit).mean()) <= near / n
    for nats in (1, 5, 10):
        slack = np.isclose(d.abs(), nats, atol=1e-5).mean()
        assert abs(found[f"gndpo/log_ratio/beyond_{nats}_share"] - (d.abs() > nats).mean()) <= slack
    rounded = ((a * k).abs() < 1e-5).sum()
    assert abs(found["gndpo/sign_flip_share"] * n - (np.sign(a) * np.sign(k) < 0).sum()) <= rounded
    k3 = np.exp(np.minimum(d, 20)) - 1 - np.minimum(d, 20)
    assert found["gndpo/k3"] == pytest.approx(k3.mean(), rel=1e-4, abs=1e-3)

    size, top = a.abs(), max(n // 100, 1)
    if size.max() > NO_ADVANTAGE:
        assert found["gndpo/effective_sample_share"] == pytest.approx(size.sum() ** 2 / (n * (a**2).sum()), rel=1e-4)
        assert found["gndpo/top_1pct_gradient_share"] == pytest.approx(size.nlargest(top).sum() / size.sum(), rel=1e-4)
    else:
        assert found["gndpo/effective_sample_share"] == found["gndpo/top_1pct_gradient_share"] == 0
    if size.max() > NO_ADVANTAGE and a.std(ddof=0) > 1e-3 * size.max():
        kurtosis = ((a - a.mean()) ** 4).mean() / a.var(ddof=0) ** 2 - 3
        assert found["gndpo/advantage_kurtosis"] == pytest.approx(kurtosis, rel=1e-2, abs=1e-2)

    for part in range(10):
        mine = frame[frame.part == part]
        assert (f"gndpo/position/{part}/k1" in found) is (len(mine) > 0)
        if len(mine):
            assert found[f"gndpo/position/{part}/k1"] == pytest.approx(-mine.d.mean(), rel=1e-4, abs=1e-5)
            size_there = found[f"gndpo/position/{part}/advantage_abs_mean"]
            assert size_there == pytest.approx(mine.a.abs().mean(), rel=1e-4, abs=1e-5)
    source = pd.Series(sources)[frame.row].to_numpy()
    several = len(set(source)) > 1
    assert any("/data_source/" in name for name in found) is several
    for name, mine in frame.groupby(source) if several else ():
        own = {key.removeprefix(f"gndpo/data_source/{name}/"): x for key, x in found.items() if f"/{name}/" in key}
        assert own["tokens"] == len(mine) and own["share"] == pytest.approx(len(mine) / n)
        assert own["k1"] == pytest.approx(-mine.d.mean(), rel=1e-4, abs=1e-5)
        gradient = mine.a.abs().sum() / size.sum() if size.max() > 0 else 0.0
        assert own["gradient_share"] == pytest.approx(gradient, rel=1e-4, abs=1e-6)
        flips = (np.sign(mine.a) * np.sign(mine.k) < 0).mean()
        assert abs(own["sign_flip_share"] - flips) <= ((mine.a * mine.k).abs() < 1e-5).mean()


def test_the_gain_is_what_the_signal_was_multiplied_by():
    data = batch(spread=4.0)

    def gain(**stages):
        config = read_signal_config({"gndpo": stages}, "gndpo").signal
        return describe_signal(Tokens(trace_of(*data, config, groups=["a", "b"] * 3)))

    whitened = gain()
    assert whitened["gndpo/gain"] == pytest.approx(1 / math.hypot(whitened["gndpo/sigma"], 1e-4), rel=1e-5)
    assert gain(gain_limit=0.1)["gndpo/gain"] == 0.1
    assert gain(scale="none")["gndpo/gain"] == 1.0
    ranks = gain(scale="rank")
    assert ranks["gndpo/gain"] == pytest.approx(1 / ranks["gndpo/sigma"], rel=1e-2), "ranks have deviation 1"
    teacher, old, mask = (x[:1, :1] for x in data)
    config = read_signal_config({"gndpo": {"scale": "rank"}}, "gndpo").signal
    alone = describe_signal(Tokens(trace_of(teacher, old, mask, config)))
    assert alone["gndpo/gain"] == 0.0 and alone["gndpo/advantage_kurtosis"] == 0.0


@pytest.mark.parametrize("scope", ["batch", "teacher"])
def test_each_teachers_metrics_are_those_of_its_rows(scope):
    teacher, old, mask = batch(spread=4.0)
    labels = ["one", "two+three"] * 3
    config = read_signal_config({"gndpo": {"baseline": scope, "scale": scope}}, "gndpo").signal
    metrics = describe_teachers(labels, Tokens(trace_of(teacher, old, mask, config, teachers=labels)))
    for label, rows in (("one", slice(0, 6, 2)), ("two+three", slice(1, 6, 2))):
        valid = mask[rows] != 0
        d = (teacher - old)[rows][valid].double().numpy()
        own = {name.removeprefix(f"gndpo/teacher/{label}/"): x for name, x in metrics.items() if f"/{label}/" in name}
        assert own["tokens"] == len(d)
        assert own["k1"] == pytest.approx(-d.mean(), rel=1e-5)
        assert own["sigma"] == pytest.approx(np.clip(d, -5, 5).std(ddof=1), rel=1e-5)
        assert ("gain" in own) is (scope == "teacher")
        if scope == "teacher":
            assert own["gain"] == pytest.approx(1 / own["sigma"], rel=1e-4)


def test_one_token_that_dominates_and_many_alike():
    config = read_signal_config({"gndpo": {"preset": "opd_raw"}}, "gndpo").signal
    ones = torch.ones(2, 100)
    alike = describe_signal(Tokens(trace_of(ones, 0 * ones, ones, config, ones)))
    assert alike["gndpo/effective_sample_share"] == 1.0 and alike["gndpo/advantage_kurtosis"] == 0.0
    assert alike["gndpo/top_1pct_gradient_share"] == pytest.approx(0.01)
    # Its square alone does not fit into float32.
    outlier = 1e-3 * ones
    outlier[1, 7] = 1e30
    lone = describe_signal(Tokens(trace_of(ones, 0 * ones, ones, config, outlier)))
    assert lone["gndpo/effective_sample_share"] == pytest.approx(1 / 200)
    assert lone["gndpo/top_1pct_gradient_share"] == pytest.approx(1.0)
    assert lone["gndpo/advantage_kurtosis"] == pytest.approx(195, rel=1e-3)


# --- kinds of tokens -------------------------------------------------------------------------------------------------

TEXTS = ["word", " 42", "x2", "\\frac", "{", " \n", "<|end|>", "<|image|>", "\N{REPLACEMENT CHARACTER}", "é", "图", "²"]
KINDS = ["other", "digits", "digits", "other", "format", "format", "eos", "format", "other", "other", "other", "digits"]
VOCABULARY = classify_vocabulary(TEXTS, special=[6, 7], eos=[6, 500], placeholders=[7])


def kinds(responses, prompts=None):
    ids = [part for part in (responses, prompts) if part is not None]
    given = (x for part in ids for x in (np.concatenate(part).astype(np.int64), np.array([len(row) for row in part])))
    return [CLASSES[i] for i in classify_tokens(VOCABULARY, *given)]


def test_an_ids_kind_is_read_from_its_text():
    assert kinds([range(len(TEXTS))])[: len(TEXTS) - 4] == KINDS[: len(TEXTS) - 4]
    for i, kind in enumerate(KINDS):
        assert kinds([[i]]) == [kind], TEXTS[i]
    assert kinds([[len(TEXTS)], [10**6]]) == ["other", "other"], "the embedding is padded beyond the tokenizer"


def test_words_close_behind_an_image_are_vision_adjacent():
    words = [0] * 20
    # The placeholder is 4 tokens before the response: its 16 reach 13 tokens into it.
    assert kinds([words], [[0] * 30 + [7, 0, 0, 0]]) == ["vision_adjacent"] * 13 + ["other"] * 7
    assert kinds([words], [[7] + [0] * 15]) == ["vision_adjacent"] + ["other"] * 19
    assert kinds([words], [[7] + [0] * 16]) == ["other"] * 20
    # Each row has its own prompt; a digit stays a digit, EOS the end.
    found = kinds([[0, 1, 6], words[:2], [0]], [[7], [0] * 40, [7, 7]])
    assert found == ["vision_adjacent", "digits", "eos", "other", "other", "vision_adjacent"]
    # A tool's image within a response, at the end of a row: nothing reaches into the next one.
    assert kinds([[0, 7, 0], [0, 0]]) == ["other", "format", "vision_adjacent", "other", "other"]
    assert kinds([[0, 0], [0, 7]]) == ["other", "other", "other", "format"]


@given(batches(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_metrics_by_kind_and_of_ends_against_pandas(data, random):
    teacher, old, mask = data
    config = read_signal_config(None, "gndpo").signal
    advantages = compute_advantages(teacher, old, mask, config)
    tokens = Tokens(trace_of(teacher, old, mask, config))
    lengths = np.full(len(mask), mask.shape[1])
    everywhere = np.array([random.randrange(5) for _ in range(mask.numel())], np.uint8)
    classes = everywhere[mask.numpy().reshape(-1) != 0]
    found = describe_classes(tokens, classes) | describe_responses(tokens, lengths, everywhere)
    assert all(isinstance(x, float) and math.isfinite(x) for x in found.values()), found
    frame = table(teacher, old, mask, advantages, config, lengths)
    for number, name in enumerate(CLASSES):
        mine = frame[classes == number]
        assert found[f"gndpo/token/{name}/share"] == len(mine) / len(frame)
        assert (f"gndpo/token/{name}/k1" in found) is (len(mine) > 0)
        if len(mine):
            assert found[f"gndpo/token/{name}/k1"] == pytest.approx(-mine.d.mean(), rel=1e-4, abs=1e-5)
            size = found[f"gndpo/token/{name}/advantage_abs_mean"]
            assert size == pytest.approx(mine.a.abs().mean(), rel=1e-4, abs=1e-5)
    is_eos = everywhere.reshape(mask.shape)[mask.bool().any(1).numpy()] == 0
    assert found["gndpo/response/truncated_share"] == pytest.approx(1 - is_eos[:, -1].mean())
    assert found["gndpo/response/eos_share"] == pytest.approx(is_eos.mean())


def test_lengths_leave_out_the_rows_that_verl_adds():
    config = read_signal_config(None, "gndpo").signal
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]])
    zeros = torch.zeros(3, 4)
    tokens, lengths = Tokens(trace_of(zeros, zeros, mask, config)), np.array([4, 4, 1])
    ends = np.array([4, 4, 4, 0, 4, 4, 4, 4, 0], np.uint8)
    assert describe_responses(tokens, lengths, ends) == {
        "gndpo/response/length_mean": 4.0,
        "gndpo/response/length_p95": 4.0,
        "gndpo/response/truncated_share": 0.5,
        "gndpo/response/eos_share": 1 / 8,
    }
    assert "gndpo/response/eos_share" not in describe_responses(tokens, lengths)


# --- the worst tokens ------------------------------------------------------------------------------------------------


def test_the_worst_are_those_with_the_largest_log_ratio_in_their_place():
    config = read_signal_config({"gndpo": {"limit": 1.0}}, "gndpo").signal
    teacher, old = torch.zeros(3, 4), torch.zeros(3, 4)
    teacher[0, 2], teacher[2, 3], teacher[2, 0] = -9.0, 7.0, -8.0
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]])
    tokens = Tokens(trace_of(teacher, old, mask, config))
    assert [place[1:] for place in find_worst(tokens, 2)] == [(0, 2), (2, 3)]
    assert tokens.d[[i for i, _, _ in find_worst(tokens, 2)]].tolist() == [-9.0, 7.0]
    assert len(find_worst(tokens, 100)) == 6


def test_the_token_is_marked_between_what_is_before_and_after_it():
    def decode(ids):
        return "".join(f"{i} " for i in ids)

    prompt, response = list(range(100, 120)), list(range(30))
    assert show_in_context(prompt, response, 2, decode).startswith("110 ")
    assert show_in_context(prompt, response, 2, decode).endswith("119 0 1 ⟦2 ⟧3 4 5 6 7 8 ")
    assert show_in_context(prompt, response, 29, decode) == decode(range(17, 29)) + "⟦29 ⟧"
    assert show_in_context([], [5], 0, decode) == "⟦5 ⟧"


def test_steps_are_written_at_a_rate_and_warnings_on_top(tmp_path):
    def due(every, warned=()):
        log = WorstTokenLog(tmp_path / "w.jsonl", every)
        return [step for step in range(1, 31) if log.is_due(step, step in warned)]

    assert due(10) == [10, 20, 30]
    assert due(10, warned={3, 4, 12, 13, 14}) == [3, 10, 13, 20, 30]
    assert due(0, warned={3}) == []
    log = WorstTokenLog(tmp_path / "w.jsonl", 1)
    assert log.is_due(1, False) and not log.is_due(1, False), "a step of several batches is written once"


def test_the_file_is_appended_to_and_stops_growing(tmp_path, monkeypatch):
    path = tmp_path / "new" / "w.jsonl"
    log = WorstTokenLog(path, 1)
    entry = {"text": "图" * 10}
    assert log.write([entry, entry]) is None and log.write([entry]) is None
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [entry] * 3
    monkeypatch.setattr(worst_tokens, "MAX_BYTES", path.stat().st_size + 3)
    assert "has reached" in log.write([entry]) and len(path.read_text(encoding="utf-8").splitlines()) == 3
    assert not log.is_due(5, True), "once is enough"


def test_a_file_that_can_no_longer_be_written_does_not_end_the_run(tmp_path):
    log = WorstTokenLog(tmp_path / "w.jsonl", 1)
    log.path.mkdir()
    assert "can't be written" in log.write([{}]) and not log.is_due(1, False)


def test_where_the_worst_tokens_go(tmp_path, monkeypatch):
    monkeypatch.delenv("VERL_FILE_LOGGER_PATH", raising=False)
    assert locate(None, "ckpt/run").as_posix() == "ckpt/run/gndpo_worst_tokens.jsonl"
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", "out/metrics.jsonl")
    assert locate(None, "ckpt/run").as_posix() == "out/gndpo_worst_tokens.jsonl"
    assert locate("mine.jsonl", "ckpt").as_posix() == "mine.jsonl"
    file = tmp_path / "file"
    file.touch()
    assert why_not_writable(tmp_path / "a" / "b.jsonl") is None and why_not_writable(file) is None
    assert "is a folder" in why_not_writable(tmp_path)
    assert "is not a folder" in why_not_writable(file / "b.jsonl")
    assert not (tmp_path / "a").exists()


def test_a_path_that_can_not_be_written_is_an_error_before_the_run(tmp_path):
    from tests.unit.conftest import verl_config

    base = ("algorithm.adv_estimator=gndpo", "+gndpo=default", "+teacher.model.path=T")
    path = f"algorithm.gndpo.worst_tokens.path={tmp_path}"
    (problem,) = (c for c in check_settings(Inputs(verl_config(*base, path))) if "worst_tokens" in c.detail)
    assert problem.status == "error" and "is a folder" in problem.detail and problem.remedy
    off = check_settings(Inputs(verl_config(*base, path, "algorithm.gndpo.worst_tokens.every=0")))
    assert not any("worst_tokens" in c.detail for c in off)


# --- warnings --------------------------------------------------------------------------------------------------------

SOURCES = {
    "gndpo/data_source/a/share": 0.6,
    "gndpo/data_source/b/gradient_share": 0.1,
    "gndpo/data_source/b/share": 0.4,
}


@pytest.mark.parametrize(
    ("kind", "fine", "bad", "words"),
    [
        ("gain", {"gndpo/gain": 20.0}, {"gndpo/gain": 20.1}, ["std_floor", "gain_limit", "=opd"]),
        (
            "sign_flip_share",
            {"gndpo/sign_flip_share": 0.3},
            {"gndpo/sign_flip_share": 0.41},
            ["41%", "baseline=none", "power_opd"],
        ),
        ("correlation", {CORRELATION: 0.99}, {CORRELATION: 0.98}, ["rollout.dtype", "rollout_correction"]),
        (
            "data_source_gradient_share",
            {**SOURCES, "gndpo/data_source/a/gradient_share": 0.8},
            {**SOURCES, "gndpo/data_source/a/gradient_share": 0.9},
            ["data source a has 90%", "60%", "verl-gndpo data mix --weights"],
        ),
    ],
)
def test_a_warning_names_its_remedy_and_is_not_repeated_at_once(kind, fine, bad, words):
    flag = f"gndpo/warning/{kind}"
    warnings = SignalWarnings(Warn())
    assert warnings.check(1, fine) == ({flag: 0.0}, [])
    flags, (text,) = warnings.check(2, bad)
    assert flags == {flag: 1.0} and all(word in text for word in words), text
    assert warnings.check(3, bad) == ({flag: 1.0}, [])
    assert warnings.check(2 + REPEAT_AFTER_STEPS, bad) == ({flag: 1.0}, [text])
    assert SignalWarnings(Warn(**{kind: None})).check(1, bad) == ({}, [])
    name = next(iter(bad))
    if kind != "data_source_gradient_share":
        assert SignalWarnings(Warn()).check(1, {name: math.nan}) == ({}, [])


def test_truncation_is_compared_with_the_first_steps():
    name, flag = "gndpo/response/truncated_share", "gndpo/warning/truncated_share_rise"
    warnings = SignalWarnings(Warn())
    for step in range(FIRST_STEPS):
        assert warnings.check(step, {name: 0.5}) == ({flag: 0.0}, []), "that many from the start is no rise"
    assert warnings.check(10, {name: 0.59}) == ({flag: 0.0}, [])
    flags, (text,) = warnings.check(11, {name: 0.61})
    assert flags == {flag: 1.0} and "61%" in text and "50%" in text and "data.max_response_length" in text


def test_nothing_to_judge_is_no_warning():
    assert SignalWarnings(Warn()).check(1, {}) == ({}, [])


# --- all of it, in the trainer's step --------------------------------------------------------------------------------


def test_a_step_of_the_trainer_logs_and_writes_all_of_it(gndpo_step, tmp_path, caplog):
    overrides = (
        *("algorithm.adv_estimator=gndpo", "+gndpo=default"),
        *("algorithm.gndpo.worst_tokens.count=2", "algorithm.gndpo.warn.gain=0.01"),
    )
    with caplog.at_level(logging.WARNING):
        store, _, metrics, _ = gndpo_step(overrides=overrides)
    assert all(math.isfinite(x) for x in metrics.values())
    # Letters are the positions 0 to 4 of each response (3, 5, 2 and 4 tokens): a, 1, {, end, image.
    shares = {name: metrics[f"gndpo/token/{name}/share"] * 14 for name in CLASSES}
    assert shares == pytest.approx({"eos": 2, "digits": 4, "format": 4, "vision_adjacent": 0, "other": 4})
    assert metrics["gndpo/response/length_mean"] == 3.5 and metrics["gndpo/response/length_p95"] == 5
    assert metrics["gndpo/response/truncated_share"] == 0.75
    assert metrics["gndpo/data_source/geo/tokens"] == 8 and metrics["gndpo/data_source/mmk/tokens"] == 6
    assert metrics["gndpo/warning/gain"] == 1.0 and "std_floor" in caplog.text

    d = (store["teacher_log_probs"].to_padded_tensor(0.0) - store["old_log_probs"].to_padded_tensor(0.0)).abs()
    row, position = np.unravel_index(d.argmax(), d.shape)
    lines = [json.loads(line) for line in (tmp_path / "gndpo_worst_tokens.jsonl").read_text().splitlines()]
    assert [line["rank"] for line in lines] == [1, 2]
    first = lines[0]
    assert (first["step"], first["row"], first["position"]) == (10, row, position)
    assert first["uid"] == "aabb"[row] and first["data_source"] == ["geo", "geo", "mmk", "mmk"][row]
    assert first["id"] == position and first["text"] == Letters.tokens[position]
    assert first["response_length"] == [3, 5, 2, 4][row]
    assert first["context"].startswith("a1") and f"⟦{first['text']}⟧" in first["context"]
    assert first["log_ratio"] == pytest.approx(first["teacher_log_prob"] - first["old_log_prob"], abs=1e-6)


def test_what_a_batch_lacks_is_not_described(gndpo_step, queue):
    store = queue[0]
    for name in ("responses", "prompts", "data_source"):
        del store[name]
    metrics = gndpo_step()[2]
    assert "gndpo/k1" in metrics and "gndpo/position/0/k1" in metrics and "gndpo/response/length_mean" in metrics
    assert not any(part in name for name in metrics for part in ("/token/", "eos_share", "/data_source/"))


def test_rejected_tokens_are_left_out_of_kinds(make_monitor, queue):
    store, _, meta = queue
    config = OmegaConf.create(
        {
            "algorithm": {"adv_estimator": "gndpo", "gndpo": {"worst_tokens": vars(WorstTokens(every=0))}},
            "trainer": {"default_local_dir": "ckpt"},
            "actor_rollout_ref": {"model": {"path": "S"}},
        }
    )
    padded = {k: store[k].to_padded_tensor(0.0) for k in ("teacher_log_probs", "old_log_probs")}
    mask = store["response_mask"].to_padded_tensor(0)
    mask[:, 0] = 0
    lengths = store["response_mask"].offsets().diff().numpy()
    trace = trace_of(*padded.values(), mask, read_signal_config(None, "gndpo").signal)
    metrics = make_monitor(config).look(
        meta, 1, {}, **padded, trace=trace, lengths=lengths, uids="aabb", teachers=["t"] * 4
    )
    assert metrics["gndpo/tokens"] == 10 == metrics["gndpo/teacher/t/tokens"]
    assert metrics["gndpo/token/other/share"] == 0 and metrics["gndpo/token/digits/share"] == 0.4


def test_what_ends_a_response_is_also_in_the_generation_config(monkeypatch):
    import verl_gndpo.observe.monitor as monitor_module

    monkeypatch.setattr(monitor_module, "copy_to_local", lambda path: path)
    model = OmegaConf.create({"path": "S"})
    for eos, expected in ((None, {3}), (7, {3, 7}), ([3, 9], {3, 9})):
        generation = SimpleNamespace(eos_token_id=eos)
        monkeypatch.setattr(monitor_module, "get_generation_config", lambda path, g=generation, **_: g)
        assert monitor_module._eos_ids(model, Letters()) == expected
