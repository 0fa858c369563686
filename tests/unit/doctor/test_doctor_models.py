# SPDX-License-Identifier: Apache-2.0
"""Student, teachers and processor: each problem names what, where and what to do."""

import json
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants as hub

from examples.quickstart.tiny_vlm import build_tokenizer
from tests import zoo
from tests.unit.doctor.helpers import IMAGES, PROMPT, edit, errors, expect, length, write
from verl_gndpo.doctor import models
from verl_gndpo.doctor.architecture import check_architectures
from verl_gndpo.doctor.inputs import Inputs


def check_models(config):
    return models.check_models(Inputs(config))


def test_lora_adapters_that_vllm_would_ignore(make_config):
    lora = "actor_rollout_ref.model.lora_rank=8"
    expect(check_models(make_config(lora)), "warning", "LoRA adapters in the vision tower", "freeze_vision_tower=True")
    frozen = check_models(make_config(lora, "actor_rollout_ref.actor.freeze_vision_tower=True"))
    expect(frozen, "ok", "LoRA trains the language model only", "lora.merge=True")
    assert not [check for check in frozen if check.status == "warning" and "LoRA" in check.detail]
    for remedy in ("exclude_modules=visual", "lora.merge=True"):
        checks = check_models(make_config(lora, f"actor_rollout_ref.model.{remedy}"))
        assert not [check for check in checks if "LoRA" in check.detail]


def test_heads_that_cannot_be_dealt_out_to_the_ranks_of_a_row(make_config):
    checks = check_models(make_config("teacher.ulysses_sequence_parallel_size=3"))
    expect(checks, "error", "ulysses_sequence_parallel_size=3", "4 attention heads")


def test_each_of_several_teachers_is_compared_with_the_student(make_config, student, teacher):
    edit(teacher / "config.json", lambda c: c.update(image_token_id=7))
    several = (f"teacher.models.good.path={student}", f"teacher.models.bad.path={teacher}")
    checks = check_models(make_config("teacher.model.path=null", *several))
    expect(checks, "error", "config.image_token_id")
    assert len(errors(checks)) == 1


def test_vocabularies_padded_to_other_sizes_are_one_family(make_config, teacher, student):
    edit(teacher / "config.json", lambda c: c["text_config"].update(vocab_size=576))
    checks = check_models(make_config(teacher=teacher))
    expect(checks, "ok", f"same {length(student)} tokens", "padded to 448 (student) and 576 (teacher)")
    assert {check.status for check in checks} == {"ok"}


def test_two_tokens_that_have_changed_places(make_config, teacher):
    def swap(content):
        vocab = content["model"]["vocab"]
        first, second = list(vocab)[300:302]
        vocab[first], vocab[second] = vocab[second], vocab[first]

    edit(teacher / "tokenizer.json", swap)
    check = expect(check_models(make_config(teacher=teacher)), "error", "2 tokens have other ids", "student", "teacher")
    assert check.name == "tokenizer"
    assert "student's family" in check.remedy


def test_a_tokenizer_trained_on_something_else(make_config, teacher, student):
    build_tokenizer(["entirely different words, learned from elsewhere"]).save_pretrained(teacher)
    checks = check_models(make_config(teacher=teacher))
    expect(checks, "error", f"of the student's {length(student)} tokens are not in the teacher's")


def test_a_vision_tower_with_other_patches(make_config, teacher):
    edit(teacher / "config.json", lambda c: c["vision_config"].update(patch_size=16))
    checks = check_models(make_config(teacher=teacher))
    expect(checks, "error", "config.vision_config.patch_size: student 14, teacher 16")


def test_text_only_models(make_config, student, text_model):
    checks = check_models(make_config(f"actor_rollout_ref.model.path={text_model}", teacher=text_model))
    assert not errors(checks)
    expect(checks, "ok", f"same {length(student)} tokens and special ids; vocabularies")


def test_a_student_whose_processor_verl_would_do_without(make_config, teacher, student):
    edit(teacher / "processor_config.json", lambda c: c.update(processor_class="InternVLProcessor"))
    edit(teacher / "tokenizer_config.json", lambda c: c.update(processor_class="InternVLProcessor"))
    checks = check_models(make_config(f"actor_rollout_ref.model.path={teacher}", teacher=student))
    expect(checks, "error", "verl can't use the processor of", str(teacher), "images would be lost")


