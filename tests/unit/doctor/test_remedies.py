# SPDX-License-Identifier: Apache-2.0
"""The doctor's remedies that are overrides or commands: each is applied as it stands, and its finding is gone."""

import ast
import json
import re
import shlex
import shutil
from pathlib import Path

import peft
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import verl_gndpo.doctor
from tests.unit.doctor.helpers import OURS, write_sources
from verl_gndpo.cli import app
from verl_gndpo.doctor.inputs import Inputs
from verl_gndpo.doctor.models import check_models
from verl_gndpo.doctor.run import run_checks

OVERRIDE = re.compile(r"\+{0,2}((?:[a-z_0-9]+\.)*[a-z_0-9]+)=([^\s,;=][^\s,;]*)")
ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{name}" for name in ("actor", "rollout", "model"))

FOUND_BY = {
    "data.train_batch_size=40": "not enough for data.train_batch_size=40",
    "reward.reward_manager.name=dapo": "no answers in",
    "trainer.use_v1=False": "trainer.use_v1=False",
    "critic.enable=True": "critic.enable=True",
    "algorithm.adv_estimator=grpo": "the section teacher has no effect",
    "algorithm.use_kl_in_reward=True": "algorithm.use_kl_in_reward=True is ignored",
    "trainer.critic_warmup=3": "trainer.critic_warmup=3 is ignored",
    f"{ACTOR}.use_prefix_grouper=True": "use_prefix_grouper=True is ignored",
    "algorithm.filter_groups.enable=True": "algorithm.filter_groups.enable=True is ignored",
    f"{ROLLOUT}.load_format=dummy": "load_format=dummy",
    f"{ROLLOUT}.free_cache_engine=True": "sleep mode",
    f"{MODEL}.override_config.attn_implementation=flash_attention_2": "flash_attention_2, needs an accelerator",
    "trainer.device=cuda": "trainer.device=cuda",
    "ray_kwargs.ray_init.num_gpus=0": "Ray counts fewer than 1 GPUs",
    f"{MODEL}.lora_rank=8": "LoRA adapters in the vision tower",
    f"{ACTOR}.freeze_vision_tower=True {ACTOR}.strategy=fsdp": "flattens frozen and trained weights",
    f"algorithm.gndpo.baseline=kl {MODEL}.use_fused_kernels=True": "never computes the student's logits",
    f"algorithm.gndpo.baseline=kl {ACTOR}.ulysses_sequence_parallel_size=2": "spreads a row's logits",
    "algorithm.gndpo.baseline=kl algorithm.rollout_correction.bypass_mode=True": "skips the student's pass",
    f"{OURS[0]} reward.custom_reward_function.name=nope": "no function",
    "actor_rollout_ref.rollout.name=null": "actor_rollout_ref.rollout.name is not set",
    f"{ROLLOUT}.top_p=0.9": "top_p=0.9",
    f"algorithm.gndpo.rollout_seed=1 {ROLLOUT}.name=sglang": "is not given seeds",
    "algorithm.gndpo.rollout_seed=1 trainer.v1.trainer_mode=colocate_async": "does not make a run",
    f"student.share_prompts=True {MODEL}.use_fused_kernels=True": "replaces the output projection",
    f"student.share_prompts=True {ACTOR}.pad_to_length=True": "pads micro-batches",
    f"student.share_prompts=True {ACTOR}.ulysses_sequence_parallel_size=2": "spreads a sequence over ranks",
}
"""By the overrides that spoil a run, words of the finding."""

NOT_HERE = {
    "trainer.n_gpus_per_node": "a remedy asks for other numbers, which only the user knows",
    "trainer.v1.trainer_mode": "names another program",
    "teacher.backend": "servers need GPUs of their own; tests/unit/doctor/test_doctor_settings.py",
    "teacher.ulysses_sequence_parallel_size": "tests/unit/doctor/test_doctor_models.py",
    "teacher.sharing": "tests/unit/doctor/test_doctor_models.py",
    "teacher.from_distillation": "tests/unit/doctor/test_doctor_settings.py",
    "distillation.enabled": "tests/unit/doctor/test_doctor_settings.py",
    "trainer.save_freq": "tests/unit/doctor/test_doctor_settings.py",
    "data.max_prompt_length": "tests/unit/doctor/test_doctor_rows.py",
    "data.filter_overlong_prompts": "tests/unit/doctor/test_doctor_rows.py",
    "student.share_prompts": "turns off what the finding is about",
    "recipe": "a group of Hydra; tests/unit/doctor/test_doctor_settings.py",
}
"""Settings in remedies that no case here applies, and why or where it is done."""


