# SPDX-License-Identifier: Apache-2.0
"""Test `verl-gndpo report`: what it reads, the figures of its table, what it draws and writes. Needs no verl."""

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

from tests.helpers import trace_of
from verl_gndpo import cli
from verl_gndpo.observe.worst_tokens import FILE_NAME as WORST_TOKENS
from verl_gndpo.report import drawing, page, plots, table
from verl_gndpo.report.drawing import Picture
from verl_gndpo.report.logs import WANTED, Arm, ReportError, Run, read_arms, read_run
from verl_gndpo.report.timing import seconds_by_stage

ACCURACY = "val-core/geo/acc/mean@1"
GRADIENT = "actor/grad_norm"
LEVELS = ("p01", "p05", "p50", "p95", "p99")
KINDS = ("gain", "sign_flip_share", "truncated_share_rise", "correlation", "data_source_gradient_share")
# The groups of a metric that is logged by group, in place of its *.
GROUPS = {
    "position": [str(part) for part in range(10)],
    "token": ["eos", "digits", "format", "vision_adjacent", "other"],
    "data_source": ["geo", "chart/qa"],
    "teacher": ["math", "math+chart"],
}


def by_group(name):
    """Return the names of a plot's metric: one for each group if it is logged by group."""
    return [name.replace("*", group) for group in (GROUPS[name.split("/")[1]] if "*" in name else [""])]


# All metrics that are drawn, the plugin's and verl's.
DRAWN = [
    *(name for p in plots.PLOTS for m in p.metrics for pattern in m.names for name in by_group(pattern)),
    *(f"gndpo/log_ratio/{name}" for name in ("mean", *LEVELS)),
    *(f"gndpo/warning/{kind}" for kind in KINDS),
]


def lines(*entries):
    return b"".join(json.dumps({"step": step, "data": data}).encode() + b"\n" for step, data in entries)


def training(step, generator, **more):
    """Return nearly what verl and the plugin log in a step."""
    values = dict(zip(DRAWN, (0.1 + 0.8 * generator.random(len(DRAWN))).round(6).tolist(), strict=True))
    stages = {"gen": 2.5, "adv": 0.1, "update_actor": 1.5, "teacher_log_prob": 0.5}
    return {
        **values,
        **{f"gndpo/warning/{kind}": float(step % 4 == 0) for kind in KINDS},
        **{f"timing_s/{name}": value for name, value in stages.items()},
        **{"timing_s/step": sum(stages.values()) + 0.2, "timing_s/agent_loop/slowest/wait": 1.0, "gndpo/tokens": 9.0},
        **more,
    }


def write_run(path, steps=20, every=5, seed=0, source="geo"):
    """Write a whole run that is validated before the first step and after `every` steps. Return its entries."""
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
    """Draw no plots: they take most of the time, and many tests are of other things."""
    monkeypatch.setattr(page, "draw_plots", lambda arms, teacher: [])


@pytest.fixture
def unpainted(monkeypatch):
    """Make figures but don't render them."""
    monkeypatch.setattr(drawing, "png", lambda figure: b"PNG of " + figure.get_suptitle().encode())


def plot(name, arms):
    """Return the figure of a plot, None if it isn't drawn, and its picture."""
    (found,) = (p for p in plots.PLOTS if p.name == name)
    picture = Picture(found)
    return found.draw(picture, arms, table.Teacher(None, {})), picture


def arm(label, *runs):
    """Make an arm from {metric: {step: value}} for each run."""
    return Arm(
        label, [Run(label, {name: pd.Series(values, dtype=float) for name, values in run.items()}) for run in runs]
    )


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else []


def points(line):
    return dict(line.get_xydata().tolist())


def lines_of(axes):
    """Return the points of each line, in the order drawn, without single points and lines across the axes."""
    return [points(line) for line in axes.lines if len(line.get_xdata()) > 1 and list(line.get_xdata()) != [0, 1]]


class Page(HTMLParser):
    """Read the text and the images of a page, and what it would load or run."""

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
    # A line is whole as soon as its last brace is there, without the line break.
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
    assert run.notes[0].startswith(f"{len(junk)} broken line(s) skipped: line 2")


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
    assert run.notes == ("1 broken line(s) skipped: line 2",)


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
        "steps after 3, up to 4, are from before the last resume",
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
        (lines((1, {"train/loss": 1})), "has 1 entries, but no metric that a report uses"),
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


