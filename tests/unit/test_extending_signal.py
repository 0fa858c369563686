# SPDX-License-Identifier: Apache-2.0
"""docs/extending/signal.md: its code runs, its names are selectable, and docs/signal.md lists what is registered."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from verl_gndpo import register_bound, register_preset
from verl_gndpo.advantage import BASELINES, BOUNDS, SCALES
from verl_gndpo.config import ConfigError
from verl_gndpo.presets import PRESETS
from verl_gndpo.setting import Setting

DOCS = Path(__file__).parents[2] / "docs"
(MODULE,) = re.findall(r"```python\n(.*?)```", (DOCS / "extending" / "signal.md").read_text(), re.DOTALL)
TABLES = (DOCS / "signal.md").read_text()

# What a driver does: import verl, compose its config, ask the registry for the estimator, check the settings.
DRIVER = """
import json, sys
{first}
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException
import torch
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl_gndpo.config import read_signal_config

def config(*overrides):
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", ["+gndpo=default", "algorithm.adv_estimator=arctan_gndpo", *overrides]).algorithm

def refusal(*overrides):
    try:
        read_signal_config(config(*overrides), "arctan_gndpo")
    except (ValueError, ConfigCompositionException) as error:
        return str(error)

teacher, old = torch.tensor([[-1.0, -2.0, -0.5]]), torch.tensor([[-3.0, -1.0, -0.6]])
inputs = dict(response_mask=torch.ones(1, 3), teacher_log_probs=teacher, old_log_probs=old)
plain = config("algorithm.gndpo.baseline=none", "algorithm.gndpo.scale=none", "algorithm.gndpo.softness=3.0")
print(json.dumps({{
    "default": config().gndpo.softness,
    "resolved": dict(read_signal_config(config(), "arctan_gndpo").signal.parameters),
    "whitened": get_adv_estimator_fn("arctan_gndpo")(config=config(), **inputs)[0].tolist(),
    "plain": get_adv_estimator_fn("arctan_gndpo")(config=plain, **inputs)[0].tolist(),
    "range": refusal("algorithm.gndpo.softness=0.0"),
    "unknown": refusal("+algorithm.gndpo.softnes=1.0"),
}}))
"""


@pytest.mark.parametrize(
    "first",
    [
        "import verl",
        "import verl_gndpo.estimators, verl",
        "import my_signal, verl",
        "import verl.trainer.ppo.core_algos",
    ],
)
def test_the_pages_module_reaches_the_driver_in_any_order_of_imports(first, tmp_path):
    (tmp_path / "my_signal.py").write_text(MODULE)
    environment = {"VERL_USE_EXTERNAL_MODULES": "my_signal", "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", DRIVER.format(first=first)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["default"] is None and found["resolved"] == {"softness": 1.0}, "the preset decides"
    k = [2 / math.pi * math.atan(d / 3.0) for d in (2.0, -1.0, 0.1)]
    assert found["plain"][0] == pytest.approx(k, rel=1e-5)
    k = [2 / math.pi * math.atan(d) for d in (2.0, -1.0, 0.1)]
    mean = sum(k) / 3
    deviation = math.sqrt(sum((x - mean) ** 2 for x in k) / 2 + 1e-8)
    assert found["whitened"][0] == pytest.approx([(x - mean) / deviation for x in k], rel=1e-5)
    assert "algorithm.gndpo.softness must be above 0" in found["range"]
    assert "did you mean algorithm.gndpo.softness?" in found["unknown"]


def test_the_pages_module_is_short():
    assert len([line for line in MODULE.splitlines() if line.strip()]) <= 15


@pytest.fixture
def registries():
    """Undo what a test registers."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    with patch.dict(BOUNDS), patch.dict(PRESETS), patch.dict(ADV_ESTIMATOR_REGISTRY):
        yield


def test_names_that_are_taken_are_refused(registries):
    with pytest.raises(ValueError, match="bound called clamp already"):
        register_bound("clamp")
    for name in ("gndpo", "grpo"):
        with pytest.raises(ValueError, match=f"estimator called {name} already"):
            register_preset(name, bound="none")


def test_a_shared_parameter_is_declared_alike(registries):
    with pytest.raises(ValueError, match="parameter limit of bound mine is declared differently by bound clamp"):
        register_bound("mine", limit=Setting(1.0, "Another limit.", above=0))
    register_bound("mine", limit=BOUNDS["clamp"].parameters["limit"])(lambda teacher, old, limit: teacher - old)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ({"bound": "clam"}, "clamp"),
        ({"bound": "clamp", "limit": -1.0}, "limit must be above 0"),
        ({"bound": "tanh", "limit": 1.0}, "bound tanh has no parameter limit"),
        ({"bound": "clamp", "scal": "batch"}, "did you mean .*scale"),
    ],
)
def test_a_preset_that_cannot_work_is_refused_when_it_is_registered(registries, stages, words):
    with pytest.raises(ConfigError, match=words):
        register_preset("mine", **stages)
    assert "mine" not in PRESETS


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table below a heading of docs/signal.md, without the table's own heading."""
    section = TABLES.split(f"\n## {heading}")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def test_the_page_lists_every_bound_with_its_parameters():
    listed = {name: (names(row[2]), re.findall(r"[\d.]+$", row[2])) for row in rows("Bound") for name in names(row[0])}
    assert listed.keys() == BOUNDS.keys()
    for name, (parameters, defaults) in listed.items():
        declared = BOUNDS[name].parameters
        assert parameters == list(declared)
        assert [float(x) for x in defaults] == [setting.default for setting in declared.values()]


def test_the_page_lists_every_baseline_and_scale():
    assert [name for row in rows("Baseline") for name in names(row[0])] == list(BASELINES)
    assert [name for row in rows("Scale") for name in names(row[0])] == list(SCALES)


def test_the_page_lists_every_preset_with_its_stages():
    listed = {}
    for preset, bounds, baseline, scale in rows("Presets"):
        several = names(preset)
        bounds = [x.strip() for x in bounds.split(",")] if len(bounds.split(",")) > 1 else [bounds] * len(several)
        for name, bound in zip(several, bounds, strict=True):
            bound, *value = (name.removesuffix("_opd") if bound == "of that name" else bound).split()
            listed[name] = (bound, [float(x) for x in value], baseline, scale)
    assert listed.keys() == PRESETS.keys()
    for name, (bound, value, baseline, scale) in listed.items():
        preset = PRESETS[name]
        assert (bound, baseline, scale) == (preset["bound"], preset["baseline"], preset["scale"])
        given = [preset[key] for key in BOUNDS[bound].parameters if key in preset]
        assert value == given or (not value and name in ("log_odds_opd", "odds_opd", "gap_opd"))
