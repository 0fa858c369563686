# SPDX-License-Identifier: Apache-2.0
"""`verl-gndpo report`: what it reads, the figures of its table, what it draws and writes. Without verl."""

import base64
import io
import json
import math
import re
import subprocess
import sys
import time
import tracemalloc
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from verl_gndpo import cli
from verl_gndpo.report import draw, figures, page, table
from verl_gndpo.report.read import WANTED, ReportError, Run, read_arms, read_run

ACCURACY = "val-core/geo/acc/mean@1"
GRADIENT = "actor/grad_norm"


def lines(*entries):
    return b"".join(json.dumps({"step": step, "data": data}).encode() + b"\n" for step, data in entries)


def training(step, generator, **more):
    """What verl and the plugin log in a step, or nearly."""
    noise = generator.random(4).tolist()
    stages = {"gen": 2.0 + noise[0], "adv": 0.1, "update_actor": 1.0 + noise[1], "teacher_log_prob": 0.5}
    return {
        GRADIENT: 0.2 + noise[0],
        "critic/score/mean": noise[1],
        "training/rollout_actor_probs_pearson_corr": 0.9995,
        **{f"gndpo/log_ratio/{name}": value for name, value in (("mean", -0.3), ("p01", -4 - noise[0]), ("p99", 1.0))},
        **{"gndpo/mu": -0.3, "gndpo/sigma": 1.2, "gndpo/gain": 1 / 1.2, "gndpo/sign_flip_share": 0.1 * noise[2]},
        **{f"gndpo/clipped_{side}_share": 0.01 * noise[3] for side in ("low", "high")},
        **{"response_length/mean": 14.0, "response_length/max": 24.0, "response_length/clip_ratio": 0.02},
        **{f"timing_s/{name}": value for name, value in stages.items()},
        **{"timing_s/step": sum(stages.values()) + 0.2, "timing_s/agent_loop/slowest/wait": 1.0},
        **more,
    }


def write_run(path, steps=20, every=5, seed=0, source="geo"):
    """A whole run of `steps`, validated before and every so many; returns its entries."""
    generator = np.random.default_rng(seed)
    accuracy = f"val-core/{source}/acc/mean@1"
    entries = [(0, {accuracy: 0.4})]
    for step in range(1, steps + 1):
        validation = {accuracy: float(generator.random()), "timing_s/testing": 1.5} if step % every == 0 else {}
        entries.append((step, training(step, generator, **validation)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lines(*entries))
    return entries


@pytest.fixture
def report(tmp_path):
    def run(*arguments):
        arguments = [str(argument) for argument in arguments]
        return CliRunner().invoke(cli.app, ["report", *arguments, "--out", str(tmp_path / "out")])

    return run


@pytest.fixture
def log(tmp_path):
    def write(content, name="run/metrics.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def undrawn(monkeypatch):
    """Plots take most of the time, and many tests are of other things."""
    monkeypatch.setattr(page, "draw_plots", lambda arms, teacher: [])


class Page(HTMLParser):
    """Text, images and what a page would load or run."""

    def __init__(self, path):
        super().__init__()
        self.words, self.sources, self.loads, self.tags = [], [], [], set()
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attributes = dict(attrs)
        if tag == "img":
            self.sources.append(attributes["src"])
        self.loads += [value for name, value in attrs if name in ("href", "srcset", "onload", "onclick")]

    def handle_data(self, data):
        self.words.append(data)


# ---- reading ----


def test_what_verls_file_logger_writes_is_read(tmp_path, monkeypatch):
    tracking = pytest.importorskip("verl.utils.tracking")
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "metrics.jsonl"))
    logger = tracking.FileLogger("project", "experiment")
    logger.log({ACCURACY: np.float64(0.25), "val-aux/num_turns/min": np.int64(2)}, 0)
    logger.log({GRADIENT: np.float32(0.5), "gndpo/gain": math.inf, ACCURACY: 0.5}, 1)
    logger.log({GRADIENT: math.nan, "gndpo/gain": 2}, 2)
    logger.finish()
    run = read_run(tmp_path / "metrics.jsonl")
    assert run.metrics[ACCURACY].to_dict() == {0: 0.25, 1: 0.5}
    np.testing.assert_array_equal(run.metrics[GRADIENT], [0.5, math.nan])
    np.testing.assert_array_equal(run.metrics["gndpo/gain"], [math.nan, 2])
    assert set(run.metrics) == {ACCURACY, GRADIENT, "gndpo/gain"}
    assert [note for note in run.notes if GRADIENT in note or "gndpo/gain" in note] == list(run.notes)
    assert len(run.notes) == 2


