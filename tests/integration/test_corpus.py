# SPDX-License-Identifier: Apache-2.0
"""The two overrides of the promise on all 91 of verl's example scripts that train with its PPO trainer.

tests/corpus.json holds each script's settings as far as they differ from verl's defaults and the doctor reads them. The
models are tiny members of each script's own family. A teacher that is accepted has scored with a small model of its
architecture, as close as a plain forward pass (`verl_gndpo.teacher.trial`), and tests/integration/test_zoo.py has
compared the family's real worker with transformers.
"""

import functools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from PIL import Image

from tests import zoo
from tests.helpers import verl_config
from verl_gndpo.doctor.run import run_checks

SCRIPTS = json.loads((Path(__file__).parents[1] / "corpus.json").read_text())
NO_MODEL = {"minicpm_o", "kimi_k2"}
"""Families whose models come with code of their own, which the tests have not got."""

WRONG_KEY = "actor_rollout_ref.actor.model_engine=megatron"
"""Of two scripts; verl has this key at the top level only, and refuses their config with any estimator."""

NO_ENGINE = ("model_engine=mindspeed", "actor@actor_rollout_ref.actor=mlite_actor")
"""Groups of settings that stock verl 0.9.1 lacks: another package has them."""


def why_refused(entry):
    """Return why a script is not accepted; None if it is."""
    if entry["student"] in NO_MODEL:
        return f"no tiny model of {entry['student']}"
    if WRONG_KEY in entry["settings"]:
        return f"verl refuses {WRONG_KEY}"
    lacking = [group for group in NO_ENGINE if group in entry["settings"]]
    return f"stock verl has no {lacking[0]}" if lacking else None


REFUSED = {name: why for name, entry in SCRIPTS.items() if (why := why_refused(entry))}
"""Scripts that are not accepted, and why."""

WITH_TEACHERS = [name for name, entry in SCRIPTS.items() if "distillation.enabled=True" in entry["settings"]]
"""verl's own distillation scripts, which name their teachers themselves."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function that builds a model of a family once; text-only students get a tokenizer as their processor."""
    built = {}

    def get(family, seed):
        if (family, seed) not in built:
            make = zoo.build_with_own_code if family == "mimo" else functools.partial(zoo.build, family)
            built[family, seed] = make(tmp_path_factory.mktemp(family), seed=seed)
        return str(built[family, seed])

    return get


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return two files of rows, without and with images."""
    folder = tmp_path_factory.mktemp("data")
    Image.fromarray(np.zeros((56, 56, 3), np.uint8)).save(folder / "image.png")
    image = {"bytes": (folder / "image.png").read_bytes(), "path": None}
    for name, source in (("text", "openai/gsm8k"), ("images", "hiyouga/geometry3k")):
        rows = 4096
        table = {
            "data_source": [source] * rows,
            "prompt": [[{"role": "user", "content": "<image>How many?" if name == "images" else "How many?"}]] * rows,
            "reward_model": [{"style": "rule", "ground_truth": "1"}] * rows,
        }
        if name == "images":
            table["images"] = [[image]] * rows
        pq.write_table(pa.table(table), folder / f"{name}.parquet")
    return {name: str(folder / f"{name}.parquet") for name in ("text", "images")}


@pytest.fixture
def on_a_gpu_machine(monkeypatch):
    """Answer the questions about the machine as one with accelerators, rollout engines and kernels would."""
    for module in ("doctor.environment", "doctor.settings", "config"):
        monkeypatch.setattr(f"verl_gndpo.{module}.without_accelerator", lambda: False)
    from verl_gndpo.doctor import environment

    installed = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: installed(name) or ("1" if name != "verl" else None))


def compose(entry, models, data):
    """Return the config of a script with the two overrides."""
    family = entry["student"]
    settings = [text for text in entry["settings"] if "model_path=" not in text]
    teachers = dict(text.split("=") for text in entry["settings"] if "model_path=" in text)
    groups = [text for text in settings if text.startswith(("model_engine=", "actor@"))]
    keys = [f"++{text}" for text in settings if text not in groups]
    files = [data["images"] if entry.get("media") else data["text"]]
    if teachers:
        keys += [f"++{key}={models(of, 4)}" for key, of in teachers.items()]
        files = sorted({data["images" if zoo_sees(of) else "text"] for of in teachers.values()})
        promise = ["+teacher.from_distillation=True"]
    else:
        promise = [f"+teacher.model.path={models(family, 4)}"]
        if family == "mimo":
            promise.append("+teacher.model.trust_remote_code=True")
    return verl_config(
        *groups,
        *keys,
        f"actor_rollout_ref.model.path={models(family, 3)}",
        f"data.train_files=[{','.join(files)}]",
        f"data.val_files=[{','.join(files)}]",
        "algorithm.adv_estimator=gndpo",
        *promise,
    )


def zoo_sees(family):
    return family in zoo.IMAGE_FAMILIES


def test_the_corpus_has_all_scripts():
    assert len(SCRIPTS) == 91


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_accepted(name, models, data, on_a_gpu_machine):
    entry = SCRIPTS[name]
    if entry["student"] in NO_MODEL:
        pytest.skip(REFUSED[name])
    if REFUSED.get(name, "").startswith("stock verl has no"):
        with pytest.raises(MissingConfigException):
            compose(entry, models, data)
        return
    config = compose(entry, models, data)
    OmegaConf.set_struct(config, False)
    errors = [str(check) for check in run_checks(config) if check.status == "error"]
    if name in REFUSED:
        assert len(errors) == 1 and "verl refuses this config" in errors[0]
    else:
        assert not errors


def test_how_many_are_accepted():
    """The figure in docs/models.md."""
    accepted = len(SCRIPTS) - len(REFUSED)
    assert accepted >= 84
    print(Counter(entry["student"] for name, entry in SCRIPTS.items() if name not in REFUSED))
