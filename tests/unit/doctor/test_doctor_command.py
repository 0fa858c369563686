# SPDX-License-Identifier: Apache-2.0
"""`verl-gndpo doctor`: what it prints and its exit code. What each check finds is in the files beside this one."""

import os
import subprocess
import sys

import hydra
import pytest
from rich.console import Console
from typer.testing import CliRunner

from verl_gndpo import cli
from verl_gndpo.doctor.check import Check
from verl_gndpo.verl_patches import PATCHES

LONG_PATH = "/a/very/long/path/" + "/".join(["folder"] * 40) + "/train.parquet"


@pytest.fixture
def doctor():
    def run(*arguments):
        return CliRunner().invoke(cli.app, ["doctor", *arguments])

    return run


@pytest.fixture
def found(monkeypatch):
    """What run_checks is to find; also keeps the config that it was asked about."""
    asked = []

    def pretend(*checks):
        monkeypatch.setattr("verl_gndpo.doctor.run.run_checks", lambda config: asked.append(config) or list(checks))
        return asked

    return pretend


def test_nothing_wrong(doctor, found):
    asked = found(Check("verl", "ok", "0.9.1"))
    result = doctor()
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "ok      verl: 0.9.1"
    assert "environment ready" in result.stdout and "no run was checked" in result.stdout
    assert asked == [None]


def test_warnings_don_t_count(doctor, found):
    found(Check("data", "warning", "odd", "look"))
    result = doctor("algorithm.adv_estimator=gndpo")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "warning data: odd -> look",
        "ready to start: 0 error(s), 1 warning(s)",
    ]


def test_one_error_is_enough(doctor, found):
    found(Check("a", "ok", "fine"), Check("b", "error", f"{LONG_PATH} is gone", "find it"))
    result = doctor("algorithm.adv_estimator=gndpo")
    assert result.exit_code == 1
    # Not wrapped and not cut, for a log file or a search.
    assert f"error   b: {LONG_PATH} is gone -> find it" in result.stdout.splitlines()
    assert result.stdout.splitlines()[-1] == "not ready: 1 error(s), 0 warning(s)"


def test_a_table_on_a_terminal_cuts_nothing_either(found, monkeypatch, capsys):
    monkeypatch.setattr("rich.console.Console", lambda: Console(force_terminal=True, width=60, color_system=None))
    cli._show([Check("data", "error", f"{LONG_PATH} is gone", "find it")])
    shown = "".join(line.split("│")[3].strip() for line in capsys.readouterr().out.splitlines() if "│" in line)
    assert LONG_PATH in shown
    assert "-> find it" in shown


def test_the_overrides_are_those_of_main_ppo(doctor, found):
    asked = found()
    overrides = ("+teacher=worker", "teacher.model.path=T", "+gndpo=default", "~trainer.logger", "trainer.test_freq=-1")
    assert doctor(*overrides, "hydra.run.dir=elsewhere").exit_code == 0
    (config,) = asked
    assert config.teacher.model.path == "T"
    assert config.algorithm.gndpo.std_floor == 1e-4
    assert "logger" not in config.trainer
    assert config.trainer.test_freq == -1
    assert config.trainer.v1.trainer_mode == "sync"


def test_another_config_of_the_users_own(doctor, found, tmp_path):
    asked = found()
    (tmp_path / "mine.yaml").write_text(
        "hydra: {searchpath: [pkg://verl.trainer.config]}\ndefaults: [ppo_trainer, _self_]\ndata: {seed: 7}\n"
    )
    assert doctor("--config-path", str(tmp_path), "--config-name=mine", "data.shuffle=False").exit_code == 0
    assert asked[0].data.seed == 7 and asked[0].data.shuffle is False


@pytest.mark.parametrize(
    ("override", "words"),
    [("trainer.nope=1", "trainer.nope"), ("+teacher=nonesuch", "nonesuch"), ("a==(", "mismatched input")],
)
def test_what_hydra_rejects(doctor, override, words):
    result = doctor(override)
    assert result.exit_code == 2
    assert "Hydra rejects this command" in result.stderr and words in result.stderr


def test_a_rejected_override_says_that_the_plugin_is_missing(doctor, monkeypatch):
    monkeypatch.delitem(sys.modules, "verl_gndpo.plugin")
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    result = doctor("teacher.model.path=T")
    assert result.exit_code == 2
    assert "verl has not loaded verl-gndpo: VERL_USE_EXTERNAL_PLUGINS=none" in result.stderr


def test_hydra_is_left_as_it_was(doctor, found):
    found()
    doctor("trainer.test_freq=1")
    doctor("trainer.nope=1")
    assert not hydra.core.global_hydra.GlobalHydra.instance().is_initialized()


def test_the_real_command_refuses_a_run_that_can_t_start(tmp_path):
    """In a process of its own, with verl's defaults and nothing else."""
    command = [sys.executable, "-m", "verl_gndpo.cli", "doctor", "algorithm.adv_estimator=gndpo", "+teacher=worker"]
    result = subprocess.run(
        [*command, "teacher.model.path=/no/teacher", f"data.train_files={tmp_path}/train.parquet"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "40"},
        timeout=300,
    )
    assert result.returncode == 1, result.stderr
    lines = result.stdout.splitlines()
    assert any(line.startswith("ok      plugin: estimators gndpo, opd") for line in lines)
    assert "error   teacher: teacher folder /no/teacher does not exist -> correct teacher.model.path" in lines
    assert any(
        line.startswith("error   data:") and f"{tmp_path}/train.parquet does not exist" in line for line in lines
    )
    assert lines[-1].startswith("not ready: ")


def test_verbose_lists_patches_and_what_a_module_of_the_user_registers(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from verl_gndpo import register_bound, register_preset\n"
        "from verl_gndpo.setting import Setting\n"
        "@register_bound('halved', part=Setting(0.5, 'Share of D.', above=0, at_most=1))\n"
        "def halved(teacher, old, part):\n"
        "    return part * (teacher - old)\n"
        "register_preset('halved_opd', bound='halved')\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    result = subprocess.run(
        [sys.executable, "-m", "verl_gndpo.cli", "doctor", "--verbose"],
        capture_output=True,
        text=True,
        env=os.environ | {"VERL_USE_EXTERNAL_MODULES": "mine", "PYTHONPATH": path, "COLUMNS": "40"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    patches = {line.split()[1].rstrip(":"): line for line in lines if line.startswith("patch ")}
    assert patches.keys() == {patch.name for patch in PATCHES}
    # The trainer's process has imported what these change, and not what only an actor imports with a setting.
    for name in ("position_ids", "trainers", "internvl_pixel_values"):
        assert f"patch {name}: applied" in patches[name]
    assert "patch freeze_vision_tower: not needed (actor)" in patches["freeze_vision_tower"]
    assert all("upstream: " in line and "remove when " in line for line in patches.values())
    assert "estimator gndpo: bound=clamp, limit=5.0, baseline=batch, scale=batch" in lines
    assert "estimator halved_opd: bound=halved, baseline=none, scale=none" in lines
    assert "bound halved: part (0.5; above 0 and at most 1)" in lines
    assert "bound none: no parameters" in lines
    assert any(line.startswith("model family Qwen-VL: qwen2_vl") for line in lines)
