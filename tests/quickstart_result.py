# SPDX-License-Identifier: Apache-2.0
"""From the quickstart's checkpoint to its accuracy, by the commands of docs/after_training.md.

    bash examples/quickstart.sh trainer.save_freq=1000  # verl saves the last step, too
    python -m tests.quickstart_result

The accuracy has to be the one of verl's own last validation, and plain transformers has to give vLLM's answers.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from examples.quickstart.run import ACCURACY, SETTINGS, read_metrics

OUT = Path("outputs/quickstart")
COMPARED = 8
PLAIN = """
import io, json, sys

import pyarrow.parquet as pq
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, file, count, tokens = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
processor = AutoProcessor.from_pretrained(folder)
found = []
for row in pq.read_table(file).slice(0, int(count)).to_pylist():
    image = {"type": "image", "image": Image.open(io.BytesIO(row["images"][0]["bytes"]))}
    text = {"type": "text", "text": row["prompt"][0]["content"].removeprefix("<image>")}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [image, text]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=int(tokens), do_sample=False)
    found.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
assert "verl" not in sys.modules
print(json.dumps(found))
"""


def command(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "verl_gndpo.cli", *map(str, arguments)], check=True)


def main() -> None:
    model, evaluation, data = OUT / "model", OUT / "evaluation", OUT / "data" / "test.parquet"
    for folder in (model, evaluation):
        shutil.rmtree(folder, ignore_errors=True)
    command("export", OUT / "checkpoints", "--out", model, "--dtype", "float32")
    options = ["--max-prompt", SETTINGS["MAX_PROMPT"], "--max-response", SETTINGS["MAX_RESPONSE"], "--dtype", "float32"]
    options += ["--reward-function", "examples/quickstart/reward.py:compute_score", "--gpu-memory-utilization", "0.1"]
    command("evaluate", model, "--data", data, "--out", evaluation, *options)

    step, validated = [
        (line["step"], line["data"][ACCURACY])
        for line in read_metrics(OUT / "metrics.jsonl")
        if ACCURACY in line["data"]
    ][-1]
    saved = int((OUT / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert saved == step, f"the checkpoint is of step {saved}, the validation of step {step}"
    (found,) = json.loads((evaluation / "summary.json").read_text())["models"]["model"].values()
    print(f"step {step}: accuracy {found['accuracy'][0]} by evaluate, {validated} by verl's validation")
    assert abs(found["accuracy"][0] - validated) < 1e-9

    plain = [sys.executable, "-c", PLAIN, str(model), str(data), str(COMPARED), SETTINGS["MAX_RESPONSE"]]
    texts = json.loads(subprocess.run(plain, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    lines = (evaluation / "models" / "model" / "answers.jsonl").read_text().splitlines()
    answers = {entry["row"]: entry["answers"][0]["text"] for entry in map(json.loads, lines)}
    assert texts == [answers[row] for row in range(COMPARED)], (texts, answers)
    print(f"plain transformers gives the same {COMPARED} answers, such as {texts[0]!r}")


if __name__ == "__main__":
    main()
