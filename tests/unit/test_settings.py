# SPDX-License-Identifier: Apache-2.0
"""Every declared range is enforced, every default is documented, and no declaration can go without a test noticing."""

import dataclasses
import importlib.util
import itertools
import math
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.unit.conftest import verl_config
from verl_gndpo import advantage, config, setting
from verl_gndpo.config import (
    ConfigError,
    GNDPOSection,
    TeacherSection,
    declared_settings,
    default_groups,
    gndpo_section,
    read_signal_config,
    read_teacher_config,
)

NAN, INF = math.nan, math.inf
DEDICATED = {"placement": "dedicated", "n_gpus_per_node": 1}
# By full key: values just outside of each limit, values at the edges of what is allowed, and what has to stand beside
# them. Written by hand: it says again, independently, what config.py and advantage.py declare.
CASES: dict[str, tuple[list, list, dict]] = {
    "algorithm.gndpo.bound": (["clip"], ["none", "clamp", "log_odds"], {}),
    "algorithm.gndpo.baseline": (["mean"], ["none", "batch", "group", "position", "teacher", "kl"], {}),
    "algorithm.gndpo.scale": (["std"], ["none", "batch", "group", "teacher", "ema", "rank"], {}),
    "algorithm.gndpo.top_k": ([0, -1], [1, 10**6], {}),
    "algorithm.gndpo.ema_decay": ([-1e-9, 1.0, NAN], [0.0, 0.999], {}),
    "algorithm.gndpo.std_floor": ([0.0, -1.0, NAN], [1e-12, 10.0], {}),
    "algorithm.gndpo.gain_limit": ([0.0, -1.0, NAN], [1e-6, 1e6, None], {}),
    "algorithm.gndpo.limit": ([0.0, -1.0, NAN], [1e-6, 1e6, None], {}),
    "algorithm.gndpo.power_alpha": ([0.0, -1.0, NAN], [1e-6, 50.0], {}),
    "algorithm.gndpo.negative_limit": ([0.0, -0.1, 1.001, NAN], [1e-6, 1.0], {}),
    "algorithm.gndpo.proximal_alpha": ([0.0, 1.0, -0.1, NAN], [1e-6, 0.999], {}),
    "algorithm.gndpo.soft_clamp_factor": ([0.0, -1.0, NAN], [1e-6, 100.0], {}),
    "algorithm.gndpo.task_reward.coef": ([-1e-9, INF, NAN], [0.0, 1e6], {}),
    "algorithm.gndpo.worst_tokens.every": ([-1], [0, 1], {}),
    "algorithm.gndpo.rollout_seed": ([-1], [0, 2**40, None], {}),
    "algorithm.gndpo.rollout_timeout_s": ([0.0, -1.0, INF, NAN], [1e-3, 1e6, None], {}),
    "algorithm.gndpo.max_lost_share": ([-0.1, 1.001, NAN], [0.0, 1.0], {}),
    "algorithm.gndpo.worst_tokens.count": ([0], [1], {}),
    "algorithm.gndpo.worst_tokens.path": ([""], ["worst.jsonl", None], {}),
    "algorithm.gndpo.warn.gain": ([0.0, -1.0, NAN], [1e-6, 1e6, None], {}),
    "algorithm.gndpo.warn.sign_flip_share": ([0.0, 1.001, NAN], [1e-6, 1.0, None], {}),
    "algorithm.gndpo.warn.truncated_share_rise": ([0.0, 1.001, NAN], [1e-6, 1.0, None], {}),
    "algorithm.gndpo.warn.correlation": ([0.0, 1.001, NAN], [1e-6, 1.0, None], {}),
    "algorithm.gndpo.warn.data_source_gradient_share": ([0.0, 1.001, NAN], [1e-6, 1.0, None], {}),
    "teacher.backend": (["sever"], ["worker"], {}),
    "teacher.placement": (["else"], ["colocated", None], {}),
    "teacher.n_gpus_per_node": ([0, -1], [1, 8], {"placement": "dedicated"}),
    "teacher.nnodes": ([0, -1], [1, 8], DEDICATED),
    "teacher.models.<name>.weight": ([0.0, -1.0, INF, NAN], [1e-6, 1e6], {}),
    "teacher.routing_key": ([""], ["data_source"], {}),
    "teacher.temperature": ([0.0, -1.0, NAN], [1e-6, 10.0, None], {}),
    "teacher.dtype": (["int8"], ["float32", "bfloat16", "float16", None], {}),
    "teacher.max_token_len_per_gpu": ([0, -1], [1, 10**6, None], {}),
    "teacher.logits_chunk_tokens": ([0, -1], [1, 10**6], {}),
    "teacher.ulysses_sequence_parallel_size": ([0, -1], [1, 8], {}),
    "teacher.attention": (["flash"], ["sdpa", "flex"], {}),
    "teacher.sharing": (["kv"], ["auto", "attention", "cache", "none"], {}),
    "teacher.nccl_timeout": ([0, -1], [1, 86400, None], {}),
    "teacher.timeout_s": ([0.0, -1.0, INF, NAN], [1e-3, 1e6, None], {}),
    "teacher.max_restarts": ([-1], [0, 3], {}),
    "teacher.fsdp.strategy": (["megatron"], ["fsdp", "fsdp2"], {}),
    "teacher.fsdp.fsdp_size": ([0, -2], [-1, 1, 8], {}),
}


