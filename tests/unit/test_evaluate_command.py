# SPDX-License-Identifier: Apache-2.0
"""`verl-gndpo evaluate` on answers that are there already, and on what it can't use: no model is loaded."""

import base64
import json
import sys
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from verl_gndpo.cli import app
from verl_gndpo.evaluation import pool
from verl_gndpo.evaluation.job import Answers, Job, digest

PNG = b"\x89PNG\r\n\x1a\nnot a real one"


def rows(count):
    for index in range(count):
        meta = json.dumps({"subject": "math" if index % 2 else "physics"})
        info = {"id": f"mmk12-test-{index}", "split": "test", "index": index, "question": "<b>Which?</b>"}
        yield {
            "data_source": "FanqingM/MMK12",
            "prompt": [{"role": "user", "content": "Which?"}],
            "images": [{"bytes": PNG, "path": None}],
            "reward_model": {"style": "rule", "ground_truth": "B"},
            "extra_info": info | {"answer_type": "choice", "choices": ["1", "2", "3"], "meta": meta},
        }


@pytest.fixture
def data(tmp_path):
    pq.write_table(pa.Table.from_pylist(list(rows(40))), tmp_path / "test.parquet", row_group_size=7)
    return tmp_path / "test.parquet"


def model(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
    return tmp_path / name


def answer(out, path, data, texts, **more):
    """Write what a model answered, with a last line that a killed process left incomplete."""
    settings = {"answers": 1} | more
    folder = out / "models" / path.name
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(asdict(Job(str(path), [str(data)], [digest(data)], **settings))))
    lines = [
        json.dumps(
            {
                "row": row,
                "prefix": "",
                "prompt_tokens": 9,
                "answers": [{"text": text, "tokens": 5, "truncated": False}] * settings["answers"],
            }
        )
        for row, text in enumerate(texts)
    ]
    (folder / "answers.jsonl").write_text("\n".join(lines) + '\n{"row": 0, "pre')


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_answers_are_graded_compared_and_shown(tmp_path, data):
    good, bad, out = model(tmp_path, "good"), model(tmp_path, "bad"), tmp_path / "out"
    answer(out, good, data, [r"So \boxed{B}"] * 40)
    answer(out, bad, data, [r"So \boxed{C}"] * 30 + [r"So \boxed{2}"] * 8 + ["<think> B, or C"] * 2)
    result = run(good, bad, "--data", data, "--out", out)
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text())
    found = {label: sources["FanqingM/MMK12"] for label, sources in summary["models"].items()}
    assert (found["good"]["accuracy"][0], found["bad"]["accuracy"][0]) == (1.0, 0.2)
    assert found["bad"]["no_answer_found"] == pytest.approx(0.05)
    assert [one[:3] for one in found["bad"]["figures"]] == [["subject", "math", 0.2], ["subject", "physics", 0.2]]
    (compared,) = summary["comparisons"]
    assert compared["different"] and (compared["only_first"], compared["only_second"]) == (32, 0)
    assert compared["p"] == pytest.approx(2 / 2**32)
    settings = summary["settings"]
    assert settings["limit"] is None and (settings["n"], settings["temperature"], settings["seed"]) == (1, 0.0, 0)
    assert settings["data"] == [str(data)] and settings["data_sha256"] == [digest(data)]
    page = (out / "index.html").read_text()
    assert "All problems." in page
    assert base64.b64encode(PNG).decode() in page and "&lt;b&gt;Which?" in page and "32, 30 shown" in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_torn_last_line_is_cut_off(tmp_path, data):
    answer(tmp_path / "out", model(tmp_path, "m"), data, ["a", "b"])
    path = tmp_path / "out" / "models" / "m" / "answers.jsonl"
    assert Answers(path).lacking(range(3)) == [2]
    assert path.read_text().endswith("}\n") and Answers(path)[1]["answers"][0]["text"] == "b"


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    (line,) = result.output.splitlines()
    return line


def test_what_cannot_be_used_is_said_in_one_line(tmp_path, data):
    one, out = model(tmp_path, "one"), tmp_path / "out"
    assert "has no config.json" in refused(tmp_path / "none", "--data", data, "--out", out)
    assert "does not exist" in refused(one, "--data", tmp_path / "none.parquet", "--out", out)
    assert "no parquet file" in refused(one, "--data", one / "config.json", "--out", out)
    pq.write_table(pa.table({"question": ["a"]}), tmp_path / "other.parquet")
    assert "lacks prompt, data_source" in refused(one, "--data", tmp_path / "other.parquet", "--out", out)
    unknown = [row | {"data_source": "mine", "extra_info": {"id": "x"}} for row in rows(1)]
    pq.write_table(pa.Table.from_pylist(unknown), tmp_path / "unknown.parquet")
    assert "extra_info.answer_type" in refused(one, "--data", tmp_path / "unknown.parquet", "--out", out)
    actor = tmp_path / "global_step_3" / "actor"
    actor.mkdir(parents=True)
    (actor / "model_world_size_1_rank_0.pt").touch()
    assert "verl-gndpo export" in refused(tmp_path / "global_step_3", "--data", data, "--out", out)
    (one / "config.json").write_text('{"text_config": {"max_position_embeddings": 4096}}')
    assert "exceed the 4096 tokens" in refused(one, "--data", data, "--out", out)
    (one / "config.json").write_text("{}")
    assert "given twice" in refused(one, one, "--data", data, "--out", out)
    assert not out.exists()
    answer(out, one, data, [])
    assert "another --out" in refused(one, "--data", data, "--out", out, "--n", "2")


