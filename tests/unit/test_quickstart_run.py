# SPDX-License-Identifier: Apache-2.0
"""What the quickstart makes of verl's log; the run itself is `bash examples/quickstart.sh`."""

import json

import pytest

from examples.quickstart import run


def log(accuracies=((0, 0.4), (2, 0.7)), steps=2):
    accuracies = dict(accuracies)
    lines = [{"step": 0, "data": {run.ACCURACY: accuracies[0]}}]
    for step in range(1, steps + 1):
        data = {
            run.CORRELATION: 0.9999 - step * 1e-4,
            "gndpo/log_ratio/p01": -2.0,
            "gndpo/log_ratio/p99": 0.5,
            "gndpo/log_ratio/mean": -0.3,
            "actor/grad_norm": 1.5,
        }
        if step in accuracies:
            data[run.ACCURACY] = accuracies[step]
        lines.append({"step": step, "data": data})
    return lines


def test_summary_and_picture(tmp_path):
    summary = run.summarise(log(), teacher_accuracy=1.0, seconds=12.34)
    assert summary["steps"] == 2 and summary["seconds"] == 12.3
    assert (summary["accuracy_before"], summary["accuracy_after"], summary["teacher_accuracy"]) == (0.4, 0.7, 1.0)
    assert summary["gap_closed"] == pytest.approx(0.5)
    assert summary["rollout_actor_probs_pearson_corr_min"] == pytest.approx(0.9997)
    assert {"verl", "torch", "verl-gndpo"} <= summary["versions"].keys()
    json.dumps(summary)
    run.plot(log(), summary, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("lines", "what"), [(log(accuracies=((0, 0.4),)), "1 validations"), (log(steps=0), "0 training steps")]
)
def test_a_log_with_too_little_in_it_is_an_error(lines, what):
    with pytest.raises(ValueError, match=what):
        run.summarise(lines, teacher_accuracy=1.0, seconds=1.0)


def test_a_line_that_is_being_written_is_left_for_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert run.read_metrics(path) == []
    path.write_text('{"step":1,"data":{"a":1}}\n{"step":2,"da')
    assert run.read_metrics(path) == [{"step": 1, "data": {"a": 1}}]