def test_the_worst_tokens_beside_a_log_are_not_taken_for_it(tmp_path, report, log):
    worst = log(b'{"step": 10, "rank": 1, "log_ratio": -9.5}\n', f"run/{WORST_TOKENS}")
    with pytest.raises(ReportError, match=r"run has no metrics\.jsonl"):
        read_arms([str(tmp_path / "run")])
    log(lines((1, {GRADIENT: 1})), "run/experiment.jsonl")
    (found,) = read_arms([str(tmp_path / "run")])
    assert found.runs[0].path.name == "experiment.jsonl"
    result = report(worst)
    assert result.exit_code == 1 and f"{worst} has no metrics of verl's file logger" in result.stderr


def test_a_run_that_goes_on_is_read_as_far_as_it_is(log):
    step = [lines((i, {GRADIENT: i, ACCURACY: 0.1 * i})) for i in range(1, 4)]
    path = log(step[0] + step[1][:30])
    with path.open("ab") as file:
        run = read_run(path)
        assert run.metrics[GRADIENT].to_dict() == {1: 1}
        assert run.notes == ("the last line is incomplete (the run is going on, or was killed) and is skipped",)
        file.write(step[1][30:-1])
        file.flush()
        # The line is whole, though its line break isn't written yet.
        assert read_run(path).metrics[GRADIENT].to_dict() == {1: 1, 2: 2} and read_run(path).notes == ()
        file.write(step[1][-1:] + step[2])
    assert read_run(path).metrics[GRADIENT].to_dict() == {1: 1, 2: 2, 3: 3} and read_run(path).notes == ()


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


def evaluation(limit=None, **models):
    """What `verl-gndpo evaluate` writes, as far as the report reads it."""
    found = {
        name: {source: {"problems": 40, "accuracy": [share, 0.0, 1.0]} for source, share in sources.items()}
        for name, sources in models.items()
    }
    return {"settings": {"n": 1, "temperature": 0.0, "limit": limit}, "models": found}


@pytest.mark.parametrize(
    ("content", "arguments", "teacher", "note"),
    [
        (evaluation(big={"geo": 0.7, "other": 0.2}), [], 0.7, "big, n=1, temperature 0.0, problems: 40 of geo"),
        (evaluation(big={"geo": 0.7}), ["--teacher-accuracy", "0.8"], 0.8, "summary.json: big"),
        (evaluation(big={"other": 0.7}), [], 0.95, "problems: 40 of other"),
        (evaluation(limit=40, big={"geo": 0.7}), [], 0.95, "only the first 40 problems of each file"),
        (evaluation(big={"geo": 0.7}, small={"geo": 0.5}), [], 0.95, "no evaluation of one model"),
        ([], [], 0.95, "no evaluation of one model"),
        (None, [], 0.95, "can't be read (JSONDecodeError)"),
    ],
)
def test_an_evaluation_of_the_teacher_is_found(tmp_path, report, undrawn, content, arguments, teacher, note):
    write_run(tmp_path / "run/metrics.jsonl")
    (tmp_path / "run/summary.json").write_text('{"teacher_accuracy": 0.95}')
    (tmp_path / "run/teacher").mkdir()
    (tmp_path / "run/teacher/summary.json").write_text(json.dumps(content) if content is not None else "{")
    assert report(tmp_path / "run", *arguments).exit_code == 0
    (arm,) = json.loads((tmp_path / "out/summary.json").read_text())["arms"]
    assert arm["runs"][0]["teacher_accuracy"] == {"geo": teacher}
    assert any(note in one and "teacher/summary.json" in one for one in arm["runs"][0]["notes"])


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ("90", "give a share between 0 and 1"),
        ("nan", "give a share"),
        ("most", "give a share"),
        ("geo=", "give a share"),
        ("math=0.9", "no such data source in the runs -> give one of: chart, geo"),
        ("0.9", "several data sources -> SOURCE=0.9, one of: chart, geo"),
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
    names = [*DRAWN, ACCURACY, "timing_s/step", "timing_s/gen"]
    assert [name for name in names if not WANTED.fullmatch(name)] == []
    for name in ("timing_s/agent_loop/slowest/wait", "gndpo/tokens", "gndpo/position/x/k1", "gndpo/teacher/a/k3"):
        assert not WANTED.fullmatch(name)