def test_a_model_that_is_elsewhere_is_copied_and_compared(make_config, teacher, monkeypatch):
    edit(teacher / "config.json", lambda c: c.update(image_token_id=7))
    monkeypatch.setattr("verl.utils.fs.copy_to_local", lambda path: {"hdfs://host/teacher": str(teacher)}[path])
    expect(check_models(make_config(teacher="hdfs://host/teacher")), "error", "config.image_token_id")


def test_a_model_that_can_t_be_copied_is_not_trusted(make_config):
    checks = check_models(make_config(teacher="hdfs://host/teacher"))
    expect(checks, "error", "hdfs://host/teacher can't be copied here", "correct teacher.model.path")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/no/where", "teacher folder /no/where does not exist"),
        ("some/deep/folder", "teacher folder some/deep/folder does not exist"),
        ("./teacher", "teacher folder ./teacher does not exist"),
        (__file__, "is a file"),
    ],
)
def test_a_wrong_teacher_path_asks_no_hub(make_config, monkeypatch, name, words):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *a, **k: pytest.fail("asked"))
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda *a, **k: pytest.fail("asked"))
    model = make_config(teacher=name)
    model.actor_rollout_ref.model.path = "hdfs://not/looked/at"
    check = expect(check_models(model), "error", words)
    assert check.remedy == "correct teacher.model.path"


def test_a_tilde_in_a_model_path(make_config):
    config = make_config()
    config.teacher.model.path = "~/teacher"
    expect(check_models(config), "error", "nothing expands the ~", "/teacher")


def test_a_hub_id_that_can_t_be_found_says_where_was_looked(make_config, monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    words = ("teacher nobody/nothing", "its config can't be read", "no folder of that name", "HF_HUB_OFFLINE is set")
    expect(check_models(make_config(teacher="nobody/nothing")), "error", *words)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "config.json").write_text('{"model_type": "nonesuch"}'), "nonesuch"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "its tokenizer can't be read"),
        (lambda f: (f / "processor_config.json").unlink(), "its image processor can't be read"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
            ),
            "1 of the 2 files named in model.safetensors.index.json are missing, first model-2.safetensors",
        ),
    ],
)
def test_a_damaged_teacher_folder(make_config, teacher, spoil, words):
    spoil(teacher)
    expect(check_models(make_config(teacher=teacher)), "error", words, "correct teacher.model.path")


def test_a_text_only_teacher_scores_rows_without_images(make_config, student, text_model, tmp_path):
    """As in verl's own example with several teachers, where a text model scores the set without images."""
    rows = [("Add one and one.", 0, "gsm8k"), ("<image>How many?", 1, "geo3k"), ("Add two.", 0, "gsm8k")] * 2
    table = {
        "prompt": pa.array([[{"role": "user", "content": text}] for text, _, _ in rows], PROMPT),
        "images": pa.array([[{"bytes": b"x", "path": "a.png"}] * count for _, count, _ in rows], IMAGES),
        "data_source": [source for _, _, source in rows],
    }
    pq.write_table(pa.table(table), tmp_path / "train.parquet")

    def check(text_keys, image_keys):
        several = (
            "teacher.model.path=null",
            f"teacher.models.text.path={text_model}",
            f"teacher.models.text.keys=[{text_keys}]",
            f"teacher.models.images.path={student}",
            f"teacher.models.images.keys=[{image_keys}]",
        )
        return check_models(make_config(*several))

    assert not errors(check("gsm8k", "geo3k"))
    found = expect(check("gsm8k,geo3k", "geo3k"), "error", "text-only model, and 2 training rows that it scores")
    assert "teacher.models.<name>.keys" in found.remedy
    # One text-only teacher of a student that sees images.
    expect(check_models(make_config(teacher=text_model)), "error", "2 training rows")
    pq.write_table(pa.table({"prompt": table["prompt"].take([0, 2])}), tmp_path / "train.parquet")
    assert not errors(check_models(make_config(teacher=text_model)))
    expect(check_models(make_config("data.train_files=hdfs://a.parquet", teacher=text_model)), "warning", "text-only")