STEP = st.fixed_dictionaries(
    {}, optional={GRADIENT: st.none() | st.floats(0, 9), ACCURACY: st.floats(0, 1), "é\n": st.text(max_size=3)}
)


@settings(max_examples=40, deadline=None)
@given(data=st.lists(STEP, min_size=1, max_size=4), more=st.data())
def test_any_truncation_reads_a_prefix_of_the_steps(tmp_path_factory, data, more):
    content = lines(*enumerate(data, 1))
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    size = more.draw(st.integers(0, len(content)))
    path.write_bytes(content[:size])
    # A line without its end is whole as soon as its last brace is there.
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    whole = sum(end - 1 <= size for end in ends)
    expected = {}
    for step, values in enumerate(data[:whole], 1):
        for name in (GRADIENT, ACCURACY):
            if name in values:
                expected.setdefault(name, {})[step] = math.nan if values[name] is None else values[name]
    if not expected:
        with pytest.raises(ReportError, match=re.escape(str(path))):
            read_run(path)
        return
    run = read_run(path)
    assert run.metrics.keys() == expected.keys()
    for name, values in expected.items():
        pd.testing.assert_series_equal(run.metrics[name], pd.Series(values), check_names=False)
    cut = size not in (0, *ends, *(end - 1 for end in ends))
    assert any("the last line is incomplete" in note for note in run.notes) == cut


@settings(max_examples=60, deadline=None)
@given(junk=st.lists(st.binary(max_size=30).filter(lambda b: b.strip() and b"\n" not in b), min_size=1, max_size=6))
def test_no_junk_between_the_steps_changes_them(tmp_path_factory, junk):
    path = tmp_path_factory.mktemp("junk") / "metrics.jsonl"
    good = [line + b"\n" for line in lines(*((i, {GRADIENT: i}) for i in range(1, len(junk) + 2))).splitlines()]
    path.write_bytes(b"".join(a + b + b"\n" for a, b in zip(good, junk, strict=False)) + good[-1])
    run = read_run(path)
    assert run.metrics[GRADIENT].to_dict() == {i: i for i in range(1, len(junk) + 2)}
    assert run.notes[0].startswith(f"{len(junk)} broken line(s) left out: line 2")


@pytest.mark.parametrize(
    "line",
    [
        *(b"[1, 2]", b"7", b"null", b'{"step": 1}', b'{"step": "2", "data": {}}', b'{"step": true, "data": {}}'),
        *(b'{"step": 1e400, "data": {}}', b'{"step": 9' + b"9" * 5000 + b', "data": {}}', b"[" * 100_000, b"\x00" * 99),
    ],
)
def test_json_that_is_no_step_counts_as_broken(log, line):
    run = read_run(log(lines((1, {GRADIENT: 1})) + line + b"\n" + lines((2, {GRADIENT: 2}))))
    assert run.metrics[GRADIENT].to_dict() == {1: 1, 2: 2}
    assert run.notes == ("1 broken line(s) left out: line 2",)


def test_values_that_are_no_numbers_or_too_large(log):
    huge = b'{"step": 3, "data": {"actor/grad_norm": NaN, "gndpo/gain": 1' + b"0" * 400 + b'}}\n{"step": 4, "data": '
    huge += b'{"actor/grad_norm": -Infinity, "gndpo/gain": 1e308}}\n'
    text = (1, {GRADIENT: "0.5", "gndpo/gain": [1]}), (2, {GRADIENT: True, "gndpo/gain": 1.0})
    run = read_run(log(lines(*text) + huge))
    assert run.metrics[GRADIENT].isna().to_dict() == {3: True, 4: True}
    assert run.metrics["gndpo/gain"].isna().to_dict() == {2: False, 3: True, 4: True}
    assert f"{GRADIENT}: 2 value(s) not finite" in " ".join(run.notes)