def test_every_metric_of_the_plugin_is_drawn_or_excluded_on_purpose():
    torch = pytest.importorskip("torch")
    from verl_gndpo.config import Warn, read_signal_config
    from verl_gndpo.observe import metrics
    from verl_gndpo.observe.limits import SignalWarnings

    config = read_signal_config({}, "gndpo").signal
    teacher, old = torch.randn(2, 4, 20).clamp(max=0) - 0.1
    tokens = metrics.Tokens(trace_of(teacher, old, torch.ones(4, 20), config))
    lengths, classes = np.full(4, 20), np.arange(80, dtype=np.uint8) % 5
    parts = metrics.sum_parts(tokens, lengths)
    logged = {
        **metrics.describe_signal(tokens),
        **metrics.describe_positions(parts),
        **metrics.describe_classes(tokens, classes),
        **metrics.describe_sources(tokens, parts, ["geo", "geo", "chart/qa", "chart/qa"]),
        **metrics.describe_teachers(["math", "math", "math+chart", "math+chart"], tokens),
        **metrics.describe_responses(tokens, lengths, classes),
        # Of verl, and of the teachers' clients.
        "training/rollout_actor_probs_pearson_corr": 1.0,
        "gndpo/teacher_ahead_share": 1.0,
    }
    logged |= SignalWarnings(Warn()).check(1, logged)[0]
    assert {name for name in DRAWN if name.startswith("gndpo/")} - logged.keys() == set()
    not_drawn = re.compile(
        r"gndpo/(tokens|log_ratio/(std|min|max)|response/length_mean|data_source/.+/(sign_flip_share|tokens)"
        r"|teacher/.+/(?!k1$|sigma$).+)"
    )
    assert [name for name in logged if (WANTED.fullmatch(name) is None) != bool(not_drawn.fullmatch(name))] == []


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_line_is_the_median_and_its_band_the_range(seeds):
    _, (axes,) = drawing.figure(1)
    runs = [pd.Series([1.0, 2.0 + i, math.nan, 4.0], [0, 1, 2, 3]) for i in range(seeds)]
    line = drawing.line(axes, runs, drawing.style(0))
    np.testing.assert_array_equal(line.get_xydata(), [[0, 1], [1, 2 + (seeds - 1) / 2], [2, math.nan], [3, 4]])
    assert len(axes.collections) == (seeds > 1)
    if seeds > 1:
        (path, *_) = axes.collections[0].get_paths()
        assert {tuple(point) for point in path.vertices} >= {(1.0, 2.0), (1.0, 4.0)}


def test_a_long_line_keeps_extremes_and_gaps():
    values = pd.Series(np.sin(np.arange(10_000)))
    values[1234], values[7000], values[4000:4030] = 50.0, -50.0, math.nan
    drawn = drawing.thin(values)
    assert len(drawn) <= 3 * drawing.BINS
    assert drawn[1234] == 50 and drawn[7000] == -50 and drawn.loc[3990:4040].isna().any()
    assert drawn.index.is_monotonic_increasing and drawn.dropna().equals(values[drawn.dropna().index])
    smooth = drawing.smooth(values)
    assert smooth[4000:4030].isna().all() and smooth.abs().max() < 1
    short = values[:50]
    assert drawing.smooth(short) is short and drawing.thin(short) is short


def test_the_marks_of_the_gradient_are_over_all_steps_and_runs():
    gradients = [{step: float(step) for step in range(1, 101)}, {50: 400.0}]
    figure, _ = plot("grad_norm", [arm("a", *({GRADIENT: values} for values in gradients))])
    assert legend(figure) == ["gradient norm", "median 51", "p95 96", "max 400 at step 50"]
    long = "a label of its settings, lr=1e-6 and more, as long as that"
    figure, _ = plot("grad_norm", [arm(long, {GRADIENT: gradients[0]}), arm("b", {GRADIENT: gradients[1]})])
    # The long label doesn't push the figures out of the legend.
    assert legend(figure)[0] == f"{long}: median 50.5, p95 95, max 100 at step 100"
    assert drawing.is_wide(figure)


