# SPDX-License-Identifier: Apache-2.0
"""Five hundred damaged model folders: the doctor and the planner never raise, and name folder and file.

A failure names its seed and number. `GNDPO_HOSTILE_MODELS` sets how many folders are drawn at random.
"""

import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.doctor.helpers import edit, errors
from verl_gndpo.doctor import compatibility, weights
from verl_gndpo.doctor.architecture import check_architectures
from verl_gndpo.doctor.check import FINDING_CHARS
from verl_gndpo.doctor.inputs import Inputs
from verl_gndpo.doctor.models import check_models
from verl_gndpo.plan import PlanError, read_model

MODELS = int(os.environ.get("GNDPO_HOSTILE_MODELS", 440))
SEEDS = 8
WEIGHTS = "model.safetensors"


def rewrite(name, content):
    def change(folder, rng):
        (folder / name).unlink()
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def remove(name):
    return lambda folder, rng: (folder / name).unlink()


def make_folder(name):
    def change(folder, rng):
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def make_loop(name):
    def change(folder, rng):
        (folder / name).unlink()
        (folder / name).symlink_to(folder / name)

    return change


def change_config(*path_and_value):
    *path, last, value = path_and_value

    def change(content):
        for key in path:
            content = content[key]
        content[last] = value

    return lambda folder, rng: edit(folder / "config.json", change)


def cut_weights(folder, rng):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(data[: rng.randrange(len(data))])


def lie_about_the_header(folder, rng):
    data = (folder / WEIGHTS).read_bytes()
    size = rng.choice([0, 1, 2**63, 2**64 - 1, rng.randrange(len(data)), len(data)])
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + data[8:])


