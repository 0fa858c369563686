# SPDX-License-Identifier: Apache-2.0
"""What can't be in a model folder's config, and what can."""

import json

import pytest
from transformers import CONFIG_MAPPING

from verl_gndpo.model_files import DamagedModel, check_descriptions


def test_the_defaults_of_every_architecture_are_accepted(tmp_path):
    checked = set()
    for name, config in CONFIG_MAPPING.items():
        try:
            content = config().to_json_string(use_diff=False)
        # A few can't be made without arguments, or need a package or a file that is not here.
        except Exception:
            continue
        (tmp_path / "config.json").write_text(content)
        check_descriptions(tmp_path)
        checked.add(name)
    assert len(checked) > 500
    assert checked >= {"internvl", "llava", "granite4_vision", "phi4_multimodal", "gpt2", "qwen3_vl_moe"}


@pytest.mark.parametrize(
    "key",
    ["num_hidden_layers", "n_layer", "depth", "num_attention_heads", "n_head", "num_experts", "num_experts_per_tok"],
)
@pytest.mark.parametrize("value", [-1, 10**9])
def test_more_parts_than_any_model_has_are_refused(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {key: value}}))
    with pytest.raises(DamagedModel, match=rf"config\.json: vision_config\.{key} is {value}, "):
        check_descriptions(tmp_path)


@pytest.mark.parametrize("key", ["vision_feature_layer", "spatial_vision_layer"])
def test_a_layer_counted_from_the_end_is_accepted(tmp_path, key):
    (tmp_path / "config.json").write_text(json.dumps({key: -2}))
    check_descriptions(tmp_path)