def test_metrics_of_one_unit_share_axes_for_one_arm_only():
    names = ("top_1pct_gradient_share", "effective_sample_share", "advantage_kurtosis", "advantage_abs_max")
    run = {f"gndpo/{name}": {1: i + 0.5, 2: i + 0.25} for i, name in enumerate(names)}
    figure, picture = plot("concentration", [arm("a", run)])
    assert picture.metrics == [f"gndpo/{name}" for name in names] and picture.remarks == []
    assert [axes.get_ylabel() for axes in figure.axes] == ["share", "excess kurtosis", "max |A|"]
    drawn = [[points(line) for line in axes.lines] for axes in figure.axes]
    assert drawn == [[{1: 0.5, 2: 0.25}, {1: 1.5, 2: 1.25}], [{1: 2.5, 2: 2.25}], [{1: 3.5, 2: 3.25}]]
    other = {"gndpo/advantage_kurtosis": {1: 9.0}, "gndpo/advantage_abs_max": {1: None}}
    figure, picture = plot("concentration", [arm("a", run), arm("b", other)])
    drawn = [[points(line) for line in axes.lines] for axes in figure.axes]
    assert drawn == [[{1: 0.5, 2: 0.25}], [{1: 1.5, 2: 1.25}], [{1: 2.5, 2: 2.25}, {1: 9.0}], [{1: 3.5, 2: 3.25}]]
    assert legend(figure) == ["a", "b"]
    assert picture.remarks == [
        "not in the log of b: gndpo/top_1pct_gradient_share, gndpo/effective_sample_share",
        "never finite in the log of b: gndpo/advantage_abs_max",
    ]


@pytest.mark.parametrize(
    ("name", "panels", "metrics"),
    [
        ("kl", 1, ["gndpo/k1", "gndpo/k3"]),
        ("clipping", 1, ["gndpo/clipped_low_share", "gndpo/clipped_high_share"]),
        ("beyond", 1, [f"gndpo/log_ratio/beyond_{nats}_share" for nats in (1, 5, 10)]),
        ("teacher_ahead", 1, ["gndpo/teacher_ahead_share"]),
        (
            "response_length",
            3,
            [
                *("response_length/mean", "gndpo/response/length_p95", "response_length/max"),
                *("response_length/clip_ratio", "gndpo/response/truncated_share", "gndpo/response/eos_share"),
            ],
        ),
    ],
)
def test_what_a_plot_is_made_of(name, panels, metrics):
    run = {metric: {1: 0.1 * i + 0.1, 3: 0.05} for i, metric in enumerate(metrics)}
    figure, picture = plot(name, [arm("a", run)])
    assert picture.metrics == metrics
    assert [points(line) for axes in figure.axes for line in axes.lines] == list(run.values())
    assert len(figure.axes) == panels
    assert len(legend(figure)) == (len(metrics) if len(metrics) > 1 else 0)


def test_bands_of_the_log_ratio_are_between_medians_over_runs():
    levels = dict(zip(LEVELS, (-4.0, -2.0, -0.1, 0.5, 1.0), strict=True)) | {"mean": -0.3}
    runs = [
        {f"gndpo/log_ratio/{name}": {1: factor * value, 2: value} for name, value in levels.items()}
        for factor in (1, 2, 6)
    ]
    figure, picture = plot("log_ratio", [arm("a", *runs)])
    (axes,) = figure.axes
    assert lines_of(axes) == [{1: -0.6, 2: -0.3}, {1: -0.2, 2: -0.1}]
    wide, narrow = ({tuple(point) for point in area.get_paths()[0].vertices} for area in axes.collections)
    assert {(1, -8), (2, -4), (1, 2), (2, 1)} <= wide and {(1, -4), (2, -2), (1, 1), (2, 0.5)} <= narrow
    assert (1, -4) not in wide
    assert legend(figure) == ["mean", "median", "p01 to p99", "p05 to p95"]
    assert picture.metrics == [f"gndpo/log_ratio/{name}" for name in ("mean", "p50", "p01", "p99", "p05", "p95")]


def test_half_a_band_is_not_drawn():
    whole = {f"gndpo/log_ratio/{name}": {1: i, 2: i} for i, name in enumerate(LEVELS)}
    pair = {f"gndpo/log_ratio/{name}": whole[f"gndpo/log_ratio/{name}"] for name in ("p01", "p05", "p95")}
    half = {"gndpo/log_ratio/p01": {1: -9.0, 2: -9.0}}
    figure, picture = plot("log_ratio", [arm("whole", whole), arm("half", half), arm("pair", pair)])
    assert [axes.get_title() for axes in figure.axes] == ["whole", "pair"]
    assert [len(axes.collections) for axes in figure.axes] == [2, 1]
    # The panels have the same range.
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    assert "not in the log of half, pair: gndpo/log_ratio/p50, gndpo/log_ratio/p99" in picture.remarks
    figure, picture = plot("log_ratio", [arm("half", half)])
    assert figure is None and picture.remarks == ["no run logs gndpo/log_ratio/mean"]


