# SPDX-License-Identifier: Apache-2.0
"""Facts of model families, against real models of their architectures; and nobody else names them."""

import ast
import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    InternVLConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
)

import verl_gndpo
from verl_gndpo import families
from verl_gndpo.families import INTERNVL, QWEN_VL, UNDECLARED, ModelFamily, family_of, register_family
from verl_gndpo.teacher.rows import check_image_tokens

MULTIMODAL = [Qwen2VLConfig, Qwen2_5_VLConfig, Qwen3VLConfig, InternVLConfig]


def build(config):
    """Build a model of a config's default sizes without memory."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize("config_class", MULTIMODAL, ids=lambda c: c.model_type)
def test_the_declared_names_are_what_structure_finds(config_class):
    model = build(config_class())
    family = family_of(model)
    assert family is family_of(model.config) and family in (QWEN_VL, INTERNVL)
    towers, projectors = family.find_towers(model), family.find_projectors(model)
    assert list(towers.values()) == [model.get_encoder("image")]
    assert UNDECLARED.find_towers(model) == towers and UNDECLARED.find_projectors(model) == projectors
    # The rest of the model is the decoder, the output projection, and modules without parameters.
    rest = {name for name, _ in model.named_parameters()}
    for name in (*towers, *projectors):
        rest = {parameter for parameter in rest if not parameter.startswith(f"{name}.")}
    assert all(name.startswith(("model.language_model.", "lm_head.")) for name in rest)


@pytest.mark.parametrize("config_class", [LlavaConfig, Gemma3Config], ids=lambda c: c.model_type)
def test_an_undeclared_family_is_found_by_its_structure(config_class):
    model = build(config_class())
    assert family_of(model) is UNDECLARED
    assert list(UNDECLARED.find_towers(model)) == ["model.vision_tower"]
    assert list(UNDECLARED.find_projectors(model)) == ["model.multi_modal_projector"]


def test_a_text_only_model_has_no_vision():
    from transformers import AutoModelForCausalLM

    config = Qwen2Config(num_hidden_layers=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    family = family_of(config)
    assert family.find_towers(model) == family.find_projectors(model) == family.placeholder_ids(config) == {}
    assert family.vision_config_of(config) is None


def test_placeholders_are_those_at_which_the_models_put_features():
    qwen, internvl = Qwen2_5_VLConfig(), InternVLConfig()
    assert QWEN_VL.placeholder_ids(qwen) == {"image": qwen.image_token_id, "video": qwen.video_token_id}
    assert INTERNVL.placeholder_ids(internvl) == {"image": internvl.image_token_id}


def grids(*images):
    return torch.tensor(images)


def test_features_are_counted_as_each_family_makes_them():
    qwen, internvl = Qwen2_5_VLConfig(), InternVLConfig()
    assert QWEN_VL.count_features({}, qwen) == {"image": 0, "video": 0}
    two = {"image_grid_thw": grids([1, 4, 6], [1, 2, 2]), "video_grid_thw": grids([3, 4, 4])}
    assert QWEN_VL.count_features(two, qwen) == {"image": 7, "video": 12}
    # A large image and its thumbnail.
    assert INTERNVL.count_features({"pixel_values": torch.zeros(3, 3, 4, 4)}, internvl) == {"image": 3 * 256}


def test_an_undeclared_family_is_counted_only_where_its_structure_says_how():
    qwen, llava = Qwen2_5_VLConfig(), LlavaConfig()
    pixels = {"pixel_values": torch.zeros(24, 8)}
    assert UNDECLARED.count_features({}, llava) == {"image": 0, "video": 0}
    assert UNDECLARED.count_features(pixels | {"image_grid_thw": grids([1, 4, 6])}, qwen) == {"image": 6}
    for config, inputs in ((llava, pixels), (qwen, pixels), (qwen, pixels | {"image_sizes": grids([4, 6])})):
        assert UNDECLARED.count_features(inputs, config) == {}


@pytest.fixture
def undeclare(monkeypatch):
    """Forget families that a test declares."""
    monkeypatch.setattr(families, "_declared", copy.copy(families._declared))


def test_a_family_is_declared_once(undeclare):
    mine = ModelFamily(name="mine", model_types=("my_vl", "my_vl_moe"), towers=("eyes",))
    register_family(mine)
    # A module may be imported twice.
    register_family(mine)
    for model_type, family in (("my_vl", mine), ("my_vl_moe", mine), ("your_vl", UNDECLARED)):
        assert family_of(SimpleNamespace(model_type=model_type)) is family
    for other in (ModelFamily(name="other", model_types=("my_vl",)), ModelFamily(name="Q", model_types=("qwen2_vl",))):
        with pytest.raises(ValueError, match="has declared model_type"):
            register_family(other)
    with pytest.raises(ValueError, match="none names no model_types"):
        register_family(ModelFamily(name="none", model_types=()))


PAGE = Path(__file__).parents[2] / "docs" / "extending" / "model_family.md"
DECLARE, LOOK = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


class MyVLConfig(PreTrainedConfig):
    """The config of the page's model."""

    model_type = "my_vl"

    def __init__(self, features_per_crop=3, picture_token_id=7, **options):
        super().__init__(**options)
        self.eyes_config = {"patches": 2}
        self.features_per_crop, self.picture_token_id = features_per_crop, picture_token_id


