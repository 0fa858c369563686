# SPDX-License-Identifier: Apache-2.0
"""Student, teachers and processor: each problem names what, where and what to do."""

import json

import pytest
from huggingface_hub import constants as hub

from examples.quickstart.tiny_vlm import build_tokenizer
from tests.unit.doctor.helpers import edit, errors, expect, length
from verl_gndpo.doctor.models import check_models


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
        (lambda f: (f / "config.json").write_text("{"), "its config can't be read"),
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