def along(values):
    """Return what a run logs: at each step and for each tenth but the last, the value times 1 + the tenth."""
    return {
        f"gndpo/position/{part}/{name}": {step: sign * value * (1 + part) for step, value in values.items()}
        for name, sign in (("k1", 1), ("advantage_abs_mean", 2))
        for part in range(9)
    }


def test_positions_of_one_run_by_fifths_of_its_steps():
    figure, picture = plot("positions", [arm("a", along({step: float(step) for step in range(1, 11)}))])
    assert picture.metrics == ["gndpo/position/*/k1", "gndpo/position/*/advantage_abs_mean"]
    assert legend(figure) == ["steps 1 to 2", "steps 3 to 4", "steps 5 to 6", "steps 7 to 8", "steps 9 to 10"]
    means = [1.5, 3.5, 5.5, 7.5, 9.5]
    middles = [5.0 + 10 * part for part in range(9)]
    for axes, factor in zip(figure.axes, (1, 2), strict=True):
        for line, mean in zip(axes.lines, means, strict=True):
            assert points(line) == pytest.approx({x: factor * mean * (1 + i) for i, x in enumerate(middles)})


def test_positions_of_several_runs_early_and_late():
    runs = [along({step: factor * step for step in range(1, 101)}) for factor in (1.0, 2.0, 6.0)]
    diverged = along({step: 1.0 if step < 50 else math.nan for step in range(1, 101)})
    figure, _ = plot("positions", [arm("a", *runs), arm("b", diverged)])
    early, late, other = figure.axes[0].lines
    assert (early.get_linestyle(), late.get_linestyle(), other.get_linestyle()) == ("--", "-", "--")
    # The fifths of steps 1 to 100 begin at 1 and at 81 (0.8 * 99 + 1 = 80.2).
    assert points(early)[5] == pytest.approx(2 * 10.5) and points(late)[85] == pytest.approx(2 * 90.5 * 9)
    (band,) = figure.axes[0].collections
    assert {tuple(x) for x in band.get_paths()[0].vertices.round(6)} >= {(5.0, 90.5), (5.0, 543.0)}
    assert set(points(other).values()) == set(range(1, 10))
    # The run that diverged is in the legend, too.
    assert legend(figure) == ["a", "b", "first fifth of a run’s steps", "last fifth"]


def test_groups_of_one_arm_are_lines():
    names = [name for m in ("k1", "advantage_abs_mean", "share") for name in by_group(f"gndpo/token/*/{m}")]
    run = {name: {1: i, 2: i + 0.5} for i, name in enumerate(names) if "digits/k1" not in name}
    figure, picture = plot("token_classes", [arm("a", run)])
    assert picture.metrics == ["gndpo/token/*/k1", "gndpo/token/*/advantage_abs_mean", "gndpo/token/*/share"]
    assert legend(figure) == ["digits", "eos", "format", "other", "vision_adjacent"]
    colours = {}
    for axes, metric in zip(figure.axes, ("k1", "advantage_abs_mean", "share"), strict=True):
        groups = [group for group in sorted(GROUPS["token"]) if f"gndpo/token/{group}/{metric}" in run]
        drawn = {tuple(points(line).items()): line.get_color() for line in axes.lines}
        wanted = {group: tuple(run[f"gndpo/token/{group}/{metric}"].items()) for group in groups}
        assert drawn.keys() == set(wanted.values())
        for group in groups:
            # A group has one colour in all panels, also if a panel lacks another group.
            assert colours.setdefault(group, drawn[wanted[group]]) == drawn[wanted[group]]
    assert len(set(colours.values())) == len(GROUPS["token"])


def test_groups_of_several_arms_are_rows_early_and_late():
    def run(factor):
        return {
            f"gndpo/data_source/{source}/{name}": {step: factor * (10 * i + step) for step in range(1, 6)}
            for i, source in enumerate(("chart/qa", "geo"))
            for name in ("k1", "gradient_share", "share")
        }

    one_source = {name: values for name, values in run(5).items() if "/geo/" in name}
    figure, picture = plot("data_sources", [arm("a", run(1), run(3)), arm("b", one_source)])
    assert picture.metrics == [f"gndpo/data_source/*/{name}" for name in ("k1", "gradient_share", "share")]
    assert picture.remarks == []
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["chart/qa", "geo"]
    dots = {line.get_markerfacecolor(): [] for line in axes.lines if line.get_marker() == "o"}
    for line in axes.lines:
        if line.get_marker() == "o":
            ((x, y),) = line.get_xydata().round(6).tolist()
            dots[line.get_markerfacecolor()].append((x, y))
    a, b = (drawing.style(i)["color"] for i in range(2))
    low, high = round(1 / 3 - 0.5, 6), round(2 / 3 - 0.5, 6)
    assert dots == {
        # Each of steps 1 to 5 is a fifth. The median is over 1 and 3 times the value.
        "none": [(2.0, low), (22.0, 1 + low), (55.0, 1 + high)],
        a: [(10.0, low), (30.0, 1 + low)],
        b: [(75.0, 1 + high)],
    }
    ranges = [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "None" and line.get_color() == a]
    assert ranges == [[5.0, 15.0], [15.0, 45.0]]
    assert legend(figure) == ["a", "b", "first fifth of a run’s steps", "last fifth"]