class MyVLModel(PreTrainedModel):
    """The page's model: nothing in its structure tells the tower."""

    config_class = MyVLConfig

    def __init__(self, config):
        super().__init__(config)
        self.eyes, self.bridge, self.language_model = (torch.nn.Linear(2, 2) for _ in range(3))
        self.post_init()


def test_the_pages_code_declares_a_family(undeclare, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda path: MyVLModel(MyVLConfig()))
    exec(LOOK, {})
    assert capsys.readouterr().out == "undeclared\n"
    exec(DECLARE, {})
    exec(LOOK, {})
    assert capsys.readouterr().out == "My-VL eyes bridge\n"

    family, config = family_of(MyVLConfig()), MyVLConfig()
    assert family.vision_config_of(config) == {"patches": 2}
    assert family.placeholder_ids(config) == {"image": 7}
    assert family.count_features({"pixel_values": torch.zeros(4, 3, 2, 2)}, config) == {"image": 12}
    # So a row is checked with it as with any other.
    ids = torch.nested.as_nested_tensor([torch.tensor([1] + [7] * 12 + [2])], layout=torch.jagged)
    mask = torch.nested.as_nested_tensor([torch.tensor([1])], layout=torch.jagged)
    for crops in (4, 5):
        inputs = NonTensorStack({"pixel_values": torch.zeros(crops, 3, 2, 2)})
        data = TensorDict({"input_ids": ids, "response_mask": mask, "multi_modal_inputs": inputs}, batch_size=1)
        if crops == 4:
            check_image_tokens(data, config)
            continue
        with pytest.raises(ValueError, match="row 0: 12 image tokens in its ids but images for 15"):
            check_image_tokens(data, config)


def test_verl_imports_the_pages_module_in_every_process(tmp_path):
    (tmp_path / "my_family.py").write_text(DECLARE)
    script = "import verl, types; from verl_gndpo.families import family_of; "
    script += "print(family_of(types.SimpleNamespace(model_type='my_vl')).name)"
    environment = {"VERL_USE_EXTERNAL_MODULES": "my_family", "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["My-VL"], done.stderr


# Names by which models keep their vision. verl's own parts that verl_patches replaces use some as attributes.
NAMES = {
    *(name for family in (QWEN_VL, INTERNVL) for name in (*family.towers, *family.projectors)),
    *(name for family in (QWEN_VL, INTERNVL, UNDECLARED) for name in family.id_attributes),
    *QWEN_VL.token_inputs,
    *QWEN_VL.masked_inputs,
    "vision_model",
    "vision_config",
    "image_seq_length",
    "image_grid_thw",
    "video_grid_thw",
}


def test_no_other_module_names_what_families_declares():
    assert {"visual", "vision_tower", "multi_modal_projector", "image_token_id", "vision_start_token_id"} <= NAMES
    package = Path(verl_gndpo.__file__).parent
    found = []
    for file in sorted(package.rglob("*.py")):
        tree = ast.parse(file.read_text())
        docstrings = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            named = set()
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                named = NAMES & set(re.findall(r"\w+", node.value))
            elif isinstance(node, ast.Attribute) and file.parent.name != "verl_patches":
                named = NAMES & {node.attr}
            found += [f"{file.relative_to(package)}:{node.lineno}: {name}" for name in sorted(named)]
    assert {place.split(":")[0] for place in found} == {"families.py"}, "\n".join(found)