def test_a_model_that_fails_does_not_keep_others_from_answering(tmp_path, data, monkeypatch):
    first, second, third = (model(tmp_path, name) for name in ("first", "second", "third"))
    out = tmp_path / "out"
    answer(out, third, data, [r"\boxed{B}"] * 40)
    answers = (out / "models" / "third" / "answers.jsonl").read_text().rpartition("\n")[0] + "\n"
    # It stands in for vLLM: the second model is answered, and the first ends its process.
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys\n"
        "if '/first/' in sys.argv[1]: sys.exit(3)\n"
        "out = os.fdopen(int(sys.argv[3]), 'w')\n"
        "print(json.dumps({'ready': 99}), file=out, flush=True)\n"
        f"lines = open({str(tmp_path / 'lines')!r}).readlines()\n"
        "for row in sys.stdin:\n"
        "    if row.strip() == 'end': break\n"
        "    out.write(lines[int(row)]); out.flush()\n"
    )
    (tmp_path / "lines").write_text(answers)
    monkeypatch.setattr(pool, "WORKER", [sys.executable, str(script)])
    result = run(first, second, third, "--data", data, "--out", out)
    assert result.exit_code == 1
    line = result.output.splitlines()[-1]
    assert "first: a process that answers ended with exit code 3; more is in" in line
    assert line.endswith("; the 2 other model(s) are answered") and not (out / "summary.json").exists()
    assert run(second, third, "--data", data, "--out", out).exit_code == 0
    assert json.loads((out / "summary.json").read_text())["comparisons"][0]["different"] is False


@pytest.mark.parametrize("option", ["--chat-template-kwargs", "--mm-processor-kwargs"])
def test_an_option_that_is_no_json(tmp_path, data, option):
    one = model(tmp_path, "one")
    assert f"{option} [1] is no JSON object" in refused(one, "--data", data, "--out", tmp_path / "out", option, "[1]")


def test_answers_to_what_a_file_had_before_are_not_graded(tmp_path, data):
    one, out = model(tmp_path, "one"), tmp_path / "out"
    answer(out, one, data, [r"\boxed{B}"] * 40)
    changed = [row | {"reward_model": {"style": "rule", "ground_truth": "C"}} for row in rows(40)]
    pq.write_table(pa.Table.from_pylist(changed), data)
    assert "--data has changed since -> give another --out" in refused(one, "--data", data, "--out", out)
    assert not (out / "summary.json").exists()


def test_damaged_files_and_folders_are_named_and_stay(tmp_path, data):
    one, out = model(tmp_path, "one"), tmp_path / "out"
    pq.write_table(pq.read_table(data).slice(0, 0), tmp_path / "empty.parquet")
    assert "empty.parquet has no rows" in refused(
        one, "--data", data, "--data", tmp_path / "empty.parquet", "--out", out
    )
    (one / "tokenizer_config.json").write_text("{}")
    assert "has no chat template -> copy" in refused(one, "--data", data, "--out", out)
    (one / "chat_template.jinja").write_text("{{ messages }}")
    (one / "config.json").write_text("[]")
    assert "config.json holds no JSON object" in refused(one, "--data", data, "--out", out)
    (one / "config.json").write_text("{}")
    assert not out.exists()
    out.touch()
    assert f"--out {out} can't be used" in refused(one, "--data", data, "--out", out)
    out.unlink()
    answer(out, one, data, [r"\boxed{B}"] * 40)
    answers = out / "models" / "one" / "answers.jsonl"
    whole = answers.read_bytes()
    answers.write_bytes(b'{"row": \n' + whole)
    assert f"{answers}: line 1 is damaged -> delete this line" in refused(one, "--data", data, "--out", out)
    assert answers.read_bytes() == b'{"row": \n' + whole
    answers.write_bytes(whole)
    (out / "index.html").mkdir()
    assert "index.html" in refused(one, "--data", data, "--out", out)
    (out / "index.html").rmdir()
    assert run(one, "--data", data, "--out", out).exit_code == 0
    job = out / "models" / "one" / "job.json"
    job.write_text("{")
    assert f"{job} is damaged" in refused(one, "--data", data, "--out", out)


REWARD = """
async def graded(data_source, solution_str, ground_truth, extra_info, **kwargs):
    right = solution_str == str(ground_truth) and (extra_info.pop("num_turns"), extra_info["index"]) != (2, 3)
    return {"score": 0.5, "acc": right}

def partly(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": 0.25}

def broken(data_source, solution_str, ground_truth, extra_info=None):
    raise KeyError("no key")

name = "graded"
"""