def change_header(change):
    def apply(folder, rng):
        data = (folder / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        names = [name for name in header if name != "__metadata__"]
        change(header, rng.choice(names))
        text = json.dumps(header).encode()
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return apply


def change_weights(change):
    def apply(folder, rng):
        tensors = load_file(folder / WEIGHTS)
        change(tensors, rng.choice(sorted(tensors)))
        (folder / WEIGHTS).unlink()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def other_shape(tensors, name):
    tensors[name] = torch.zeros(3, *tensors[name].shape)


def index(change):
    """Return a change that moves the weights to a shard with an index, which `change` spoils."""

    def apply(folder, rng):
        (folder / WEIGHTS).rename(folder / "model-1.safetensors")
        shards = dict.fromkeys(load_file(folder / "model-1.safetensors"), "model-1.safetensors")
        content = change({"weight_map": shards}, sorted(shards)[0])
        (folder / f"{WEIGHTS}.index.json").write_text(content if isinstance(content, str) else json.dumps(content))

    return apply


def mapped(file):
    return index(lambda content, name: {"weight_map": content["weight_map"] | {name: file}})


def share_an_id(content):
    first, second, *_ = content["model"]["vocab"]
    content["model"]["vocab"][second] = content["model"]["vocab"][first]


def share_an_id_with_a_special_token(content):
    content["added_tokens"][0]["id"] = 7


def without_image_tokens(content):
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|image_pad|>"]


def on_json(name, change):
    return lambda folder, rng: edit(folder / name, change)


# What is damaged, and words that a finding must have.
DAMAGE = {
    "weights cut off": (cut_weights, WEIGHTS),
    "weights empty": (rewrite(WEIGHTS, ""), WEIGHTS),
    "weights of text": (rewrite(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), WEIGHTS),
    "weights a folder": (make_folder(WEIGHTS), WEIGHTS),
    "weights a loop": (make_loop(WEIGHTS), WEIGHTS),
    "weights gone": (remove(WEIGHTS), "no weights"),
    "header that lies": (lie_about_the_header, WEIGHTS),
    "offsets that lie": (change_header(lambda h, n: h[n].update(data_offsets=[0, 2**40])), WEIGHTS),
    "offsets the wrong way": (change_header(lambda h, n: h[n].update(data_offsets=[8, 0])), WEIGHTS),
    "a shape that lies": (change_header(lambda h, n: h[n].update(shape=[2**40, 2**40])), WEIGHTS),
    "a type that is none": (change_header(lambda h, n: h[n].update(dtype="F65")), WEIGHTS),
    "an entry that is none": (change_header(lambda h, n: h.update({n: None})), WEIGHTS),
    "a weight gone": (change_weights(lambda w, n: w.pop(n)), "random values"),
    "a weight of another shape": (change_weights(other_shape), "the config says"),
    "a weight too many": (change_weights(lambda w, n: w.update({"extra.weight": torch.zeros(2)})), "nothing uses"),
    "no weight at all": (change_weights(lambda w, n: w.clear()), "random values"),
    "a shard that is missing": (mapped("model-2.safetensors"), "model-2.safetensors"),
    "a shard outside": (mapped("../teacher/model-1.safetensors"), "leads out"),
    "a shard anywhere": (mapped("/etc/passwd"), "leads out"),
    "a shard without a name": (mapped(""), "leads out"),
    "a shard that is a number": (mapped(5), "weight_map"),
    "an index of text": (index(lambda content, name: "{"), "index.json"),
    "an index of a list": (index(lambda content, name: [content]), "index.json"),
    "a map of a list": (index(lambda content, name: {"weight_map": list(content["weight_map"])}), "weight_map"),
    "a weight in no shard": (
        index(lambda content, name: {"weight_map": content["weight_map"] | {"more": "model-1.safetensors"}}),
        "lacks more",
    ),
    "config gone": (remove("config.json"), "config.json"),
    "config a folder": (make_folder("config.json"), "config.json"),
    "config a loop": (make_loop("config.json"), "config.json"),
    "config empty": (rewrite("config.json", ""), "config.json"),
    "config a list": (rewrite("config.json", "[]"), "config.json"),
    "config null": (rewrite("config.json", "null"), "config.json"),
    "config in UTF-16": (rewrite("config.json", "{}".encode("utf-16")), "config.json"),
    "config of depth": (rewrite("config.json", '{"a":' * 10_000), "config.json"),
    "config without a type": (on_json("config.json", lambda c: c.pop("model_type")), "config"),
    "config of an unknown type": (change_config("model_type", "nonesuch"), "nonesuch"),
    "config of a type that is none": (change_config("model_type", ["qwen2"]), "config"),
    "a billion layers": (change_config("text_config", "num_hidden_layers", 10**9), "num_hidden_layers"),
    "a billion blocks": (change_config("vision_config", "depth", 10**9), "depth"),
    "infinite heads": (change_config("text_config", "num_attention_heads", float("inf")), "num_attention_heads"),
    "minus a layer": (change_config("text_config", "num_hidden_layers", -1), "num_hidden_layers"),
    "layers of text": (change_config("text_config", "num_hidden_layers", "2"), "config"),
    "another width": (change_config("text_config", "intermediate_size", 64), "the config says"),
    "a small vocabulary": (change_config("text_config", "vocab_size", 100), "vocab_size=100"),
    "a huge vocabulary": (change_config("text_config", "vocab_size", 10**12), "the config says"),
    "another image token": (change_config("image_token_id", 3), "image"),
    "an image token of text": (change_config("image_token_id", "a"), "image_token_id"),
    "tokenizer empty": (rewrite("tokenizer.json", ""), "tokenizer.json"),
    "tokenizer of nothing": (rewrite("tokenizer.json", "{}"), "tokenizer"),
    "tokenizer a folder": (make_folder("tokenizer.json"), "tokenizer.json"),
    "two tokens of one id": (on_json("tokenizer.json", share_an_id), "share the id"),
    "a special token of a token's id": (on_json("tokenizer.json", share_an_id_with_a_special_token), "share the id"),
    "no image token": (on_json("tokenizer.json", without_image_tokens), "tokens have other ids"),
    "no merges": (on_json("tokenizer.json", lambda c: c["model"].update(merges=[])), "merges differ"),
    "tokenizer settings of text": (rewrite("tokenizer_config.json", "x"), "tokenizer_config.json"),
    "a broken template": (rewrite("chat_template.jinja", "{% for %}"), "chat template can't write"),
    "a template that raises": (rewrite("chat_template.jinja", "{{ 1 // 0 }}"), "chat template can't write"),
    "a template that reaches out": (
        rewrite("chat_template.jinja", "{{ messages.__class__.__mro__[1].__subclasses__() }}"),
        "chat template can't write",
    ),
    "no processor": (remove("processor_config.json"), "processor"),
    "processor of text": (rewrite("processor_config.json", "x"), "processor_config.json"),
    "a mean of one channel": (
        on_json("processor_config.json", lambda c: c["image_processor"].update(image_mean=[0.5])),
        "image",
    ),
    "patches of nothing": (
        on_json("processor_config.json", lambda c: c["image_processor"].update(patch_size=0)),
        "image",
    ),
    "code of its own": (
        on_json("config.json", lambda c: c.update(model_type="mine", auto_map={"AutoConfig": "mine.MineConfig"})),
        "auto_map",
    ),
}
JSON_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "generation_config.json",
)
VALUES = (
    None,
    True,
    -1,
    0,
    3,
    10**18,
    1.5,
    float("nan"),
    float("-inf"),
    "",
    "x" * 10_000,
    "\0",
    "a",
    [],
    [[]],
    {},
    [None],
    {"a": {}},
)