def test_more_groups_than_colours_are_rows_also_for_one_arm():
    run = {
        f"gndpo/teacher/t{i}/{name}": {1: 0.1, 2: 0.2}
        for i in range(len(drawing.COLOURS) + 1)
        for name in ("k1", "sigma")
    }
    figure, _ = plot("teachers", [arm("a", run)])
    assert len(figure.axes[0].get_yticklabels()) == len(drawing.COLOURS) + 1
    assert legend(figure) == ["first fifth of a run’s steps", "last fifth"]
    del run["gndpo/teacher/t0/k1"], run["gndpo/teacher/t0/sigma"]
    figure, _ = plot("teachers", [arm("a", run)])
    assert legend(figure) == [f"t{i}" for i in range(1, len(drawing.COLOURS) + 1)]


def bars(axes):
    """Return the first and the last step of each interval, by collection."""
    boxes = [[path.get_extents() for path in collection.get_paths()] for collection in axes.collections]
    return [[(box.x0 + 0.5, box.x1 - 0.5) for box in found] for found in boxes]


def test_warnings_are_drawn_where_they_were_raised():
    steps = range(1, 21)
    raised = {
        # 0.5: raised in one of two updates.
        "gain": {step: 0.5 if step in (3, 4, 5, 9, 20) else 0.0 for step in steps},
        "correlation": {step: float(step == 2) for step in steps if step < 11},
        "sign_flip_share": dict.fromkeys(steps, 0.0),
    }
    run = {f"gndpo/warning/{kind}": values for kind, values in raised.items()}
    quiet = {"gndpo/warning/gain": dict.fromkeys(steps, 0.0)}
    figure, picture = plot("warnings", [arm("loud", run), arm("quiet", quiet), arm("bare", {GRADIENT: {1: 1.0}})])
    (axes,) = figure.axes
    assert picture.metrics == ["gndpo/warning/*"]
    assert picture.remarks == ["not in the log of bare: gndpo/warning/*", "no warning of sign_flip_share"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["correlation", "gain"]
    assert bars(axes) == [[(2, 2)], [(3, 5), (9, 9), (20, 20)], []]
    judged = [(line.get_xdata()[0], line.get_xdata()[-1]) for line in axes.lines]
    assert judged == [(1, 10), (1, 20), (1, 20)]
    assert legend(figure) == ["loud", "quiet"]
    figure, picture = plot("warnings", [arm("quiet", quiet)])
    assert figure is None and picture.remarks == ["no warning of gain"]


def test_warnings_of_a_long_run_are_few_shapes_and_none_is_lost():
    steps = range(1, 10_001)
    often = {step: float(step % 2) for step in steps}
    rare = {step: float(step in (4000, 9999)) for step in steps}
    figure, _ = plot("warnings", [arm("a", {"gndpo/warning/a": often, "gndpo/warning/b": rare})])
    all_of_it, (first, second) = bars(figure.axes[0])
    assert len(all_of_it) == 1
    assert first[0] <= 4000 <= first[1] < first[0] + 50 and second[0] <= 9999 <= second[1]


@pytest.mark.parametrize(("name", "metric"), [("sign_flips", "sign_flip_share"), ("token_classes", "token/eos/share")])
def test_shares_begin_at_0_and_none_is_at_the_edge(name, metric):
    for values, end in (([0.5, 0.5], 0.525), ([0.0, 0.0], 1.0)):
        figure, _ = plot(name, [arm("a", {f"gndpo/{metric}": dict(enumerate(values))})])
        assert figure.axes[-1].get_ylim() == (0, pytest.approx(end))
    several, _ = plot("token_classes", [arm(label, {"gndpo/token/eos/share": {1: 0.5}}) for label in "ab"])
    assert several.axes[0].get_xlim() == (0, pytest.approx(0.525))


def test_stages_and_the_rest_add_up_to_the_step():
    timing = {"gen": {1: 2.0, 2: 4.0}, "adv": {1: 0.5}, "testing": {1: 9.0}, "step": {1: 3.0, 2: 3.0}}
    seconds = seconds_by_stage(arm("a", {f"timing_s/{name}": values for name, values in timing.items()}))
    assert seconds.loc[1].to_dict() == {"adv": 0.5, "gen": 2.0, "testing": 9.0, "other": 0.5}
    assert seconds.loc[2, "other"] == 0


def test_a_stage_timed_within_another_is_subtracted_from_it():
    timing = {"gen": 2.0, "adv": 0.5, "gndpo_diagnostics": 0.2, "teacher_ahead": 1.5, "step": 3.0}
    run = {f"timing_s/{name}": {1: value} for name, value in timing.items()}
    seconds = seconds_by_stage(arm("a", run)).loc[1]
    # The teacher's head start runs in parallel with the rollout.
    assert seconds.to_dict() == pytest.approx({"gen": 2.0, "adv": 0.3, "gndpo_diagnostics": 0.2, "other": 0.5})
    # With baseline=kl verl's timer of the student's pass includes the teacher's: together they exceed the step.
    run |= {"timing_s/old_log_prob": {1: 0.4}, "timing_s/teacher_log_prob": {1: 0.3}, "timing_s/step": {1: 2.95}}
    seconds = seconds_by_stage(arm("a", run)).loc[1]
    assert seconds["old_log_prob"] == pytest.approx(0.1) and seconds["teacher_log_prob"] == pytest.approx(0.3)
    assert seconds.sum() == pytest.approx(2.95)
    run["timing_s/step"] = {1: 3.5}
    assert seconds_by_stage(arm("a", run)).loc[1, "old_log_prob"] == pytest.approx(0.4)


def test_the_diagnostics_are_shown_however_short_they_are():
    stages = {f"stage_{i}": 9.0 - i for i in range(8)} | {"adv": 0.5, "gndpo_diagnostics": 0.01, "step": 50.0}
    run = {f"timing_s/{name}": {1: value, 2: value} for name, value in stages.items()}
    figure, picture = plot("timing", [arm("a", run)])
    assert picture.metrics == ["timing_s/*"]
    # Six stages and the diagnostics have a colour; "other" is the other stages and the rest of the step.
    shown = [f"stage_{i} {9 - i} s" for i in range(6)]
    assert legend(figure) == [*shown, "gndpo_diagnostics 0.01 s", f"other {50 - sum(range(4, 10)) - 0.01:.3g} s"]
    figure, _ = plot("timing", [arm("a", run), arm("b", {"timing_s/gen": {1: 4.0, 2: 6.0}})])
    widths = {bar.get_facecolor(): bar.get_width() for bar in figure.axes[0].patches if bar.get_y() > 0.5}
    assert sorted(widths.values()) == [0] * (len(widths) - 1) + [5.0]


def test_plots_that_a_run_lacks_are_not_drawn_and_the_page_says_why(tmp_path, report, log, unpainted):
    write_run(tmp_path / "full/metrics.jsonl")
    bare = log(lines((1, {GRADIENT: 1.0, ACCURACY: 0.5}), (2, {GRADIENT: 2.0})), "bare/metrics.jsonl")
    assert report(bare).exit_code == 0
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names == {"accuracy.png", "grad_norm.png"}
    text = Page(tmp_path / "out/index.html").text
    assert "Gain: no run logs gndpo/gain" in text and "Time per stage: no run logs timing_s/*" in text
    assert report(tmp_path / "full", bare).exit_code == 0
    text = Page(tmp_path / "out/index.html").text
    assert "Not in the log of bare: gndpo/gain." in text and "Not drawn" not in text
    assert report(f"arm={tmp_path / 'full'}", f"arm={bare}").exit_code == 0
    assert "Not in the log of arm (1 of 2 runs): gndpo/gain." in Page(tmp_path / "out/index.html").text
    # The next report removes the PNGs that it doesn't have.
    assert len(list((tmp_path / "out").glob("*.png"))) == len(plots.PLOTS)
    assert report(bare).exit_code == 0
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == names


# One plot for each way of drawing.
WAYS = ("accuracy", "grad_norm", "warnings", "log_ratio", "positions", "teachers", "timing")


@pytest.mark.parametrize("values", [[1e300, -1e99, None, 2], [None], [0.0], [5e-324, 1e-9, 1.0, 1e9] * 30])
@pytest.mark.filterwarnings("error")
def test_no_value_is_too_odd_to_draw(log, values):
    names = [*DRAWN, ACCURACY, "timing_s/gen", "timing_s/step"]
    path = log(lines(*((step, dict.fromkeys(names, value)) for step, value in enumerate(values))))
    (one,) = read_arms([str(path)])
    finite = any(value is not None and abs(value) < 1e100 for value in values)
    raised = any(value and 0 < value < 1e100 for value in values)
    for name in WAYS:
        figure, _ = plot(name, [one])
        assert (figure is not None) == (raised if name == "warnings" else finite)
        several, _ = plot(name, [one, Arm("again", one.runs)])
        assert (several is None) == (figure is None)
        if figure is not None:
            assert drawing.png(figure).startswith(b"\x89PNG")


# ---- the page ----


def test_the_page_is_whole_by_itself(tmp_path, report):
    write_run(tmp_path / "run/metrics.jsonl")
    result = report(tmp_path / "run")
    assert result.exit_code == 0
    *notes, last = result.stdout.splitlines()
    assert last == f"report of 1 run(s): {tmp_path}/out/index.html"
    assert notes[2] == f"note    {tmp_path}/run/metrics.jsonl: gain warning in 5 of 20 steps, first at step 4"
    assert len(notes) == len(KINDS)
    shown = Page(tmp_path / "out/index.html")
    assert "script" not in shown.tags and "link" not in shown.tags and shown.loads == []
    assert len(shown.sources) == len(plots.PLOTS)
    pngs = {path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    for source in shown.sources:
        png = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        assert png in pngs
        image = Image.open(io.BytesIO(png))
        # Half the page or all of it.
        assert image.width in (648, 1296) and len(image.convert("L").getcolors()) > 10
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
    assert drawing.one_line("_hidden\n label", 60) == " _hidden label"
    assert len(drawing.one_line("x" * 500, 60)) < 65


def test_each_file_is_written_whole_or_not_at_all(tmp_path, report, monkeypatch, unpainted):
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
    assert notes[1] == f"note    {path}: 1 broken line(s) skipped: line 5"
    text = Page(tmp_path / "out/index.html").text
    assert "the last line is incomplete" in text and "1 broken line(s) skipped: line 5" in text
    assert "steps 1 to 19" in text


# ---- cost ----


def write_long(path, steps, names=180):
    """Write steps with `names` metrics each. The report uses most of them."""
    data = training(1, np.random.default_rng(0))
    data |= {f"other/metric_{i}": 0.123456789 for i in range(names - len(data))}
    body = json.dumps(data).removeprefix("{")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for step in range(1, steps + 1):
            validation = f'"{ACCURACY}": {step / steps:.4f}, ' if step % 20 == 0 else ""
            file.write(f'{{"step": {step}, "data": {{{validation}{body}}}\n')
    return path


def test_ten_thousand_steps(tmp_path, report, unpainted):
    path = write_long(tmp_path / "run/metrics.jsonl", 10_000)
    start = time.monotonic()
    result = report(path)
    assert result.exit_code == 0, result.output
    assert time.monotonic() - start < 60
    (arm,) = json.loads((tmp_path / "out/summary.json").read_text())["arms"]
    # The table uses all values, not only those drawn: steps 8020 to 10,000.
    assert arm["steps"]["mean"] == 10_000
    assert arm["accuracy"]["geo"]["accuracy_late_mean"]["mean"] == pytest.approx(0.901)


def test_reading_is_linear_in_time_and_keeps_only_what_is_wanted(tmp_path):
    def seconds(path):
        rounds = []
        for _ in range(2):
            start = time.process_time()
            read_run(path)
            rounds.append(time.process_time() - start)
        return min(rounds)

    short, long = (write_long(tmp_path / f"{steps}.jsonl", steps) for steps in (200, 1000))
    # 5 where linear, 25 where quadratic.
    assert seconds(long) < 12 * seconds(short)
    tracemalloc.start()
    run = read_run(long)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not any(name.startswith("other/") for name in run.metrics)
    values = sum(map(len, run.metrics.values()))
    # A step and a value take 8 bytes each; there are three copies while they are read and sorted.
    assert 1000 * (len(DRAWN) - 1) < values and peak < 3 * 16 * values


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