def test_after_a_resume_the_later_step_wins_and_a_validation_merges(log):
    before = [(0, {ACCURACY: 0.1}), (1, {GRADIENT: 1}), (2, {GRADIENT: 2, ACCURACY: 0.2}), (3, {GRADIENT: 3})]
    again = [(2, {ACCURACY: 0.3}), (3, {GRADIENT: 30})]
    run = read_run(log(lines(*before, (4, {GRADIENT: 4}), *again)))
    assert run.metrics[GRADIENT].to_dict() == {1: 1, 2: 2, 3: 30, 4: 4}
    assert run.metrics[ACCURACY].to_dict() == {0: 0.1, 2: 0.3}
    assert run.notes == (
        "2 step(s) logged more than once, as after a resume: the later values are shown",
        "what follows step 3, up to step 4, is from before the last resume",
    )


def test_a_validation_logged_apart_is_no_repetition(log):
    run = read_run(log(lines((1, {GRADIENT: 1}), (1, {ACCURACY: 0.5}))))
    assert run.metrics[GRADIENT].to_dict() == {1: 1} and run.metrics[ACCURACY].to_dict() == {1: 0.5}
    assert run.notes == ()


def test_accuracy_is_the_mean_over_most_samples_and_nothing_else(log):
    data = {"val-core/a/b/acc/mean@4": 0.5, "val-core/a/b/acc/best@4/mean": 0.9, "val-core/c/reward/mean@1": 0.7}
    run = read_run(log(lines((0, {"val-core/a/b/acc/mean@1": 0.3}), (5, data), (5, {"val-core/a/b/acc/mean@1": 0.4}))))
    assert {source: values.to_dict() for source, values in run.accuracy.items()} == {"a/b": {0: 0.3, 5: 0.5}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *((content, "has no metrics") for content in (b"", b"\n\n", b"epoch 1\n", b'{"step": 1, "da')),
        (lines((1, {"train/loss": 1})), "has 1 entries, but none of the metrics"),
    ],
)
def test_a_log_without_metrics_says_which_and_what_to_do(report, log, content, words):
    path = log(content)
    result = report(path)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error   {path} ") and result.stderr.count("\n") == 1
    assert words in result.stderr and 'trainer.logger=["console","file"]' in result.stderr


def test_folders(tmp_path, log):
    log(lines((1, {GRADIENT: 1})), "one/experiment.jsonl")
    (arm,) = read_arms([str(tmp_path / "one")])
    assert arm.label == "experiment"
    log(b"", "one/other.jsonl")
    with pytest.raises(
        ReportError, match=r"has 2 \.jsonl files \(experiment\.jsonl, other\.jsonl, \.\.\.\) -> name one"
    ):
        read_arms([str(tmp_path / "one")])
    log(lines((1, {GRADIENT: 1})), "one/metrics.jsonl")
    assert [arm.label for arm in read_arms([str(tmp_path / "one")])] == ["one"]
    with pytest.raises(ReportError, match=r"nowhere does not exist -> give"):
        read_arms([str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match=r"empty has no metrics\.jsonl"):
        read_arms([str(tmp_path / "empty")])


def test_only_runs_of_one_label_are_seeds(tmp_path, log):
    paths = [str(log(lines((1, {GRADIENT: 1})), f"{name}/metrics.jsonl").parent) for name in ("a", "b", "x/a", "lr=1")]
    a, b, other_a, equals = paths
    arms = read_arms([f"a={b}", a, other_a, f"a = {equals}".replace(" = ", " =")])
    assert [(arm.label, len(arm.runs)) for arm in arms] == [
        ("a", 2),
        (f"{a}/metrics.jsonl", 1),
        (f"{other_a}/metrics.jsonl", 1),
    ]
    assert [arm.label for arm in read_arms([equals, b])] == ["lr=1", "b"]
    with pytest.raises(ReportError, match="given twice"):
        read_arms([a, f"again={a}/../a/metrics.jsonl"])


# ---- the table ----


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=30), st.integers(1, 7), st.lists(st.floats(1e-3, 1e3), min_size=1)
)
def test_the_tables_figures_against_plain_numpy(accuracies, every, gradients):
    values = np.array(accuracies)
    steps = every * np.arange(len(values))
    accuracy = pd.Series(values, steps)
    trained = np.arange(1, steps[-1] + 1)
    gradient = pd.Series(np.resize(gradients, len(trained)), trained)
    run = Run("log", {ACCURACY: accuracy, GRADIENT: gradient, "timing_s/step": gradient * 2})
    found = table.describe_accuracy(accuracy, run, teacher=1.0)
    assert found["accuracy_before"] == values[0] and found["accuracy_after"] == values[-1]
    assert found["accuracy_best"] == max(accuracies)
    if values[0] < 1:
        assert found["gap_closed"] == pytest.approx((values[-1] - values[0]) / (1 - values[0]))
    else:
        assert found["gap_closed"] is None
    late = [v for v, s in zip(accuracies, steps, strict=True) if s >= steps[-1] - steps[-1] / 5 - 1e-9]
    assert found["accuracy_late_mean"] == pytest.approx(np.mean(late))
    drop = max(a - b for i, a in enumerate(accuracies) for b in accuracies[i:])
    assert found["accuracy_peak_drop"] == pytest.approx(drop)
    whole = table.describe_run(run)
    assert whole["grad_norm_max_over_median"] == pytest.approx(np.max(gradient) / np.median(gradient))
    assert whole["steps"] == steps[-1]
    assert whole["seconds_per_step"] == pytest.approx(2 * np.median(gradient))