def test_a_processor_that_verl_can_t_use_matters_only_with_images(make_config, teacher, student, tmp_path):
    edit(teacher / "processor_config.json", lambda c: c.update(processor_class="LlavaOnevisionProcessor"))
    edit(teacher / "tokenizer_config.json", lambda c: c.update(processor_class="LlavaOnevisionProcessor"))
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", [("Add one and one.", 0)] * 4)
    path = f"actor_rollout_ref.model.path={teacher}"
    expect(check_models(make_config(path, teacher=student)), "ok", "images would be lost", "no row has any")
    expect(check_models(make_config(path, "data.val_files=hdfs://a.parquet")), "warning", "images would be lost")
    write(tmp_path / "test.parquet", [("<image>Add one and one.", 1)] * 4)
    expect(check_models(make_config(path, teacher=student)), "error", "images would be lost")


def test_adapters_are_merged_by_the_command_that_the_error_names(make_config, student, tmp_path):
    import peft
    from transformers import AutoModelForImageTextToText

    folder = tmp_path / "lora"
    model = AutoModelForImageTextToText.from_pretrained(student)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    adapted.save_pretrained(folder)
    found = expect(check_models(make_config(teacher=folder)), "error", f"holds LoRA adapters of {student}")
    command = found.detail.split('python -c "')[1].split('", and then')[0]
    subprocess.run([sys.executable, "-c", "import verl; " + command], check=True, capture_output=True)
    assert not errors(check_models(make_config(teacher=folder / "merged")))
    merged = AutoModelForImageTextToText.from_pretrained(folder / "merged")
    weight = adapted.merge_and_unload().model.language_model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(merged.model.language_model.layers[0].self_attn.q_proj.weight, weight)


def test_the_student_can_be_made_to_end_its_answers_as_the_teacher_does(make_config, teacher, student):
    edit(teacher / "tokenizer_config.json", lambda c: c.update(eos_token="<|im_start|>"))
    found = expect(check_models(make_config(teacher=teacher)), "warning", "eos: student", "large negative log-ratio")
    token = re.search(r"set eos_token to '([^']+)' in the student's tokenizer_config.json", found.remedy).group(1)
    edit(teacher / "tokenizer_config.json", lambda c: c.update(eos_token=token))
    checks = check_models(make_config(f"actor_rollout_ref.model.path={teacher}", teacher=teacher))
    assert not [check for check in checks if "eos" in check.detail]


def test_what_the_trial_finds_out_is_said_before_a_run(make_config, teacher, text_model, tmp_path):
    """The way to share prompts, a model that can't be built as it is, and weights that can't be sharded."""
    expect(check_architectures(Inputs(make_config())), "ok", "responses share their prompt through attention")
    shared = check_architectures(Inputs(make_config("teacher.sharing=cache")))
    expect(shared, "ok", "responses continue from a cache of their prompt")
    edit(teacher / "config.json", lambda c: c.update(quantization_config={"quant_method": "awq", "bits": 4}))
    found = expect(check_architectures(Inputs(make_config(teacher=teacher))), "error", "weights are quantized (awq)")
    assert "teacher.backend=server" in found.remedy
    edit(text_model / "config.json", lambda c: c.update(num_attention_heads=3))
    expect(check_architectures(Inputs(make_config(teacher=text_model))), "error", str(text_model))


def test_ranks_that_share_rows_need_a_model_that_shares_prompts_through_attention(make_config, tmp_path):
    path = zoo.build("gemma2", tmp_path / "gemma2")
    eager = "teacher.model.override_config.attn_implementation=eager"
    overrides = (eager, "teacher.ulysses_sequence_parallel_size=2", "trainer.n_gpus_per_node=2")
    found = expect(check_architectures(Inputs(make_config(*overrides, teacher=path))), "error", "through attention")
    assert not errors(check_architectures(Inputs(make_config(eager, found.remedy, teacher=path))))
    # transformers' sdpa attention leaves a part of this model out.
    sdpa = "teacher.model.override_config.attn_implementation=sdpa"
    expect(check_architectures(Inputs(make_config(sdpa, teacher=path))), "error", "log-probs differ by")
