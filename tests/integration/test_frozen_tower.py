# SPDX-License-Identifier: Apache-2.0
"""`actor.freeze_vision_tower=True` in verl's own actor: the tower stays as it is, and LoRA adapters are only where
rollouts apply them."""

import importlib

import pytest

from tests.integration.helpers import one_rank, start_actor
from tests.tiny_models import build_tiny

LORA = {"lora_rank": 4, "target_modules": "all-linear"}
TOWERS = {"qwen2_5_vl": "model.visual", "internvl": "model.vision_tower"}
PROJECTORS = {"qwen2_5_vl": None, "internvl": "model.multi_modal_projector"}
"""The modules beside the tower that map its features to embeddings."""


@pytest.fixture(scope="module", params=TOWERS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def path(family, tmp_path_factory):
    return build_tiny(family, tmp_path_factory.mktemp(family), seed=3)


@pytest.fixture
def frozen_tower(monkeypatch):
    """Freeze towers in this process as the actor's process does when it imports the patch, until the test ends."""
    from verl.workers.engine.fsdp import transformer_impl

    engine = transformer_impl.FSDPEngineWithLMHead
    stock = engine._build_module
    for name in ("_build_module", "_build_lora_module"):
        monkeypatch.setattr(engine, name, getattr(engine, name))
    patch = importlib.import_module("verl_gndpo.verl_patches.freeze_vision_tower")
    # The import applies the patch, but only the first one in a process.
    if engine._build_module is stock:
        patch.freeze_vision_tower(transformer_impl)


def parameters(path, **model) -> dict[str, bool]:
    """Return which parameters verl's own actor trains, by the names that they have without LoRA."""
    with one_rank():
        named = list(start_actor(path, packed=False, **model).engine.module.named_parameters())
    return {name.removeprefix("base_model.model."): parameter.requires_grad for name, parameter in named}


def places(trained: dict[str, bool]) -> set[str]:
    """Return the modules of the model that have LoRA adapters."""
    return {".".join(name.split(".")[:2]) for name in trained if "lora_" in name}


def test_everything_but_the_tower_is_trained(family, path, frozen_tower):
    trained = parameters(path)
    assert any(name.startswith(f"{TOWERS[family]}.") for name in trained)
    assert trained == {name: not name.startswith(f"{TOWERS[family]}.") for name in trained}


def test_adapters_are_in_the_language_model_only(family, path, frozen_tower, capfd):
    """vLLM would ignore those of a tower and of a projector."""
    trained = parameters(path, **LORA)
    adapters = {name for name in trained if "lora_" in name}
    assert {name for name, is_trained in trained.items() if is_trained} == adapters
    assert places(trained) == {"model.language_model"}
    # Seven projections in each of two layers, with two matrices each.
    assert len(adapters) == 7 * 2 * 2
    without = " and ".join(filter(None, (TOWERS[family], PROJECTORS[family])))
    assert f"no LoRA adapters in {without}\n" in capfd.readouterr().out


def test_a_projector_is_trained_if_adapters_are_merged_for_rollouts(family, path, frozen_tower):
    trained = parameters(path, lora={"merge": True}, **LORA)
    assert places(trained) == {"model.language_model", PROJECTORS[family]} - {None}


def test_the_users_own_choice_decides(family, path, frozen_tower):
    trained = parameters(path, exclude_modules=r".*\.language_model\..*", **LORA)
    assert places(trained) == {TOWERS[family], PROJECTORS[family]} - {None}


def test_a_text_only_student_has_no_tower_to_freeze(tmp_path, frozen_tower):
    path = build_tiny("qwen2", tmp_path, seed=3)
    with one_rank(), pytest.raises(ValueError, match="no vision tower is found in Qwen2ForCausalLM"):
        start_actor(path, packed=False)
