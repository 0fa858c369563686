# SPDX-License-Identifier: Apache-2.0
"""A machine without an accelerator: what is chosen, when, and what it changes."""

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from verl_gndpo.platforms import cpu, every_interpreter, without_accelerator

REPO = Path(__file__).parents[2]

needs_cpu_torch = pytest.mark.skipif(
    not without_accelerator(), reason="torch is built for an accelerator here, and the plugin leaves verl as it is"
)


@pytest.mark.parametrize(("chosen", "expected"), [("cpu", True), ("CPU ", True), ("nvidia", False), ("npu", False)])
def test_verls_own_variable_decides(monkeypatch, chosen, expected):
    monkeypatch.setenv("VERL_PLATFORM", chosen)
    assert without_accelerator() is expected


def test_a_cuda_build_without_a_visible_gpu_is_not_a_cpu_run(monkeypatch):
    """A head node, or one of Ray's CPU-only actors, belongs to a run on GPUs."""
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert not without_accelerator()
    assert not cpu.PlatformCPU().is_platform_available(use_smi_check=True)


@needs_cpu_torch
@pytest.mark.parametrize("accelerator", ["hip", "xpu", "npu", "mlu", "musa"])
def test_a_build_for_another_accelerator_is_not_a_cpu_run(monkeypatch, tmp_path, accelerator):
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    assert without_accelerator()
    if accelerator in ("hip", "xpu"):
        monkeypatch.setattr(torch.version, accelerator, "2025.2", raising=False)
        assert not without_accelerator()
        return
    # Installed, but not imported yet; and imported.
    (tmp_path / f"torch_{accelerator}.py").touch()
    with monkeypatch.context() as installed:
        installed.syspath_prepend(tmp_path)
        assert not without_accelerator()
    assert without_accelerator()
    monkeypatch.setattr(torch, accelerator, object(), raising=False)
    assert not without_accelerator()


@needs_cpu_torch
def test_verl_chooses_the_cpu_platform_by_itself():
    from verl.utils.device import get_device_id, get_device_name, get_nccl_backend, get_torch_device

    assert (get_device_name(), get_device_id(), get_nccl_backend()) == ("cpu", "cpu", "gloo")
    # verl compares the device module with torch.cpu itself.
    assert get_torch_device() is torch.cpu
    torch.cpu.empty_cache()
    assert torch.cpu.max_memory_allocated() == 0 and torch.cpu.mem_get_info() == (0, 0)


@needs_cpu_torch
def test_verl_finds_its_fsdp_engines_and_vllm():
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    for backend in ("fsdp", "fsdp2"):
        assert EngineRegistry.get_engine_cls("language_model", backend) is FSDPEngineWithLMHead
    assert importlib.metadata.version("vllm").endswith("+cpu")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("no-such-distribution")


@needs_cpu_torch
def test_process_groups_name_gloo_once(monkeypatch):
    import verl.utils.distributed as distributed

    seen = {}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **kwargs: seen.update(kwargs))
    distributed.initialize_global_process_group_ray(timeout_second=None)
    assert seen["backend"] == "cpu:gloo"


@needs_cpu_torch
def test_interpreters_that_vllm_starts_can_import_torchvision(tmp_path):
    """They import it before they load any plugin; and a sitecustomize that ours hides still runs."""
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['HIDDEN_ONE_RAN'] = 'yes'\n")
    paths = [*os.environ["PYTHONPATH"].split(os.pathsep), str(tmp_path)]
    code = "import os, torchvision, torchvision.transforms.v2; print(os.environ['HIDDEN_ONE_RAN'])"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert result.stdout.strip() == "yes", result.stderr


@needs_cpu_torch
@pytest.mark.parametrize("installed", [True, False])
def test_an_environment_in_which_every_interpreter_can_import_a_processor(tmp_path, installed):
    """Without verl. The second case shows that something else does not make it importable already."""
    if installed:
        every_interpreter.install(tmp_path)
    # -S: no sitecustomize and no .pth file but ours.
    code = (
        f"import site, sys; sys.path += {[str(REPO), sysconfig.get_path('purelib')]}; "
        f"site.addsitedir({str(tmp_path)!r}); from transformers import AutoProcessor; print('verl' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.strip() == ("False" if installed else ""), result.stderr


@needs_cpu_torch
@pytest.mark.parametrize("installed", [True, False])
def test_an_environment_in_which_vllms_command_finds_vllm(tmp_path, installed):
    """The second case shows what the command says if only torchvision can be imported."""
    if installed:
        every_interpreter.install(tmp_path)
    else:
        torchvision_only = "import verl_gndpo.platforms.torchvision_ops as ops; ops.install()\n"
        (tmp_path / every_interpreter.NAME).write_text(torchvision_only)
    code = (
        f"import site, sys; sys.path += {[str(REPO), sysconfig.get_path('purelib')]}; "
        f"site.addsitedir({str(tmp_path)!r}); sys.argv[1:] = ['--version']; "
        "from vllm.entrypoints.cli.main import main; main()"
    )
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ("PackageNotFoundError" in result.stderr) != installed, result.stderr
    assert result.stdout.strip().endswith("+cpu") == installed


def test_an_environment_without_this_package_starts_as_before(tmp_path):
    every_interpreter.install(tmp_path)
    code = f"import site; site.addsitedir({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path, env={})
    assert (result.returncode, result.stderr) == (0, "")


@needs_cpu_torch
def test_vllm_keeps_weights_where_a_weight_sync_finds_them():
    from vllm.model_executor.layers import utils

    from verl_gndpo.platforms.vllm_cpu import register

    register()
    layer = torch.nn.Linear(4, 3, bias=False)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer.cpu_linear(x, layer.weight, None), layer(x))
    assert layer.weight.shape == (3, 4)
    with torch.no_grad():
        layer.weight.zero_()
    assert (layer.cpu_linear(x, layer.weight, None) == 0).all()


@needs_cpu_torch
@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="vLLM packs these weights for AMX only")
def test_vllm_convolves_with_the_weights_that_a_weight_sync_has_written():
    """The projections of Qwen3.5's linear attention: a sequence of 9 tokens, then one token more."""
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    from verl_gndpo.platforms.vllm_cpu import register

    current_platform.import_kernels()
    register()
    torch.manual_seed(0)
    channels, width, tokens = 64, 4, 10
    weight = torch.randn(channels, 1, width, dtype=torch.bfloat16)
    x = torch.randn(tokens, channels, dtype=torch.bfloat16)
    state = torch.zeros(1, width - 1, channels, dtype=torch.bfloat16).transpose(1, 2)
    common = {"weight": weight, "bias": None, "conv_states": state, "silu_activation": True, "is_vnni": True}
    first = ops.causal_conv1d_fwd_cpu(
        x=x[:-1].T,
        query_start_loc=torch.tensor([0, tokens - 1], dtype=torch.int32),
        cache_indices=torch.tensor([0], dtype=torch.int32),
        has_initial_state=torch.tensor([False]),
        **common,
    ).T
    last = ops.causal_conv1d_update_cpu(x=x[-1:], conv_state_indices=torch.tensor([0], dtype=torch.int32), **common)
    padded = torch.nn.functional.pad(x.float().T, (width - 1, 0)).unsqueeze(0)
    expected = torch.nn.functional.silu(torch.nn.functional.conv1d(padded, weight.float(), groups=channels))[0].T
    torch.testing.assert_close(torch.cat([first, last]).float(), expected, rtol=0.02, atol=0.02)