@pytest.mark.parametrize(
    ("validated", "first", "before", "after"),
    [
        ({5: 0.5, 10: 0.6}, 1, None, 0.6),  # val_before_train=False
        ({50: 0.5, 60: 0.6}, 51, 0.5, 0.6),  # a log that starts after a resume
        ({0: 0.5}, 1, 0.5, None),  # not validated yet
        ({0: 0.5, 5: None}, 1, 0.5, None),
        ({5: None}, 1, None, None),
        ({0: 0.5, 5: 0.6}, None, 0.5, 0.6),  # validations only
    ],
)
def test_before_and_after_are_never_guessed(validated, first, before, after):
    accuracy = pd.Series(validated, dtype=float)
    trained = {} if first is None else {GRADIENT: pd.Series(1.0, range(first, first + 10))}
    found = table.describe_accuracy(accuracy, Run("log", {ACCURACY: accuracy, **trained}), teacher=0.9)
    assert (found["accuracy_before"], found["accuracy_after"]) == (before, after)
    assert (found["gap_closed"] is None) == (None in (before, after))


def test_no_gap_where_the_teacher_is_no_better(log):
    run = read_run(log(lines((0, {ACCURACY: 0.5}), (1, {GRADIENT: 0, ACCURACY: 0.6}))))
    assert table.describe_accuracy(run.accuracy["geo"], run, 0.5)["gap_closed"] is None
    assert table.describe_accuracy(run.accuracy["geo"], run, 0.4)["gap_closed"] is None
    assert table.describe_accuracy(run.accuracy["geo"], run, None)["gap_closed"] is None
    assert table.describe_run(run) == {"grad_norm_max_over_median": None, "steps": 1, "seconds_per_step": None}


def test_the_summary_has_mean_and_range_over_seeds(tmp_path, report, undrawn):
    finals = []
    for seed in range(3):
        *_, (_, last) = write_run(tmp_path / f"s{seed}/metrics.jsonl", seed=seed)
        finals.append(last[ACCURACY])
    write_run(tmp_path / "solo/metrics.jsonl", steps=12, seed=9)
    result = report(*(f"arm={tmp_path}/s{seed}" for seed in range(3)), tmp_path / "solo", "--teacher-accuracy", "0.9")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    arm, solo = summary["arms"]
    after = arm["accuracy"]["geo"]["accuracy_after"]
    assert after["values"] == finals
    assert (after["mean"], after["min"], after["max"]) == (pytest.approx(np.mean(finals)), min(finals), max(finals))
    gaps = [(final - 0.4) / 0.5 for final in finals]
    assert arm["accuracy"]["geo"]["gap_closed"]["mean"] == pytest.approx(np.mean(gaps))
    assert solo["label"] == "solo" and solo["steps"]["values"] == [12] and len(arm["runs"]) == 3
    text = Page(tmp_path / "out/index.html").text
    assert f"{np.mean(finals):.3f}" in text and f"{min(finals):.3f} to {max(finals):.3f}" in text