@pytest.fixture
def plain(tmp_path):
    """Write rows as verl's own examples have them: a source that we do not know, a number as truth, and no id."""
    rows = [
        {
            "data_source": "mine",
            "prompt": [{"role": "user", "content": "Which?"}],
            "reward_model": {"style": "rule", "ground_truth": index % 2},
            "extra_info": {"index": index},
        }
        for index in range(10)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "plain.parquet")
    return tmp_path / "plain.parquet"


def test_the_reward_function_of_the_run_grades_rows_that_only_it_knows(tmp_path, plain):
    one, out = model(tmp_path, "one"), tmp_path / "out"
    (tmp_path / "reward.py").write_text(REWARD)
    answer(out, one, plain, ["0", "1", "0", "1", "1", "0", "0", "1", "0", "1"])
    assert "--reward-function PATH:NAME" in refused(one, "--data", plain, "--out", out)
    arguments = [one, "--data", plain, "--out", out, "--reward-function"]
    assert run(*arguments, f"{tmp_path / 'reward.py'}:graded").exit_code == 0
    summary = json.loads((out / "summary.json").read_text())
    # Rows 4 and 5 are wrong, and the function refuses row 3. Truths of 0 count, and so does each row by itself.
    found = summary["models"]["one"]["mine"]
    assert found["problems"] == 10 and found["accuracy"][0] == 0.7
    assert found["accuracy"][1:] == pytest.approx([0.3968, 0.8922], abs=1e-4)  # Wilson's interval of 7 in 10
    assert summary["settings"]["reward_function"].endswith("reward.py:graded")
    # What the function takes out of extra_info is there again for the next answer to the row.
    answer(tmp_path / "two", one, plain, ["0"] * 10, answers=2)
    named = f"{tmp_path / 'reward.py'}:graded"
    two = run(one, "--data", plain, "--out", tmp_path / "two", "--n", 2, "--reward-function", named)
    assert two.exit_code == 0, two.output
    for name, reason in (
        ("partly", f"row 0 of {plain}, returned {{'score': 0.25}}, and an accuracy is 0 or 1"),
        ("broken", f"row 0 of {plain}, failed: KeyError: 'no key'"),
        ("absent", "reward.py:absent can't be loaded"),
        ("name", "is no function"),
        ("", "names no function -> give PATH:NAME"),
    ):
        assert reason in refused(*arguments, f"{tmp_path / 'reward.py'}:{name}")
    assert "none.py:graded can't be loaded: FileNotFoundError" in refused(*arguments, f"{tmp_path / 'none.py'}:graded")


def test_rows_without_names_are_problems_of_their_own(tmp_path, plain):
    """Rows of one group are drawn together, so that one group would have no interval."""
    table = pq.read_table(plain).drop_columns(["extra_info"])
    pq.write_table(table, plain)
    one, out = model(tmp_path, "one"), tmp_path / "out"
    (tmp_path / "reward.py").write_text("def same(data_source, solution_str, ground_truth, extra_info):\n return 1.0\n")
    answer(out, one, plain, ["0"] * 10)
    assert run(one, "--data", plain, "--out", out, "--reward-function", f"{tmp_path}/reward.py:same").exit_code == 0
    found = json.loads((out / "summary.json").read_text())["models"]["one"]["mine"]
    assert found["accuracy"] == pytest.approx([1.0, 0.7225, 1.0], abs=1e-4)


def test_two_seeds_of_one_model_are_not_called_different(tmp_path):
    """They disagree on 5 of 12 questions. Each has five versions, which must not count as evidence of their own."""
    problems = [
        {
            "data_source": "AI4Math/MathVerse",
            "prompt": [{"role": "user", "content": "Which?"}],
            "reward_model": {"style": "rule", "ground_truth": "B"},
            "extra_info": {
                "id": f"mathverse-testmini-{question}-{version}",
                "answer_type": "choice",
                "choices": ["1", "2"],
                "meta": json.dumps({"problem_index": str(question), "problem_version": version}),
            },
        }
        for question in range(12)
        for version in ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only")
    ]
    data, out = tmp_path / "mathverse.parquet", tmp_path / "out"
    pq.write_table(pa.Table.from_pylist(problems), data)
    seeds = [model(tmp_path, f"seed_{seed}") for seed in range(3)]
    for seed, right in zip(seeds, ({0, 1, 2, 3, 5, 6}, {4, 5, 6}, {0, 1, 4, 5, 6}), strict=True):
        answer(out, seed, data, [r"\boxed{B}" if row // 5 in right else r"\boxed{A}" for row in range(60)])
    assert run(*seeds, "--data", data, "--out", out).exit_code == 0
    comparisons = json.loads((out / "summary.json").read_text())["comparisons"]
    assert (comparisons[0]["only_first"], comparisons[0]["only_second"]) == (20, 5)
    # The sign-flip test of 4 questions against 1; McNemar's of 20 problems against 5 would give 0.004.
    assert comparisons[0]["p"] == pytest.approx(2 * 6 / 32, abs=0.02)
    assert [one["different"] for one in comparisons] == [False] * 3
