# SPDX-License-Identifier: Apache-2.0
"""`verl-gndpo export` on what it can't export: one line that names the file and the remedy, and nothing is written."""

import json
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.tiny_models import build_tiny
from verl_gndpo.checkpoint import save_run
from verl_gndpo.cli import app


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny("qwen2", tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture
def step(model, tmp_path):
    """A checkpoint of two ranks that hold the same whole tensors, as verl saves what FSDP does not cut."""
    actor = tmp_path / "run" / "global_step_3" / "actor"
    shutil.copytree(model, actor / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
    state = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    for rank in range(2):
        torch.save(state, actor / f"model_world_size_2_rank_{rank}.pt")
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 2}))
    return actor.parent


def run(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def refused(out, *arguments):
    """Return the only line of the error."""
    before = sorted(out.parent.rglob("*"))
    result = run(*arguments, "--out", out)
    assert result.exit_code == 1, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("error   ")]
    assert len(lines) == 1 and result.output.endswith(lines[0] + "\n")
    assert sorted(out.parent.rglob("*")) == before
    return lines[0]


def spoil(step, name, change):
    path = step / "actor" / name
    change(path)
    return path


def test_an_intact_checkpoint_is_exported(step, tmp_path):
    assert run(step, "--out", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_attention_of_the_training_is_not_needed(step, tmp_path):
    """verl writes it into the config, and it may need a GPU."""

    def change(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_implementation": "flash_attention_2"}))

    spoil(step, "huggingface/config.json", change)
    result = run(step, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "attention_2" not in (tmp_path / "out" / "config.json").read_text()


def test_a_missing_rank(step, tmp_path):
    spoil(step, "model_world_size_2_rank_1.pt", lambda path: path.unlink())
    line = refused(tmp_path / "out", step)
    assert "1 of 2 ranks have no weights" in line and "first model_world_size_2_rank_1.pt -> copy" in line


@pytest.mark.parametrize("kept", [0, 10, 50_000, -100])
def test_a_truncated_file(step, tmp_path, kept):
    path = spoil(step, "model_world_size_2_rank_1.pt", lambda path: path.write_bytes(path.read_bytes()[:kept]))
    assert f"{path} is incomplete or damaged" in refused(tmp_path / "out", step)


def test_ranks_that_disagree(step, tmp_path):
    def change(path):
        state = torch.load(path)
        state["model.norm.weight"] += 1
        torch.save(state, path)

    spoil(step, "model_world_size_2_rank_1.pt", change)
    assert "rank 1 of" in refused(tmp_path / "out", step)


def test_code_in_a_checkpoint_is_not_run(step, tmp_path):
    spoil(step, "model_world_size_2_rank_1.pt", lambda path: torch.save({"a": _Runs(tmp_path / "ran")}, path))
    assert "is incomplete or damaged" in refused(tmp_path / "out", step)


class _Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_weights_of_another_model(step, tmp_path):
    def change(path):
        config = json.loads(path.read_text())
        config |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
        path.write_text(json.dumps(config))

    spoil(step, "huggingface/config.json", change)
    line = refused(tmp_path / "out", step)
    assert "lacks model.layers.2." in line and "environment of the training" in line
    spoil(step, "huggingface/config.json", lambda path: path.write_text(path.read_text().replace("256", "128")))
    assert "do not fit its config" in refused(tmp_path / "out", step)


@pytest.mark.parametrize("name", ["", "huggingface/", "huggingface/generation_", "huggingface/tokenizer_"])
def test_a_damaged_description(step, tmp_path, name):
    name = name + "config.json" if name else "fsdp_config.json"
    path = spoil(step, name, lambda path: path.write_text("{"))
    assert f"{path} is damaged" in refused(tmp_path / "out", step)


def test_a_missing_or_damaged_tokenizer(step, tmp_path):
    path = spoil(step, "huggingface/tokenizer.json", lambda path: path.write_text("{"))
    assert f"{path} is damaged" in refused(tmp_path / "out", step)
    for file in path.parent.glob("tokenizer*"):
        file.unlink()
    assert f"{path.parent} has no tokenizer -> copy" in refused(tmp_path / "out", step)


def test_a_checkpoint_of_no_ranks(step, tmp_path):
    path = spoil(step, "fsdp_config.json", lambda path: path.write_text('{"world_size": 0}'))
    assert f"{path} has no world_size of 1 or more" in refused(tmp_path / "out", step)


def test_a_note_on_the_run_that_is_none_is_left_out(step, tmp_path):
    (step / "gndpo_run.json").write_text('["a"]')
    result = run(step, "--out", tmp_path / "out")
    assert result.exit_code == 0 and "does not name" in result.output


def test_what_is_no_checkpoint(step, model, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("9")
    assert "does not exist" in refused(out, tmp_path / "nothing")
    assert "no file model_world_size_*_rank_*.pt" in refused(out, tmp_path)
    assert "is a Hugging Face model folder already" in refused(out, model)
    assert "names a step whose folder has no weights" in refused(out, tmp_path / "run")
    (tmp_path / "megatron" / "actor" / "dist_ckpt").mkdir(parents=True)
    assert "--backend megatron" in refused(out, tmp_path / "megatron")


def test_a_critic(step, tmp_path):
    def change(path):
        path.write_text(path.read_text().replace("Qwen2ForCausalLM", "Qwen2ForTokenClassification"))

    spoil(step, "huggingface/config.json", change)
    assert "writes no text" in refused(tmp_path / "out", step)


def test_options_that_do_not_fit(step, tmp_path):
    assert "leave out --adapter" in refused(tmp_path / "out", step, "--adapter")
    assert "nothing.jsonl" in refused(tmp_path / "out", step, "--log", tmp_path / "nothing.jsonl")


def test_the_folder_exists(step, tmp_path):
    (tmp_path / "out").mkdir()
    assert "exists already -> remove it" in refused(tmp_path / "out", step)


@pytest.mark.parametrize("limit", [100, 200_000])
def test_the_disk_is_full(step, tmp_path, limit):
    """Files may have so many bytes: not even a config, or only a part of the weights."""
    (tmp_path / "outs").mkdir()
    out = tmp_path / "outs" / "out"
    done = subprocess.run(
        [sys.executable, "-m", "verl_gndpo.cli", "export", str(step), "--out", str(out)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error   ")]
    assert f"{out} can't be written: " in line
    assert not list(out.parent.iterdir())


def test_the_folder_cannot_be_made(step, tmp_path):
    (tmp_path / "file").touch()
    assert "can't be written" in refused(tmp_path / "file" / "out", step)


@pytest.mark.parametrize("place", ["meta", "adapter"])
def test_the_scale_of_rank_stabilised_adapters_is_that_of_peft(step, model, tmp_path, place):
    """verl notes rank and alpha alone, so the rest is from our note on the run, or from the user."""
    torch.manual_seed(0)
    settings = {"r": 16, "lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"0.self_attn.q_proj": 3}}
    settings["rank_pattern"] = {"1.self_attn.v_proj": 4}
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **settings),
    )
    for rank in range(2):
        torch.save(adapted.state_dict(), step / "actor" / f"model_world_size_2_rank_{rank}.pt")
    meta = step / "actor" / "lora_train_meta.json"
    meta.write_text(json.dumps(settings if place == "meta" else {"r": 16, "lora_alpha": 8}))
    if place == "adapter":
        save_run(step, {"lora_adapter": str(tmp_path / "adapter"), "teachers": []})
        line = refused(tmp_path / "out", step)
        assert str(tmp_path / "adapter" / "adapter_config.json") in line
        assert f"write its use_rslora, rank_pattern, alpha_pattern into {meta}" in line
        adapted.save_pretrained(tmp_path / "adapter")
    else:
        meta.write_text(json.dumps(settings | {"rank_pattern": {}}))
        line = refused(tmp_path / "out", step)
        assert "1.self_attn.v_proj" in line and f"rank_pattern and alpha_pattern of the adapters into {meta}" in line
        meta.write_text(json.dumps(settings))
    result = run(step, "--out", tmp_path / "out", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    expected = adapted.merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items())
