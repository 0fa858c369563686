# SPDX-License-Identifier: Apache-2.0
"""`verl-gndpo export` on checkpoints of verl's own engines: what plain transformers loads is what was trained."""

import base64
import io
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraModel, PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from tests.checkpoints import LOG_PROBS, Job, write_checkpoints
from tests.integration import helpers
from tests.tiny_models import build_tiny
from verl_gndpo.checkpoint import save_run
from verl_gndpo.cli import app
from verl_gndpo.export import command
from verl_gndpo.export.folders import ExportError

IMAGES = {"qwen2_5_vl": [1, 0, 2], "qwen3_vl": [1, 0, 2], "internvl": [1, 0, 2], "qwen2": [0, 0, 0]}
LENGTHS = [[5, 2], [9], [7]]
PROMPT = list(range(20, 40))


@dataclass(frozen=True)
class Case:
    family: str
    strategy: str
    lora: bool
    ranks: int

    def __str__(self):
        return f"{self.family}-{self.strategy}{'-lora' if self.lora else ''}-{self.ranks}"


CASES = [
    Case("qwen2_5_vl", "fsdp", False, 2),
    Case("qwen2_5_vl", "fsdp2", True, 2),
    Case("qwen2", "fsdp2", False, 2),  # with tied embeddings
    Case("qwen2", "fsdp", True, 2),
    Case("internvl", "fsdp2", False, 1),
    Case("qwen3_vl", "fsdp", True, 1),
    Case("qwen2", "fsdp", False, 1),
]
ADAPTERS = [case for case in CASES if case.lora]