def read(key: str, value: object, beside: dict) -> None:
    """Read a config that gives one setting."""
    section, path = key.split(".gndpo.") if ".gndpo." in key else key.split(".", 1)
    given = dict(beside)
    if "<name>" in path:
        given["models"] = {"one": {"path": "A", path.rsplit(".", 1)[1]: value}}
    else:
        *outer, last = path.split(".")
        place = given
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
    if section == "algorithm":
        read_signal_config({"gndpo": given}, "gndpo")
        return
    if "models" not in given:
        given.setdefault("model", {"path": "T"})
    student = {"rollout": {"temperature": 1.0}, "model": {}}
    read_teacher_config(OmegaConf.create({"teacher": given, "actor_rollout_ref": student}))


def refuses(key: str, value: object, beside: dict) -> bool:
    try:
        read(key, value, beside)
    except ConfigError as error:
        assert key.replace("<name>", "one") in str(error), error
        return True
    return False


def all_settings() -> dict[str, setting.Setting]:
    return declared_settings("algorithm.gndpo", gndpo_section()) | declared_settings("teacher", TeacherSection)


@pytest.mark.parametrize("key", CASES)
def test_values_outside_of_a_range_are_refused_by_their_key(key):
    outside, inside, beside = CASES[key]
    assert [value for value in outside if not refuses(key, value, beside)] == []
    assert [value for value in inside if refuses(key, value, beside)] == []


def limits_of(declared: setting.Setting) -> list[dict]:
    """Return each way to weaken a range: without one of its limits, or with one choice more or less."""
    weaker: list[dict] = [
        {name: None} for name in ("above", "at_least", "below", "at_most") if getattr(declared, name) is not None
    ]
    # An open end becomes a closed one, and the other way round.
    weaker += [{"above": None, "at_least": declared.above}] if declared.above is not None else []
    weaker += [{"below": None, "at_most": declared.below}] if declared.below is not None else []
    weaker += [{"at_most": None, "below": declared.at_most}] if declared.at_most is not None else []
    weaker += [{"at_least": None, "above": declared.at_least}] if declared.at_least is not None else []
    weaker += [{"also": ()}] if declared.also else []
    weaker += [{"choices": None}] if declared.choices else []
    return weaker


MUTATIONS = [(key, weaker) for key, declared in all_settings().items() for weaker in limits_of(declared)]


@pytest.mark.parametrize(("key", "weaker"), MUTATIONS, ids=str)
def test_a_weakened_range_is_noticed(key, weaker, monkeypatch):
    """Mutate one limit of one setting; a case of the table above must then have another outcome."""
    weaken(key, weaker, monkeypatch)
    outside, inside, beside = CASES[key]
    noticed = False
    for value, expected in [(value, True) for value in outside] + [(value, False) for value in inside]:
        try:
            noticed |= refuses(key, value, beside) != expected
        except (TypeError, KeyError, AttributeError):
            # Past the check that is gone, the value breaks something else.
            noticed = True
    assert noticed, f"{key} without its limit passes every case of the table"


def weaken(key: str, weaker: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    name = key.rsplit(".", 1)[1]
    mutated = 0
    sections: list[type] = [GNDPOSection, TeacherSection, config.NamedTeacherSection]
    for section in sections:
        sections += [f.default_factory for f in fields(section) if is_dataclass(f.default_factory)]
        for declared in fields(section):
            own = setting.of(declared)
            if declared.name == name and own == all_settings_before[key]:
                monkeypatch.setattr(declared, "metadata", {"setting": replace(own, **weaker)})
                mutated += 1
    for bound_name, bound in advantage.BOUNDS.items():
        if name in bound.parameters:
            parameters = {**bound.parameters, name: replace(bound.parameters[name], **weaker)}
            monkeypatch.setitem(advantage.BOUNDS, bound_name, replace(bound, parameters=parameters))
            mutated += 1
    if name == "bound":
        # Its choices are the names of the registered bounds.
        monkeypatch.setattr(config, "BOUNDS", Everything(advantage.BOUNDS))
        mutated += 1
    assert mutated, key


class Everything(dict):
    """A registry that knows every name."""

    def __iter__(self):
        return itertools.chain(super().__iter__(), ["clip"])

    def __getitem__(self, name):
        return super().get(name, advantage.BOUNDS["none"])


all_settings_before = all_settings()


def test_every_range_has_cases_and_every_case_a_setting():
    ranged = {key for key, declared in all_settings().items() if declared.range}
    assert ranged <= CASES.keys() <= all_settings().keys()


def test_every_setting_says_what_it_means():
    for key, declared in all_settings().items():
        assert declared.doc.endswith("."), key
        value = declared.default
        assert value is None or not declared.range or declared.allows(value), key


def test_the_page_of_settings_is_what_the_declarations_say():
    path = Path(__file__).parents[2] / "docs" / "make_settings.py"
    spec = importlib.util.spec_from_file_location("make_settings", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run: python docs/make_settings.py"


def test_hydras_groups_hold_what_the_declarations_default_to():
    composed = verl_config("+gndpo=default", "+teacher=worker")
    groups = default_groups()
    assert OmegaConf.to_container(composed.algorithm.gndpo) == groups["gndpo", "default"]
    assert OmegaConf.to_container(composed.teacher) == groups["teacher", "worker"]
    servers = verl_config("+teacher=server").teacher
    assert (servers.backend, servers.placement) == ("server", "dedicated")
    # The groups change nothing: null and the defaults mean what a missing section means.
    assert read_signal_config(composed.algorithm, "top_d") == read_signal_config(None, "top_d")


def test_raw_and_resolved_settings_are_two_types():
    resolved = read_signal_config(None, "gndpo")
    raw = gndpo_section()()
    assert not isinstance(raw, type(resolved)) and raw.bound is None and resolved.signal.bound == "clamp"
    assert all(value is not None for value in vars(resolved.signal).values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved.signal.bound = "none"
