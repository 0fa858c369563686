# SPDX-License-Identifier: Apache-2.0
"""verl, plugin, versions and accelerator: each problem names what, where and what to do."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import verl
from packaging.specifiers import SpecifierSet
from verl.plugin.platform import get_platform
from verl.trainer.ppo import core_algos, v1

from tests.unit.doctor.helpers import errors, expect
from verl_gndpo.doctor.environment import (
    check_accelerator,
    check_flash_attention,
    check_plugin,
    check_verl,
    check_versions,
)
from verl_gndpo.doctor.run import run_checks
from verl_gndpo.versions import REQUIREMENT, TESTED, judge


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("0.8.0", "error"),
        ("0.9.0", "ok"),
        ("0.9.1", "ok"),
        ("0.9.7", "warning"),
        ("0.10.0.dev", "ok"),
        ("1.0", "warning"),
    ],
)
@pytest.mark.parametrize("cloned", [False, True])
def test_the_verl_that_a_run_would_import(monkeypatch, tmp_path, version, status, cloned):
    """Whatever version is installed beside it."""
    folder = tmp_path / ("clone" if cloned else "site-packages")
    (folder / "verl" / "version").mkdir(parents=True)
    (folder / "verl" / "version" / "version").write_text(f"{version}\n")
    monkeypatch.setattr(verl, "__file__", str(folder / "verl" / "__init__.py"))
    check = expect(check_verl(), status, version)
    assert (f"of the checkout {folder}" in check.detail) == cloned
    if status == "ok":
        return
    assert "0.9.0 to 0.9.1 are tested" in check.detail
    assert (f"git -C {folder} checkout v0.9.0" in check.remedy) == cloned
    assert "pip install verl==0.9.1" in check.remedy


def test_the_requirement_is_the_tested_range():
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    specifier = SpecifierSet(re.search(r'"verl([<>][^"]*)"', text).group(1))
    assert specifier == SpecifierSet(REQUIREMENT)
    assert all(specifier.contains(version) for version in TESTED)
    assert judge("0.8.0") == "too old" and not specifier.contains("0.8.0")
    assert f'cpu = ["verl=={TESTED[-1]}"' in text


def test_the_command_looks_at_a_clone_in_its_folder(tmp_path):
    """As `python -m verl.trainer.main_ppo` would."""
    (tmp_path / "verl" / "version").mkdir(parents=True)
    (tmp_path / "verl" / "__init__.py").write_text("__version__ = '0.8.0'")
    (tmp_path / "verl" / "version" / "version").write_text("0.8.0")
    command = [sys.executable, "-c", "from verl_gndpo.cli import app; app(['doctor'])"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"verl 0.8.0, of the checkout {tmp_path} is too old" in result.stdout


def test_a_verl_that_can_t_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    expect(run_checks(), "error", "verl can't be imported", "ModuleNotFoundError")


def test_a_plugin_that_is_switched_off(monkeypatch):
    monkeypatch.delitem(sys.modules, "verl_gndpo.plugin")
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "other")
    expect(check_plugin(), "error", "VERL_USE_EXTERNAL_PLUGINS=other excludes it", "unset")


def test_a_plugin_that_is_not_installed(monkeypatch):
    monkeypatch.delitem(sys.modules, "verl_gndpo.plugin")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [])
    expect(check_plugin(), "error", f"not installed for {sys.executable}", "pip install -e .")


def test_a_plugin_that_fails_shows_the_exception_that_verl_hides(monkeypatch):
    monkeypatch.delitem(sys.modules, "verl_gndpo.plugin")
    monkeypatch.delattr("wrapt.register_post_import_hook")
    expect(check_plugin(), "error", "importing verl_gndpo.plugin fails", "register_post_import_hook")


def test_registries_that_someone_else_has_changed(monkeypatch):
    monkeypatch.delitem(core_algos.ADV_ESTIMATOR_REGISTRY, "opd")
    monkeypatch.setitem(v1.trainer_base.TRAINER_REGISTRY, "sync", v1.PPOTrainerSync)
    expect(check_plugin(), "error", "opd, sync")


def test_installed_versions_against_what_the_package_asks_for(monkeypatch):
    version = importlib.metadata.version
    strange = {"tensordict": "0.13.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: strange.get(name) or version(name))
    check = expect(check_versions(), "warning", "tensordict 0.13.0", "pip install")
    assert ">=0.10.0" in check.remedy


def test_a_rollout_engine_that_is_not_there(monkeypatch, make_config):
    version = importlib.metadata.version

    def without_vllm(name):
        if name.startswith("vllm"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_vllm)
    expect(check_versions(make_config()), "error", "rollout.name=vllm", "not installed")
    config = make_config("actor_rollout_ref.rollout.name=null")
    expect(check_versions(config), "error", "actor_rollout_ref.rollout.name is not set")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("actor_rollout_ref.rollout.load_format=dummy", ["load_format=dummy", "load_format=auto", "another model"]),
        ("trainer.device=cuda", ["trainer.device=cuda", "trainer.device=cpu"]),
        (
            "actor_rollout_ref.rollout.free_cache_engine=True",
            ["does not support sleep mode", "enable_sleep_mode=False"],
        ),
        (
            "actor_rollout_ref.rollout.enable_sleep_mode=True",
            ["does not support sleep mode", "free_cache_engine=False"],
        ),
        (
            "actor_rollout_ref.model.override_config.attn_implementation=flash_attention_2",
            ["flash_attention_2", "sdpa"],
        ),
    ],
)
def test_settings_that_need_an_accelerator(make_config, on_cpu, override, words):
    checks = check_accelerator(make_config(override))
    expect(checks, "error", *words)
    assert len(errors(checks)) == 1


@pytest.fixture
def on_a_gpu_without_flash_attn(monkeypatch):
    find = importlib.util.find_spec
    hidden = lambda name, *package: None if name == "flash_attn" else find(name, *package)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    monkeypatch.setattr("verl_gndpo.doctor.environment.without_accelerator", lambda: False)
    monkeypatch.setattr("verl_gndpo.doctor.environment._accelerator", lambda: "cuda")


SDPA = "actor_rollout_ref.model.override_config.attn_implementation=sdpa"
PACKED = "actor_rollout_ref.model.use_remove_padding"


@pytest.mark.parametrize("override", ["flash_attention_2", "null"])
def test_flash_attention_that_is_not_installed(make_config, on_a_gpu_without_flash_attn, override):
    """null is verl's default."""
    config = make_config(f"{SDPA.removesuffix('sdpa')}{override}", f"{PACKED}=True")
    check = expect(check_flash_attention(config), "error", "flash_attention_2", "not installed")
    assert "examples/README.md" in check.remedy
    # The remedy works.
    assert f"++{SDPA} {PACKED}=False" in check.remedy
    assert not check_flash_attention(make_config(SDPA, f"{PACKED}=False"))


