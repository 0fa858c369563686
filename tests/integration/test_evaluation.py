# SPDX-License-Identifier: Apache-2.0
"""`verl-gndpo evaluate` with vLLM: its greedy answers are those of plain transformers, and are graded as such."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoProcessor, GenerationConfig
from typer.testing import CliRunner

from examples.quickstart import diagrams
from tests.integration import helpers
from tests.tiny_models import build_tiny
from verl_gndpo.cli import app
from verl_gndpo.evaluation.job import Answers, Job, digest
from verl_gndpo.evaluation.prompts import Prompts

COUNT, TOKENS = 12, 8


def test_greedy_answers_are_those_of_transformers(tmp_path):
    model = build_tiny("qwen2_5_vl", tmp_path / "model", seed=5)
    diagrams.write_dataset(tmp_path)
    table = pq.read_table(tmp_path / "test.parquet").slice(0, COUNT)
    rows = table.to_pylist()
    for row in rows:
        row["extra_info"]["answer_type"] = "number"
    data = tmp_path / "few.parquet"
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(table.schema.metadata), data)
    options = ["--max-prompt", 256, "--max-response", TOKENS, "--dtype", "float32", "--gpu-memory-utilization", 0.1]
    arguments = ["evaluate", model, "--data", data, "--out", tmp_path / "out", *options]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output

    prompts = Prompts(Job(str(model), [str(data)], [digest(data)], max_prompt=256, max_response=TOKENS), False)
    network, processor = helpers.load(model), AutoProcessor.from_pretrained(model)
    greedy = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    answers = Answers(tmp_path / "out" / "models" / "model" / "answers.jsonl")
    for row in range(COUNT):
        prompt, answer = prompts[row], answers[row]
        text = processor.tokenizer.decode(prompts.for_vllm(prompt)["prompt_token_ids"], skip_special_tokens=False)
        inputs = processor(text=[text], images=prompt.images, return_tensors="pt")
        assert inputs["input_ids"].tolist() == [prompt.ids] and len(prompt.ids) == answer["prompt_tokens"]
        with torch.inference_mode():
            output = network.generate(**inputs, generation_config=greedy)[0, len(prompt.ids) :]
        assert answer["answers"][0]["text"] == processor.tokenizer.decode(output, skip_special_tokens=True)
    (found,) = json.loads((tmp_path / "out" / "summary.json").read_text())["models"]["model"].values()
    assert found["problems"] == COUNT and 0 <= found["accuracy"][0] <= 1