@pytest.mark.parametrize("spoil", FOUND_BY)
def test_the_remedy_remedies(make_config, on_cpu, tmp_path, spoil):
    def findings(*overrides):
        config = make_config(*spoil.split(), *overrides)
        return [
            check
            for check in run_checks(config)
            if check.status in ("error", "warning") and FOUND_BY[spoil] in check.detail
        ]

    (check,) = findings()
    applied = [f"{key}={value}" for key, value in OVERRIDE.findall(first_alternative(check.remedy))]
    assert applied, check.remedy
    assert not findings(*applied)


def first_alternative(remedy: str) -> str:
    """Return what a remedy names first; the parts of one alternative are separated by spaces."""
    return remedy.split(" or ")[0].split(", or")[0]


def test_a_source_without_a_grader_gets_ours(make_config, on_cpu, tmp_path):
    for split in ("train", "test"):
        make_config()
        write_sources(tmp_path / f"{split}.parquet", ["FanqingM/MMK12"])
    from verl_gndpo.doctor.data import check_rewards
    from verl_gndpo.doctor.inputs import Inputs

    (check,) = check_rewards(Inputs(make_config()))
    applied = [f"{key}={value}" for key, value in OVERRIDE.findall(check.remedy)]
    assert check.status == "error" and len(applied) == 2
    assert not check_rewards(Inputs(make_config(*applied)))


@pytest.mark.parametrize("given", [".", "actor", "actor/huggingface", ".."])
def test_a_checkpoint_becomes_a_model_by_the_command_that_the_error_names(make_config, student, tmp_path, given):
    """Each folder of a checkpoint of a LoRA run is refused as a teacher, and what the command makes is accepted."""
    step = tmp_path / "my run" / "global_step_7"
    trained = write_lora_checkpoint(student, step)
    (step.parent / "latest_checkpointed_iteration.txt").write_text("7")
    config = make_config(teacher=(step / given).resolve())
    (check,) = [c for c in check_models(Inputs(config)) if c.status == "error"]
    assert "is a checkpoint of verl" in check.detail
    command, out = re.search(r"exported: (verl-gndpo export .+), and then give (.+)$", check.detail).groups()
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    assert not [c for c in check_models(Inputs(make_config(teacher=out))) if c.status == "error"]
    # It is the trained model, which verl's own merger would lose.
    merged = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).state_dict()
    for name, weight in trained.items():
        torch.testing.assert_close(merged[name], weight.bfloat16().float(), rtol=0, atol=1e-2)
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    base = AutoModelForImageTextToText.from_pretrained(student, dtype=torch.float32).state_dict()
    assert (trained[name] - base[name]).abs().max() > 0.1


def write_lora_checkpoint(base, step):
    """Write a checkpoint of one rank as verl does, and return the weights with merged adapters."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    actor = step / "actor"
    shutil.copytree(base, actor / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(adapted.state_dict(), actor / "model_world_size_1_rank_0.pt")
    (actor / "lora_train_meta.json").write_text(json.dumps({"r": 2, "lora_alpha": 64, "task_type": "CAUSAL_LM"}))
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 1, "world_size": 1}))
    return adapted.merge_and_unload().state_dict()


def test_every_setting_that_a_remedy_names_is_applied_here_or_elsewhere(make_config):
    """A new remedy has to get a case."""
    named = set()
    for path in Path(verl_gndpo.doctor.__file__).parent.glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("Check", "error") and call.args[1:]:
                for part in ast.walk(call.args[-1]):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        named |= {key for key, _ in OVERRIDE.findall(part.value)}
    spoiled = {override.split("=")[0] for spoil in FOUND_BY for override in spoil.split()}
    config = make_config()
    unknown = {key for key in named if OmegaConf.select(config, key, default="no") == "no"} - NOT_HERE.keys()
    assert not unknown, "a remedy names a setting that does not exist"
    assert len(named) >= 8
    assert not named - spoiled - NOT_HERE.keys(), "add a case to FOUND_BY, or a reason to NOT_HERE"