def test_padding_that_only_flash_attn_removes(make_config, on_a_gpu_without_flash_attn, text_model):
    packed = (SDPA, f"{PACKED}=True")
    check = expect(check_flash_attention(make_config(*packed)), "error", f"{PACKED}=True", "qwen2_5_vl")
    assert f"{PACKED}=False" in check.remedy
    assert not check_flash_attention(make_config(*packed, f"actor_rollout_ref.model.path={text_model}"))
    assert not check_flash_attention(make_config(*packed, "actor_rollout_ref.actor.strategy=megatron"))


def test_a_teacher_that_asks_for_flash_attention(make_config, on_a_gpu_without_flash_attn):
    key = "teacher.model.override_config.attn_implementation"
    config = make_config(SDPA, f"{PACKED}=False", f"{key}=flash_attention_2")
    expect(check_flash_attention(config), "error", f"{key}=flash_attention_2", f"{key}=sdpa")


def test_flash_attention_where_it_is_installed_or_not_needed(make_config, on_a_gpu_without_flash_attn, monkeypatch):
    config = make_config(f"{SDPA.removesuffix('sdpa')}flash_attention_2")
    assert run_checks(config) and any(check.name == "attention" for check in run_checks(config))
    monkeypatch.setattr("verl_gndpo.doctor.environment._accelerator", lambda: "npu")
    assert not check_flash_attention(config)
    monkeypatch.setattr("verl_gndpo.doctor.environment._accelerator", lambda: "cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *package: object())
    assert not check_flash_attention(config)


def test_without_gpus_ray_has_to_be_told_a_number(make_config, on_cpu):
    checks = check_accelerator(make_config("ray_kwargs.ray_init.num_gpus=null"))
    expect(checks, "warning", "Ray counts fewer than 1 GPUs", "+ray_kwargs.ray_init.num_gpus=1")


def test_a_teacher_apart_needs_a_number_of_its_own(make_config, on_cpu):
    apart = ("teacher.placement=dedicated", "teacher.n_gpus_per_node=2")
    expect(check_accelerator(make_config(*apart)), "warning", "than 3 GPUs", "num_gpus=3")
    enough = check_accelerator(make_config(*apart, "ray_kwargs.ray_init.num_gpus=3"))
    assert [check.status for check in enough] == ["ok"]


def test_fewer_devices_than_asked_for_is_a_warning_here_and_an_error_in_the_cluster(make_config, monkeypatch):
    config = make_config("trainer.n_gpus_per_node=64")
    monkeypatch.setattr("verl_gndpo.doctor.environment.without_accelerator", lambda: False)
    expect(check_accelerator(config), "warning", "visible to this process", "n_gpus_per_node=64", "head node")

    kind = get_platform().ray_resource_name()
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {kind: 8.0})
    expect(check_accelerator(config), "error", f"the Ray cluster has 8 {kind}", "n_gpus_per_node=64")
    expect(check_accelerator(make_config()), "ok", f"the Ray cluster has 8 {kind}")
