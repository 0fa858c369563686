# SPDX-License-Identifier: Apache-2.0
"""`verl-gndpo evaluate` with vLLM in its own processes and on a server: the greedy answers are transformers' own."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoProcessor, GenerationConfig

from examples.quickstart import diagrams
from tests.integration import helpers
from tests.tiny_models import build_tiny
from verl_gndpo.evaluation.job import Answers, Job, digest
from verl_gndpo.evaluation.prompts import Prompts

COUNT, COMPARED, SERVED, TOKENS = 300, 12, 40, 8
LENGTHS = ["--max-prompt", "256", "--max-response", str(TOKENS)]
OFFLINE = ["--dtype", "float32", "--gpu-memory-utilization", "0.1"]
KEY = "sk-of-the-test"


def evaluate(model, data, out, *options, **environment) -> subprocess.Popen:
    command = [sys.executable, "-m", "verl_gndpo.cli", "evaluate", model, "--data", data, "--out", out, *LENGTHS]
    return subprocess.Popen(
        [*map(str, command), *options],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Return a model, problems with one image and, last but one, with three, and offline answers to them.

    One of two engines is killed while they answer. A second run answers the rest with one engine.
    """
    root = tmp_path_factory.mktemp("asked")
    model = build_tiny("qwen2_5_vl", root / "model", seed=5)
    diagrams.write_dataset(root)
    table = pq.read_table(root / "test.parquet").slice(0, COUNT)
    rows = table.to_pylist()
    for row in rows:
        row["extra_info"]["answer_type"] = "number"
    rows[COMPARED - 2]["prompt"][0]["content"] = "<image>Ünï — <image>码 <image>?"
    rows[COMPARED - 2]["images"] = [rows[place]["images"][0] for place in range(3)]
    data = root / "few.parquet"
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(table.schema.metadata), data)

    out = root / "out"
    answers = out / "models" / "model" / "answers.jsonl"
    first = evaluate(model, data, out, *OFFLINE, "--data-parallel", "2")
    while not (answers.exists() and answers.stat().st_size):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.01)
    workers = [one for one in psutil.Process(first.pid).children() if "worker" in " ".join(one.cmdline())]
    assert len(workers) == 2
    family = [member for worker in workers for member in [worker, *worker.children(recursive=True)]]
    os.kill(workers[0].pid, signal.SIGKILL)
    output, _ = first.communicate(timeout=300)
    assert first.returncode == 1 and "was killed by signal 9" in output, output
    assert not psutil.wait_procs(family, timeout=5)[1]
    kept = answers.read_text()
    finish(evaluate(model, data, out, *OFFLINE))
    assert answers.read_text().startswith(kept)
    return model, data, out


def test_greedy_answers_are_those_of_transformers(asked):
    model, data, out = asked
    lines = (out / "models" / "model" / "answers.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["row"] for line in lines) == list(range(COUNT))
    prompts = Prompts(Job(str(model), [str(data)], [digest(data)], max_prompt=256, max_response=TOKENS), False)
    network, processor = helpers.load(model), AutoProcessor.from_pretrained(model)
    greedy = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    answers = Answers(out / "models" / "model" / "answers.jsonl")
    for row in range(COMPARED):
        prompt, answer = prompts[row], answers[row]
        assert len(prompt.images) == (3 if row == COMPARED - 2 else 1)
        text = processor.tokenizer.decode(prompts.for_vllm(prompt)["prompt_token_ids"], skip_special_tokens=False)
        inputs = processor(text=[text], images=prompt.images, return_tensors="pt")
        assert inputs["input_ids"].tolist() == [prompt.ids] and len(prompt.ids) == answer["prompt_tokens"]
        with torch.inference_mode():
            output = network.generate(**inputs, generation_config=greedy)[0, len(prompt.ids) :]
        assert answer["answers"][0]["text"] == processor.tokenizer.decode(output, skip_special_tokens=True)
    (found,) = json.loads((out / "summary.json").read_text())["models"]["model"].values()
    assert found["problems"] == COUNT and 0 <= found["accuracy"][0] <= 1


@pytest.fixture(scope="module")
def server(asked, tmp_path_factory):
    """Serve the model with vLLM, behind a key."""
    model, _, _ = asked
    url = f"http://127.0.0.1:{helpers.free_port()}"
    command = [Path(sys.executable).with_name("vllm"), "serve", str(model), "--served-model-name", "mine"]
    command += ["--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--api-key", KEY, "--enforce-eager"]
    command += ["--dtype", "float32", "--max-model-len", "264", "--gpu-memory-utilization", "0.1"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            command,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 600
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def test_a_server_gives_the_same_answers(asked, server, tmp_path):
    model, data, out = asked
    options = ["--limit", str(SERVED), "--server", server, "--tokenizer", str(model), "--api-key-env", "OUR_KEY"]
    said = finish(evaluate("mine", data, tmp_path / "served", *options, OUR_KEY=KEY))
    folder = tmp_path / "served" / "models" / "mine"
    served, offline = (Answers(path / "answers.jsonl") for path in (folder, out / "models" / "model"))
    assert [served[row] for row in range(SERVED)] == [offline[row] for row in range(SERVED)]
    settings = json.loads((tmp_path / "served" / "summary.json").read_text())["settings"]
    assert settings["limit"] == SERVED and settings["servers"] == {"mine": f"{server}/v1"}
    assert settings["prompts_unchecked"] == []
    written = [path.read_text(errors="replace") for path in (tmp_path / "served").rglob("*") if path.is_file()]
    assert KEY not in said and not any(KEY in text for text in written)


def test_what_a_server_can_be_asked_is_checked(asked, server, tmp_path):
    _, data, _ = asked
    options = ["--limit", "2", "--server", server]

    def refused(name: str, *more: str, key: str = KEY) -> str:
        process = evaluate(name, data, tmp_path / str(len(list(tmp_path.iterdir()))), *options, *more, OUR_KEY=key)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 1 and "wrong-key" not in output, output
        return output.splitlines()[-1]

    assert "refuses a request without a key" in refused("mine")
    key = ["--api-key-env", "OUR_KEY"]
    assert "refuses the key in OUR_KEY" in refused("mine", *key, key="wrong-key")
    assert "serves mine and not other -> give MODEL as the server has it" in refused("other", *key)
    assert "has a context of 264 tokens" in refused("mine", *key, "--max-response", "9")
    # Another template than the server's.
    changed = build_tiny("qwen2_5_vl", tmp_path / "changed", seed=5)
    path = changed / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "helper"))
    line = refused("mine", *key, "--tokenizer", str(changed))
    assert "makes another prompt of it than training" in line and "instead of" in line and "helper" in line