@pytest.mark.parametrize(
    ("beside", "arguments", "teacher"),
    [
        ({"teacher_accuracy": 0.95}, [], 0.95),
        ({"teacher_accuracy": 0.95}, ["--teacher-accuracy", "0.8"], 0.8),
        ({}, ["--teacher-accuracy", "geo=0.8"], 0.8),
        ({"teacher_accuracy": "0.95"}, [], None),
        ({"teacher_accuracy": 95}, [], None),
        ([], [], None),
    ],
)
def test_where_the_teachers_accuracy_comes_from(tmp_path, report, undrawn, beside, arguments, teacher):
    write_run(tmp_path / "run/metrics.jsonl")
    (tmp_path / "run/summary.json").write_text(json.dumps(beside))
    assert report(tmp_path / "run", *arguments).exit_code == 0
    (arm,) = json.loads((tmp_path / "out/summary.json").read_text())["arms"]
    assert arm["runs"][0]["teacher_accuracy"] == {"geo": teacher}
    assert (arm["accuracy"]["geo"]["gap_closed"]["mean"] is None) == (teacher is None)
    refused = any("not a share between 0 and 1" in note for note in arm["runs"][0]["notes"])
    assert refused == (teacher is None and isinstance(beside, dict))


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ("90", "give a share between 0 and 1"),
        ("nan", "give a share"),
        ("most", "give a share"),
        ("geo=", "give a share"),
        ("math=0.9", "no such data source in the runs -> one of: chart, geo"),
        ("0.9", "of which data source? -> SOURCE=0.9, of: chart, geo"),
    ],
)
def test_a_teachers_accuracy_that_can_t_be_meant(tmp_path, report, given_, words):
    write_run(tmp_path / "a/metrics.jsonl")
    write_run(tmp_path / "b/metrics.jsonl", source="chart")
    result = report(tmp_path / "a", tmp_path / "b", "--teacher-accuracy", given_)
    assert result.exit_code == 1 and words in result.stderr
    assert not (tmp_path / "out").exists()


# ---- plots ----


def test_every_metric_that_is_drawn_is_read():
    names = [name for plot in figures.PLOTS for metric in plot.metrics for name in metric.names]
    names += [ACCURACY, "gndpo/log_ratio/mean", "gndpo/log_ratio/p01", "timing_s/step", "timing_s/gen"]
    assert [name for name in names if not WANTED.fullmatch(name)] == []
    assert not WANTED.fullmatch("timing_s/agent_loop/slowest/wait") and not WANTED.fullmatch("gndpo/tokens")


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_line_is_the_median_and_its_band_the_range(seeds):
    _, (axes,) = draw.figure(1)
    runs = [pd.Series([1.0, 2.0 + i, math.nan, 4.0], [0, 1, 2, 3]) for i in range(seeds)]
    line = draw.line(axes, runs, draw.style(0))
    np.testing.assert_array_equal(line.get_xydata(), [[0, 1], [1, 2 + (seeds - 1) / 2], [2, math.nan], [3, 4]])
    assert len(axes.collections) == (seeds > 1)
    if seeds > 1:
        (path, *_) = axes.collections[0].get_paths()
        assert {tuple(point) for point in path.vertices} >= {(1.0, 2.0), (1.0, 4.0)}


def test_a_long_line_keeps_extremes_and_gaps():
    values = pd.Series(np.sin(np.arange(10_000)))
    values[1234], values[7000], values[4000:4030] = 50.0, -50.0, math.nan
    drawn = draw.thin(values)
    assert len(drawn) <= 3 * draw.BINS
    assert drawn[1234] == 50 and drawn[7000] == -50 and drawn.loc[3990:4040].isna().any()
    assert drawn.index.is_monotonic_increasing and drawn.dropna().equals(values[drawn.dropna().index])
    smooth = draw.smooth(values)
    assert smooth[4000:4030].isna().all() and smooth.abs().max() < 1
    short = values[:50]
    assert draw.smooth(short) is short and draw.thin(short) is short


def test_stages_and_the_rest_add_up_to_the_step(log):
    data = {"timing_s/gen": 2.0, "timing_s/adv": 0.5, "timing_s/testing": 9.0, "timing_s/step": 3.0}
    (arm,) = read_arms([str(log(lines((1, data), (2, {"timing_s/gen": 4.0, "timing_s/step": 3.0}))))])
    seconds = figures._seconds_by_stage(arm)
    assert seconds.loc[1].to_dict() == {"adv": 0.5, "gen": 2.0, "testing": 9.0, "other": 0.5}
    assert seconds.loc[2, "other"] == 0