@dataclass(frozen=True)
class Made:
    base: Path
    step: Path
    rows: list[dict]
    expected: list[torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return, by case, a checkpoint and the log-probs of the model that was trained."""
    root = tmp_path_factory.mktemp("checkpoints")
    bases = {family: build_tiny(family, root / family, seed=3) for family in IMAGES}
    rows = {family: helpers.make_rows(bases[family], IMAGES[family], LENGTHS) for family in IMAGES}
    jobs = {}
    for case in CASES:
        (root / str(case)).mkdir()
        folder = root / str(case) / "global_step_7"
        jobs[case] = Job(bases[case.family], folder, case.strategy, case.lora, rows[case.family])
    for ranks in (1, 2):
        write_checkpoints([job for case, job in jobs.items() if case.ranks == ranks], ranks)
    return {
        case: Made(job.model, job.folder, job.rows, torch.load(job.folder.parent / LOG_PROBS))
        for case, job in jobs.items()
    }


def run(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def exported(checkpoint, out, *options):
    result = run(checkpoint, "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert not list(out.parent.glob(f".{out.name}*"))
    return result.output


def largest(expected, scored):
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(expected, scored, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_transformers_scores_as_the_trained_model_did(made, case, tmp_path):
    one = made[case]
    exported(one.step, tmp_path / "out", "--dtype", "float32")
    assert largest(one.expected, helpers.hugging_face_log_probs(tmp_path / "out", one.rows, 1.0)) < 1e-4
    # The base model is another one, so that an export without the training would show.
    assert largest(one.expected, helpers.hugging_face_log_probs(one.base, one.rows, 1.0)) > 1e-2


@pytest.mark.parametrize("case", ADAPTERS, ids=str)
def test_adapters_on_the_base_model_score_as_the_trained_model_did(made, case, tmp_path, monkeypatch):
    one = made[case]
    out = tmp_path / "out"
    exported(one.step, out, "--adapter", "--base", one.base, "--dtype", "float32")
    plain = helpers.load
    monkeypatch.setattr(
        helpers, "load", lambda path: PeftModel.from_pretrained(plain(one.base), path).merge_and_unload()
    )
    assert largest(one.expected, helpers.hugging_face_log_probs(out, one.rows, 1.0)) < 1e-4
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(one.base)
    assert (settings["r"], settings["lora_alpha"]) == (4, 32)


def test_weights_are_rounded_once_and_everything_else_is_there(made, tmp_path):
    case, out = CASES[0], tmp_path / "out"
    exported(made[case].step, out)
    exported(made[case].step, tmp_path / "whole", "--dtype", "float32")
    rounded, whole = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert rounded.keys() == whole.keys()
    assert all(torch.equal(rounded[name], whole[name].bfloat16()) for name in whole)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    # A choice of the training, which the machine that loads the model may not have.
    assert "attn_implementation" not in config
    base = made[case].base
    assert GenerationConfig.from_pretrained(out).to_dict() == GenerationConfig.from_pretrained(base).to_dict()
    text = AutoProcessor.from_pretrained(base).chat_template
    assert AutoProcessor.from_pretrained(out).chat_template == text
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()


def test_a_checkpoint_is_found_by_any_of_its_folders(made, tmp_path):
    step = made[CASES[-1]].step
    (step.parent / "latest_checkpointed_iteration.txt").write_text("7")
    first = None
    for number, path in enumerate((step, step / "actor", step / "actor" / "huggingface", step.parent)):
        exported(path, tmp_path / str(number))
        weights = (tmp_path / str(number) / "model.safetensors").read_bytes()
        first = first or weights
        assert weights == first


def test_the_card_says_what_the_run_was(made, tmp_path):
    step = shutil.copytree(made[CASES[-1]].step, tmp_path / "run" / "global_step_7")
    log = tmp_path / "run" / "log.jsonl"
    entries = [
        {"step": 5, "data": {"val-core/geo/acc/mean@1": 0.25, "gndpo/k1": 0.5}},
        {"step": 7, "data": {"gndpo/k1": 0.125}},
        {"step": 10, "data": {"val-core/geo/acc/mean@1": 0.75, "gndpo/k1": 0.0625}},
    ]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    facts = {"base": "org/student", "teachers": ["org/teacher"], "train_files": ["a.parquet"], "val_files": []}
    save_run(step, facts | {"estimator": "gndpo", "signal": {"bound": "clip"}, "log": str(log), "versions": {}})
    assert "without" not in exported(step, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| weights | bfloat16, rounded from float32: log-probs of greedy tokens move by up to " in card
    assert "base_model: org/student\n" in card
    assert "\n# out\n" in card
    rows = ["base model | org/student", "teacher | org/teacher", "training data | a.parquet", "signal | gndpo"]
    rows += ["steps | 7", "accuracy on geo | 5 | 0.25"]
    assert all(f"| {row} |" in card for row in rows), card
    assert "| 7 | 0.125 |" in card and "0.0625" not in card

    (step / "gndpo_run.json").unlink()
    output = exported(step, tmp_path / "other", "--base", "org/other", "--log", log, "--dtype", "float32")
    assert "| weights | float32, as trained |" in (tmp_path / "other" / "README.md").read_text()
    assert "does not name" in output and "metrics" not in output
    assert "base_model: org/other\n" in (tmp_path / "other" / "README.md").read_text()


@pytest.mark.parametrize("what", ["weights", "merge", "read back"])
def test_a_wrong_export_is_an_error_and_leaves_nothing(made, tmp_path, monkeypatch, what):
    """Lose one layer's training where the weights are written, where adapters are merged, or where files are read."""
    case = next(case for case in CASES if case.lora is (what == "merge") and case.family == "qwen2")
    if what == "weights":
        write = command.write_model

        def spoiled(merger, weights, dtype):
            name = next(name for name in weights if name.endswith("1.mlp.up_proj.weight"))
            write(merger, weights | {name: weights[name] * 1.01}, dtype)

        monkeypatch.setattr(command, "write_model", spoiled)
    elif what == "merge":
        monkeypatch.setattr(LoraModel, "merge_and_unload", lambda model: model.unload())
    else:
        write = command.write_model

        def cut(merger, weights, dtype):
            write(merger, weights, dtype)
            path = Path(merger.config.target_dir) / "model.safetensors"
            path.write_bytes(path.read_bytes()[:-1000])

        monkeypatch.setattr(command, "write_model", cut)
    result = run(made[case].step, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith("error   ")
    assert not list(tmp_path.iterdir())


def test_adapters_alone_need_their_model(made, tmp_path):
    """`save_lora_only` writes no other weights."""
    one = made[Case("qwen3_vl", "fsdp", True, 1)]
    step = shutil.copytree(one.step, tmp_path / "global_step_7")
    (path,) = (step / "actor").glob("model_*.pt")
    whole = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in whole.items() if "lora_" in name}, path)
    result = run(step, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "give their model with --base" in result.output
    exported(step, tmp_path / "out", "--base", one.base, "--dtype", "float32")
    assert largest(one.expected, helpers.hugging_face_log_probs(tmp_path / "out", one.rows, 1.0)) < 1e-4


def test_what_the_merger_of_verl_makes_of_a_lora_run(made, tmp_path):
    """If this fails, verl merges adapters, and export could leave it to its merger."""
    from verl_gndpo.export.folders import find_checkpoint
    from verl_gndpo.export.weights import make_merger

    one = made[ADAPTERS[0]]
    make_merger(find_checkpoint(one.step), tmp_path, False).merge_and_save()
    merged = load_file(tmp_path / "model.safetensors")
    base = load_file(one.base / "model.safetensors")
    assert all(torch.equal(merged[name], base[name].bfloat16()) for name in base)


def test_export_error_is_one_line(made, tmp_path):
    with pytest.raises(ExportError, match="holds no LoRA adapters") as caught:
        command.export(made[CASES[-1]].step, tmp_path / "out", adapter=True)
    assert "\n" not in str(caught.value)


def test_vllm_answers_as_transformers_does(made, tmp_path):
    """With merged adapters. vLLM runs in a process of its own, as it changes much in its process.

    Benchmark suites ask by chat with images, so that vLLM needs the chat template and the processor too.
    """
    exported(made[ADAPTERS[0]].step, tmp_path / "out", "--dtype", "float32")
    drawn = io.BytesIO()
    Image.new("RGB", (84, 56), "red").save(drawn, "PNG")
    picture = {"url": f"data:image/png;base64,{base64.b64encode(drawn.getvalue()).decode()}"}
    question = {"type": "text", "text": "Which colour?"}
    asked = [{"role": "user", "content": [{"type": "image_url", "image_url": picture}, question]}]
    code = (
        "from vllm import LLM, SamplingParams\n"
        "if __name__ == '__main__':\n"
        f"    model = LLM({str(tmp_path / 'out')!r}, dtype='float32', enforce_eager=True, max_model_len=128,\n"
        "                gpu_memory_utilization=0.1)\n"
        "    greedy = SamplingParams(temperature=0, max_tokens=8, repetition_penalty=1.0)\n"
        f"    (answer,) = model.generate([{{'prompt_token_ids': {PROMPT}}}], greedy)\n"
        "    print('tokens:', *answer.outputs[0].token_ids)\n"
        f"    (answer,) = model.chat({asked}, greedy, use_tqdm=False)\n"
        "    print('prompt:', *answer.prompt_token_ids)\n"
    )
    (tmp_path / "serve.py").write_text(code)
    done = subprocess.run([sys.executable, str(tmp_path / "serve.py")], capture_output=True, text=True, timeout=300)
    printed = dict(line.split(":", 1) for line in done.stdout.splitlines() if line.startswith(("tokens:", "prompt:")))
    assert printed.keys() == {"tokens", "prompt"}, done.stderr[-2000:]
    ids = torch.tensor([PROMPT])
    greedy = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        output = helpers.load(tmp_path / "out").generate(ids, attention_mask=ids**0, generation_config=greedy)
    assert printed["tokens"].split() == [str(token) for token in output[0, len(PROMPT) :].tolist()]
    shown = [{"role": "user", "content": [{"type": "image", "image": Image.open(drawn)}, question]}]
    expected = AutoProcessor.from_pretrained(tmp_path / "out").apply_chat_template(
        shown, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert printed["prompt"].split() == [str(token) for token in expected["input_ids"][0]]
