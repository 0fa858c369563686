# SPDX-License-Identifier: Apache-2.0
"""What the recipes find out about a GPU machine by themselves, and what their settings stand for."""

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
SDPA = "+actor_rollout_ref.model.override_config.attn_implementation=sdpa"


@pytest.fixture
def run(tmp_path):
    """Return a function that runs the script with a torch that sees so many devices, and returns overrides and log."""

    def run(
        devices: int, flash_attn: bool, recipe: str = "run_qwen2_5vl_gndpo", **environment: str
    ) -> tuple[list[str], str]:
        packages = tmp_path / "packages"
        packages.mkdir()
        # As torch.accelerator does, it obeys the variables that hide devices.
        (packages / "torch.py").write_text(f"class accelerator:\n    device_count = staticmethod(lambda: {devices})\n")
        (packages / "verl_gndpo.py").touch()
        if flash_attn:
            (packages / "flash_attn.py").touch()
        python = tmp_path / "python"
        python.write_text(
            f'#!/bin/bash\nif [ "$1" = -c ]; then PYTHONPATH={packages} exec {sys.executable} "$@"; fi\n'
            f'printf "%s\\n" "$@" >{tmp_path}/arguments\n'
        )
        python.chmod(0o755)
        environment |= {
            "PYTHON": str(python),
            "OUTPUT_DIR": str(tmp_path / "out"),
            "PATH": "/usr/bin:/bin",
            "HOME": "/",
        }
        script = ["bash", str(REPO / "examples" / f"{recipe}.sh")]
        done = subprocess.run(script, env=environment, capture_output=True, text=True, cwd=tmp_path, check=True)
        return (tmp_path / "arguments").read_text().splitlines(), done.stderr

    return run


@pytest.mark.parametrize(("devices", "expected"), [(3, 3), (1, 1), (0, 8)])
def test_it_uses_the_devices_that_torch_sees(run, devices, expected):
    """Which are fewer than the machine has with CUDA_VISIBLE_DEVICES, and one per process with MIG."""
    overrides, _ = run(devices, True)
    assert f"trainer.n_gpus_per_node={expected}" in overrides


def test_the_environment_wins(run):
    overrides, _ = run(3, True, GPUS="2")
    assert "trainer.n_gpus_per_node=2" in overrides


def test_gpus_that_only_generate_are_not_the_actors(run):
    overrides, _ = run(8, True, ROLLOUT_GPUS="4", TEACHER_GPUS="1")
    for expected in (
        "trainer.n_gpus_per_node=3",
        "trainer.v1.trainer_mode=separate_async",
        "actor_rollout_ref.rollout.n_gpus_per_node=4",
        "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl",
    ):
        assert expected in overrides


def test_it_attends_with_sdpa_where_flash_attn_is_missing_and_says_so(run):
    overrides, log = run(2, False)
    assert SDPA in overrides
    padding = [override for override in overrides if "use_remove_padding" in override]
    assert padding[-1] == "actor_rollout_ref.model.use_remove_padding=False"
    assert "flash-attn is not installed" in log and "SDPA" in log


def test_it_leaves_verls_attention_where_flash_attn_is_there(run):
    overrides, log = run(2, True)
    assert SDPA not in overrides and "flash-attn" not in log
    assert [o for o in overrides if "use_remove_padding" in o] == ["actor_rollout_ref.model.use_remove_padding=True"]


def test_torch_counts_devices_as_the_script_asks():
    """Of the torch that is installed."""
    import torch

    assert torch.accelerator.device_count() >= 0


@pytest.mark.parametrize(("method", "estimator"), [("gspo", "grpo"), ("opd", "opd"), ("gndpo", "gndpo")])
def test_the_methods_of_the_published_experiment(run, method, estimator):
    overrides, _ = run(8, True, "run_internvl3_5_gndpo", SIZE="1B", METHOD=method)
    assert f"algorithm.adv_estimator={estimator}" in overrides and "+recipe=gndpo" in overrides
    assert "actor_rollout_ref.model.path=OpenGVLab/InternVL3_5-1B-HF" in overrides
    assert "teacher.model.path=OpenGVLab/InternVL3_5-8B-HF" in overrides


@pytest.mark.parametrize(("teacher", "group", "gpus"), [("8B", "worker", 8), ("30B-A3B", "server", 6)])
def test_a_server_takes_two_of_the_gpus(run, teacher, group, gpus):
    overrides, _ = run(8, True, "run_qwen3_vl_gndpo", TEACHER_SIZE=teacher)
    assert f"+teacher={group}" in overrides and f"trainer.n_gpus_per_node={gpus}" in overrides
    assert ("teacher.n_gpus_per_node=2" in overrides) == (group == "server")


@pytest.mark.parametrize(("recipe", "setting"), [("run_internvl3_5_gndpo", "METHOD"), ("run_lora_1gpu", "MEMORY")])
def test_a_wrong_choice_ends_with_what_there_is_to_choose(run, recipe, setting):
    with pytest.raises(subprocess.CalledProcessError) as raised:
        run(1, True, recipe, **{setting: "other"})
    assert raised.value.returncode == 2
    assert f"{setting} must be" in raised.value.stderr and "'other'" in raised.value.stderr


def test_without_slurm_the_launcher_says_what_to_do():
    script = ["bash", str(REPO / "examples" / "multinode.sh"), "examples/run_qwen2_5vl_gndpo.sh"]
    done = subprocess.run(script, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 2 and "sbatch" in done.stderr and "ray start" in done.stderr