def test_what_a_run_lacks_is_left_out_and_said(tmp_path, report, log):
    write_run(tmp_path / "full/metrics.jsonl")
    bare = log(lines((1, {GRADIENT: 1.0, ACCURACY: 0.5}), (2, {GRADIENT: 2.0})), "bare/metrics.jsonl")
    assert report(bare).exit_code == 0
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names == {"accuracy.png", "grad_norm.png"}
    text = Page(tmp_path / "out/index.html").text
    assert "Gain: no run logs gndpo/gain" in text and "Time per stage: no run logs timing_s/*" in text
    assert report(tmp_path / "full", bare).exit_code == 0
    text = Page(tmp_path / "out/index.html").text
    assert "gndpo/gain is not in the log of: bare" in text and "Left out" not in text
    assert report(f"arm={tmp_path / 'full'}", f"arm={bare}").exit_code == 0
    assert "gndpo/gain is not in the log of: arm (1 of 2 runs)" in Page(tmp_path / "out/index.html").text
    # PNGs that the last report doesn't have are gone.
    assert len(list((tmp_path / "out").glob("*.png"))) == len(figures.PLOTS)
    assert report(bare).exit_code == 0
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == names


@pytest.mark.parametrize("values", [[1e300, -1e99, None], [None], [0.0], [5e-324, 1.0], [1e-9, 1.0, 1e9] * 40, [-1, 2]])
@pytest.mark.filterwarnings("error")
def test_no_value_is_too_odd_to_draw(log, tmp_path, values):
    names = [name for plot in figures.PLOTS for metric in plot.metrics for name in metric.names]
    names += [ACCURACY, *(f"gndpo/log_ratio/{q}" for q in ("mean", "p01", "p99")), "timing_s/gen", "timing_s/step"]
    path = log(lines(*((step, dict.fromkeys(names, value)) for step, value in enumerate(values))))
    page.write_report([str(path)], tmp_path / "out", [])
    assert len(list((tmp_path / "out").glob("*.png"))) == len(figures.PLOTS)


# ---- the page ----


def test_the_page_is_whole_by_itself(tmp_path, report):
    write_run(tmp_path / "run/metrics.jsonl")
    result = report(tmp_path / "run")
    assert result.exit_code == 0
    assert result.stdout == f"report of 1 run(s): {tmp_path}/out/index.html\n"
    shown = Page(tmp_path / "out/index.html")
    assert "script" not in shown.tags and "link" not in shown.tags and shown.loads == []
    assert len(shown.sources) == len(figures.PLOTS)
    pngs = {path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    for source in shown.sources:
        png = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        assert png in pngs
        image = Image.open(io.BytesIO(png))
        assert image.width == 1045 and len(image.convert("L").getcolors()) > 10
    assert "url(" not in (tmp_path / "out/index.html").read_text()


def test_text_from_outside_is_escaped_and_drawn_as_it_is(tmp_path, report, log):
    source = '<img src=x onerror="a()">$x_1$\ud800中'
    path = log(lines((0, {f"val-core/{source}/acc/mean@1": 0.5}), (1, {GRADIENT: 1.0})), "a&b<i>/metrics.jsonl")
    result = report(f"<script>alert(1)</script>$\\frac$={path}", f"_hidden={log(path.read_bytes(), 'c/metrics.jsonl')}")
    assert result.exit_code == 0, result.output
    html = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    shown = Page(tmp_path / "out/index.html")
    assert "<script>alert(1)</script>" in shown.text and "a&b<i>" in shown.text and "onerror" in shown.text
    assert "<script" not in html and "<i>" not in html and "<img src=x" not in html
    assert draw.one_line("_hidden\n label", 60) == " _hidden label"
    assert len(draw.one_line("x" * 500, 60)) < 65


def test_each_file_is_written_whole_or_not_at_all(tmp_path, report, monkeypatch):
    write_run(tmp_path / "run/metrics.jsonl")
    assert report(tmp_path / "run").exit_code == 0
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert not any(name.startswith(".") for name in before)
    write_run(tmp_path / "run/metrics.jsonl", seed=1)

    def full(path, content):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    result = report(tmp_path / "run")
    assert result.exit_code == 1 and "No space left on device" in result.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_quickstarts_summary_is_not_overwritten(tmp_path, undrawn):
    write_run(tmp_path / "run/metrics.jsonl")
    summary = tmp_path / "run/summary.json"
    arguments = ["report", str(tmp_path / "run"), "--out", str(tmp_path / "run")]
    for content in ('{"teacher_accuracy": 0.9}', "[]", "half a fi"):
        summary.write_text(content)
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 1 and f"{summary} is not from a report and would be overwritten" in result.stderr
        assert summary.read_text() == content and not (tmp_path / "run/index.html").exists()
    summary.unlink()
    assert [CliRunner().invoke(cli.app, arguments).exit_code for _ in range(2)] == [0, 0]


def test_a_folder_that_can_t_be_made(tmp_path, report, undrawn):
    write_run(tmp_path / "run/metrics.jsonl")
    (tmp_path / "out").write_text("a file")
    result = report(tmp_path / "run")
    assert result.exit_code == 1 and result.stderr.startswith("error   ") and result.stderr.count("\n") == 1


def test_what_was_skipped_is_printed_and_on_the_page(tmp_path, report, undrawn):
    path = tmp_path / "run/metrics.jsonl"
    write_run(path)
    content = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*content[:4], b"{broken}\n", *content[4:-1], content[-1][:-30]]))
    result = report(path)
    assert result.exit_code == 0
    notes = [line for line in result.stdout.splitlines() if line.startswith("note")]
    assert notes[0].startswith(f"note    {path}: the last line is incomplete")
    assert notes[1] == f"note    {path}: 1 broken line(s) left out: line 5"
    text = Page(tmp_path / "out/index.html").text
    assert "the last line is incomplete" in text and "1 broken line(s) left out: line 5" in text
    assert "steps 1 to 19" in text


