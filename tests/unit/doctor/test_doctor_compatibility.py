# SPDX-License-Identifier: Apache-2.0
"""The comparison of a teacher's files with a student's."""

import json

import pytest
from tokenizers import pre_tokenizers

from examples.quickstart.tiny_vlm import build_tokenizer
from tests.unit.doctor.helpers import edit, length
from verl_gndpo.doctor.compatibility import compare, read_model_files


def differences(student, teacher, images=None):
    return compare(read_model_files(str(student), "student"), read_model_files(str(teacher), "teacher"), images)


def expect_difference(found, fatal, *words):
    assert any(d.fatal is fatal and all(w in d.detail for w in words) for d in found), found


def test_a_model_is_no_different_from_itself(student):
    assert differences(student, student) == []


def test_a_teacher_with_less_padding_is_a_warning(student, teacher):
    edit(teacher / "config.json", lambda c: c["text_config"].update(vocab_size=length(student)))
    (found,) = differences(student, teacher)
    expect_difference([found], False, "padded to 448", f"the teacher's to {length(student)}")


def test_a_vocabulary_smaller_than_the_tokenizer(student, teacher):
    edit(teacher / "config.json", lambda c: c["text_config"].update(vocab_size=400))
    expect_difference(
        differences(student, teacher), True, "the teacher's config has vocab_size=400", f"up to {length(student) - 1}"
    )


def test_the_same_tokens_merged_in_another_order(student, teacher):
    edit(teacher / "tokenizer.json", lambda c: c["model"]["merges"].reverse())
    expect_difference(differences(student, teacher), True, "the merges differ", "at 0: student")


def test_the_same_merges_over_text_split_elsewhere(student, teacher):
    ours, theirs = read_model_files(str(student), "student"), read_model_files(str(teacher), "teacher")
    theirs.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    expect_difference(compare(ours, theirs), True, "Find the measure", "with the teacher's", "from position")


def test_tokens_that_only_the_teacher_has_are_a_warning(student, teacher):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(teacher)
    (found,) = differences(student, teacher)
    expect_difference([found], False, "1 tokens that the student lacks", f"'<think>' (id {length(student)})")


@pytest.mark.parametrize("role", ["eos_token", "pad_token"])
def test_special_tokens(student, teacher, role):
    edit(teacher / "tokenizer_config.json", lambda c: c.update({role: "<|im_start|>"}))
    token_id = json.loads((student / "config.json").read_text())["text_config"][f"{role}_id"]
    found = differences(student, teacher)
    expect_difference(found, False, role[:3], f"({token_id})", "teacher '<|im_start|>' (")
    assert ("set eos_token to '<|im_start|>'" in found[0].remedy) == (role == "eos_token")


def test_an_image_token_of_another_id(student, teacher):
    own = json.loads((student / "config.json").read_text())["image_token_id"]
    edit(teacher / "config.json", lambda c: c.update(image_token_id=7))
    expect_difference(differences(student, teacher), True, f"config.image_token_id: student {own}, teacher 7")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patch_size", 16),
        ("merge_size", 4),
        ("temporal_patch_size", 1),
        ("image_mean", [0.5, 0.5, 0.5]),
        ("image_std", [0.5, 0.5, 0.5]),
        ("size", {"longest_edge": 12345, "shortest_edge": 3136}),
    ],
)
def test_image_preprocessing(student, teacher, key, value):
    own = json.loads((student / "processor_config.json").read_text())["image_processor"][key]
    edit(teacher / "processor_config.json", lambda c: c["image_processor"].update({key: value}))
    (found,) = differences(student, teacher)
    expect_difference([found], True, f"image processor's {key}")
    for part in (own, value):
        values = part.values() if isinstance(part, dict) else part if isinstance(part, list) else [part]
        assert all(str(v) in found.detail for v in values)


def test_another_model_type_and_chat_template_are_warnings(student, teacher):
    edit(teacher / "config.json", lambda c: c.update(model_type="qwen2_vl"))
    (teacher / "chat_template.jinja").write_text("{{ messages }}")
    found = differences(student, teacher)
    expect_difference(found, False, "student qwen2_5_vl, teacher qwen2_vl")
    expect_difference(found, False, "the chat templates differ")


def test_a_text_only_teacher(student, text_model):
    expect_difference(differences(student, text_model), False, "the teacher is a text-only model", "would stop the run")
    assert differences(student, text_model, images=0) == []
    expect_difference(differences(student, text_model, images=3), True, "3 training rows that it scores have images")
    assert differences(text_model, student) == []