def spoil_json(folder: Path, rng: random.Random) -> str:
    """Change, remove or add one entry somewhere in a JSON file. Returns what was done."""
    name = rng.choice(JSON_FILES)
    content = json.loads((folder / name).read_text())
    place, path = content, []
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = rng.choice(keys)
        path.append(key)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        how = rng.choice(["set", "set", "delete", "add"])
        value = rng.choice(VALUES)
        if how == "delete":
            del place[key]
        elif how == "add" and isinstance(place, dict):
            place[
                rng.choice(["dtype", "auto_map", "quantization_config", "tie_word_embeddings", "layer_types", "x"])
            ] = value
        else:
            place[key] = value
        path += [how, repr(value)[:40]]
        break
    (folder / name).write_text(json.dumps(content))
    return f"{name}: {path}"


def spoil_bytes(folder: Path, rng: random.Random) -> str:
    """Damage the bytes of a file. Returns its name."""
    name = rng.choice([*JSON_FILES, WEIGHTS, "chat_template.jinja"])
    data = bytearray((folder / name).read_bytes())
    (folder / name).unlink()
    if rng.random() < 0.5:
        del data[rng.randrange(len(data)) :]
    else:
        for _ in range(rng.choice([1, 10])):
            data[rng.randrange(min(len(data), 4000))] = rng.randrange(256)
    (folder / name).write_bytes(data)
    return f"{name}: bytes"


def copy_model(source: Path, to: Path) -> Path:
    """Copy a model folder, with a link to its weights, which are replaced where a test changes them."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    for path in source.iterdir():
        os.link(path, to / path.name) if path.name == WEIGHTS else shutil.copy(path, to / path.name)
    return to


@pytest.fixture
def find(make_config, student, monkeypatch):
    """A function that checks a folder in one role beside an undamaged model in the other: (folder, role) -> findings,
    each of a proper form."""
    read, whole = compatibility.read_model_files, {}

    def read_once(path, role, **options):
        if path != str(student):
            return read(path, role, **options)
        if role not in whole:
            whole[role] = read(path, role, **options)
        return whole[role]

    check_folder = weights._check_folder
    monkeypatch.setattr(compatibility, "read_model_files", read_once)
    monkeypatch.setattr(
        weights, "_check_folder", lambda path, *more: check_folder(path, *more) if path != student else []
    )

    def run(folder, role, *, further=True):
        models = {"student": student, "teacher": student} | {role: folder}
        inputs = Inputs(make_config(f"actor_rollout_ref.model.path={models['student']}", teacher=models["teacher"]))
        checks = [*check_models(inputs), *weights.check_weights(inputs)]
        if further:
            checks += check_architectures(inputs)
        for check in checks:
            assert str(check).isprintable() and len(str(check)) <= 3 * FINDING_CHARS, repr(str(check)[:1000])
            assert check.remedy or check.status != "error", str(check)
        if further or not errors(checks):
            try:
                read_model(str(folder))
            except PlanError as error:
                assert str(folder) in str(error)
        return checks

    return run


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_with_its_file(kind, find, student, tmp_path):
    change, words = DAMAGE[kind]
    folder = copy_model(student, tmp_path / "model")
    change(folder, random.Random(kind))
    # What only the student needs is looked at in its role.
    found = [check for check in find(folder, "student", further=False) if check.status != "ok"]
    assert any(str(folder) in str(check) and words in str(check) for check in found), "\n".join(map(str, found))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_any_damage_leads_to_findings(seed, find, student, tmp_path):
    rng = random.Random(seed)
    for number in range(MODELS // SEEDS):
        folder = copy_model(student, tmp_path / "model")
        done = [rng.choice([spoil_json, spoil_json, spoil_json, spoil_bytes])(folder, rng)]
        try:
            # A small model of the architecture takes longer than all the rest.
            assert find(folder, rng.choice(["student", "teacher"]), further=number % 20 == 0)
        except BaseException:
            print(f"seed {seed}, folder {number}: {done}")
            raise


def test_an_undamaged_folder_is_whole(find, student, tmp_path):
    folder = copy_model(student, tmp_path / "model")
    for role in ("student", "teacher"):
        assert not [check for check in find(folder, role) if check.status != "ok"]