# ---- cost ----


def write_long(path, steps, names=150):
    """Steps of that many metrics, of which the report wants about 20."""
    data = training(1, np.random.default_rng(0), **{f"other/metric_{i}": 0.123456789 for i in range(names - 21)})
    body = json.dumps(data).removeprefix("{")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for step in range(1, steps + 1):
            validation = f'"{ACCURACY}": {step / steps:.4f}, ' if step % 20 == 0 else ""
            file.write(f'{{"step": {step}, "data": {{{validation}{body}}}\n')
    return path


def test_ten_thousand_steps(tmp_path, report):
    path = write_long(tmp_path / "run/metrics.jsonl", 10_000)
    start = time.monotonic()
    result = report(path)
    assert result.exit_code == 0, result.output
    assert time.monotonic() - start < 60
    (arm,) = json.loads((tmp_path / "out/summary.json").read_text())["arms"]
    # The table is of all values, not of those drawn: steps 8020 to 10,000.
    assert arm["steps"]["mean"] == 10_000
    assert arm["accuracy"]["geo"]["accuracy_late_mean"]["mean"] == pytest.approx(0.901)


def test_reading_is_linear_in_time_and_keeps_only_what_is_wanted(tmp_path):
    def seconds(path):
        rounds = []
        for _ in range(3):
            start = time.process_time()
            read_run(path)
            rounds.append(time.process_time() - start)
        return min(rounds)

    short, long = (write_long(tmp_path / f"{steps}.jsonl", steps) for steps in (500, 4000))
    # 8 where linear, 64 where quadratic.
    assert seconds(long) < 24 * seconds(short)
    tracemalloc.start()
    run = read_run(long)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(run.metrics) < 25
    assert peak < long.stat().st_size / 4


def test_the_command_imports_neither_torch_nor_verl_and_help_nothing_slow():
    slow = {"torch", "verl", "pandas", "numpy", "matplotlib", "ray"}
    for code, unwanted in (
        ("import sys; from verl_gndpo import cli", slow),
        ("import sys; from verl_gndpo.report import page", {"torch", "verl", "ray", "matplotlib.pyplot"}),
    ):
        printed = subprocess.run(
            [sys.executable, "-c", f"{code}; print(*sys.modules)"], capture_output=True, text=True, check=True
        ).stdout
        assert unwanted & set(printed.split()) == set()
    result = CliRunner().invoke(cli.app, ["report", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "--teacher-accuracy" in result.output
