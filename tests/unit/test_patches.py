# SPDX-License-Identifier: Apache-2.0
"""patches/ and its run-time counterpart: stock verl 0.9.1 fails, patched verl and fixed verl agree with each other."""

import importlib.metadata
import importlib.util
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from verl_gndpo import verl_fixes

REPO = Path(__file__).parents[2]
PATCH = REPO / "patches" / "verl-0.9.1" / "0001-repack-3d-position-ids.patch"
UPSTREAM_TEST = "tests/utils/test_3d_position_ids_on_cpu.py"
PATCHED_FILE = "verl/utils/tensordict_utils.py"
NUM_AXES = 4

pytestmark = pytest.mark.skipif(
    importlib.metadata.version("verl") != "0.9.1", reason="the patches and fixes are for verl 0.9.1 only"
)


def apply_patches(checkout, *options):
    command = ["bash", str(REPO / "patches" / "apply.sh"), str(checkout), *options]
    return subprocess.run(command, capture_output=True, text=True)


def stock_verl():
    """The installed verl's folder, found without importing verl (which takes seconds and loads plugins)."""
    return Path(importlib.util.find_spec("verl").submodule_search_locations[0])


@pytest.fixture
def small_checkout(tmp_path):
    """The files of verl that the patches and the script look at."""
    for name in ("version/version", "utils/tensordict_utils.py"):
        target = tmp_path / "checkout" / "verl" / name
        target.parent.mkdir(parents=True)
        shutil.copy(stock_verl() / name, target)
    (tmp_path / "checkout" / "tests").mkdir()
    return tmp_path / "checkout"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the script -------------------------------------------------------------------------------------------------------


def test_apply_then_say_so_when_repeated(small_checkout):
    stock = contents(small_checkout)

    check = apply_patches(small_checkout, "--check")
    assert check.returncode == 0, check.stderr
    assert f"would apply: {PATCH.name}" in check.stdout
    assert contents(small_checkout) == stock

    first = apply_patches(small_checkout)
    assert first.returncode == 0, first.stderr
    assert f"applied: {PATCH.name}" in first.stdout
    patched = contents(small_checkout)
    assert patched.keys() - stock.keys() == {Path(UPSTREAM_TEST)}
    assert {path for path in stock if patched[path] != stock[path]} == {Path(PATCHED_FILE)}

    for options in ((), ("--check",)):
        again = apply_patches(small_checkout, *options)
        assert again.returncode == 0, again.stderr
        assert again.stdout == f"already applied: {PATCH.name}\n"
        assert contents(small_checkout) == patched


def test_installed_verl_gets_no_tests_folder(small_checkout):
    (small_checkout / "tests").rmdir()
    assert apply_patches(small_checkout).returncode == 0
    assert not (small_checkout / "tests").exists()
    assert "already applied" in apply_patches(small_checkout).stdout


def test_checkout_inside_another_repository(small_checkout):
    """git skips a subfolder's files without a word when it takes the paths as relative to the outer repository."""
    subprocess.run(["git", "init", "--quiet", str(small_checkout.parent)], check=True)
    stock = contents(small_checkout)
    assert apply_patches(small_checkout).returncode == 0
    assert contents(small_checkout)[Path(PATCHED_FILE)] != stock[Path(PATCHED_FILE)]


def test_hard_linked_original_is_not_written_through(small_checkout, tmp_path):
    """uv links an environment's files to its cache: writing through the link would patch every other environment."""
    link = tmp_path / "cache.py"
    os.link(small_checkout / PATCHED_FILE, link)
    before = link.read_bytes()
    assert apply_patches(small_checkout).returncode == 0
    assert link.read_bytes() == before != (small_checkout / PATCHED_FILE).read_bytes()


@pytest.mark.parametrize("options", [(), ("--check",)])
def test_other_version_is_refused_by_name(small_checkout, options):
    (small_checkout / "verl" / "version" / "version").write_text("0.9.2\n")
    before = contents(small_checkout)
    result = apply_patches(small_checkout, *options)
    assert result.returncode == 2
    assert "no patches for verl 0.9.2" in result.stderr and "verl-0.9.1" in result.stderr
    assert contents(small_checkout) == before


def test_patch_that_does_not_fit_changes_nothing(small_checkout):
    """Half of the patch could be applied here (its new test file); none of it is."""
    source = small_checkout / PATCHED_FILE
    source.write_text(source.read_text().replace("._ragged_idx = 2", "._ragged_idx = 3"))
    before = contents(small_checkout)
    result = apply_patches(small_checkout)
    assert result.returncode == 1
    assert PATCH.name in result.stderr and PATCHED_FILE in result.stderr
    assert contents(small_checkout) == before


@pytest.mark.parametrize("arguments", [["no/such/folder"], [], [".", "--force"], [".", "."]])
def test_wrong_use(arguments, tmp_path):
    command = ["bash", str(REPO / "patches" / "apply.sh"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("apply.sh: ")


# --- the diff's own test, in stock, patched and fixed verl ------------------------------------------------------------

RUN_UPSTREAM_TEST = """
import json, sys
import pytest

class Outcomes(dict):
    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self[report.nodeid.split("::")[1]] = [report.outcome, report.longreprtext]

def outcomes():
    found = Outcomes()
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "--noconftest", "--rootdir=."]
    pytest.main([*options, sys.argv[1]], plugins=[found])
    return found

results = {"as_is": outcomes()}
if "--then-fix" in sys.argv:
    from verl_gndpo import verl_fixes
    verl_fixes.apply()
    results["fixed"] = outcomes()
import verl
results["verl"] = verl.__path__[0]
json.dump(results, open("results.json", "w"))
"""


def run_upstream_test(checkout, *options):
    """Run the diff's test in a process of its own, on the verl in `checkout`: {name: (outcome, failure text)}."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(checkout), str(REPO)]),
        "VERL_USE_EXTERNAL_PLUGINS": "none",
        "PYTEST_ADDOPTS": "",
    }
    command = [sys.executable, "-c", RUN_UPSTREAM_TEST, UPSTREAM_TEST, *options]
    process = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    results = json.loads((checkout / "results.json").read_text())
    assert Path(results["verl"]).parent.samefile(checkout)
    return results


@pytest.fixture(scope="module")
def patched_checkout(tmp_path_factory):
    checkout = tmp_path_factory.mktemp("patched")
    shutil.copytree(stock_verl(), checkout / "verl")
    (checkout / "tests").mkdir()
    result = apply_patches(checkout)
    assert result.returncode == 0, result.stderr
    return checkout


@pytest.fixture(scope="module")
def stock_results(patched_checkout, tmp_path_factory):
    """Stock verl with the diff's test file; after that, the same process and the same modules with the fix applied."""
    checkout = tmp_path_factory.mktemp("stock")
    shutil.copytree(stock_verl(), checkout / "verl")
    shutil.copytree(patched_checkout / "tests", checkout / "tests")
    return run_upstream_test(checkout, "--then-fix")


def test_stock_verl_fails_for_equal_lengths_only(stock_results):
    failed = {name for name, (outcome, _) in stock_results["as_is"].items() if outcome == "failed"}
    passed = stock_results["as_is"].keys() - failed
    assert failed == {name for name in stock_results["as_is"] if "[" in name and "[3-5-4-" not in name}
    assert passed, "nothing passed, so the failures may have another cause"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        # A batch of one row is a batch of equally long rows.
        ("test_index_select[7-as_built]", "RuntimeError: split_with_sizes expects split_sizes to sum exactly to 7"),
        # Equal lengths: the crash, worded by torch's symbolic split_with_sizes.
        ("test_index_select[5-5-5-as_built]", "RuntimeError"),
        # seq_len == 4 * batch_size, and a single row in chunks: wrong values and no error at all.
        ("test_index_select[8-8-as_built]", "AssertionError"),
        ("test_chunks[7-as_built]", "AssertionError"),
    ],
)
def test_how_stock_verl_fails(stock_results, name, error):
    assert error in stock_results["as_is"][name][1]


def test_patched_verl_passes(patched_checkout, stock_results):
    results = run_upstream_test(patched_checkout)["as_is"]
    assert results.keys() == stock_results["as_is"].keys()
    assert {name: text for name, (outcome, text) in results.items() if outcome != "passed"} == {}


def test_stock_verl_passes_after_the_run_time_fix(stock_results):
    """Applied late, when verl.utils.tensordict_utils has been imported and used: the hardest order."""
    assert stock_results["fixed"].keys() == stock_results["as_is"].keys()
    assert {name: text for name, (outcome, text) in stock_results["fixed"].items() if outcome != "passed"} == {}


# --- run-time fix and patch, side by side in this process -------------------------------------------------------------


def load_tensordict_utils(checkout, name):
    """`verl/utils/tensordict_utils.py` alone, under another name: it imports nothing of verl."""
    spec = importlib.util.spec_from_file_location(name, Path(checkout) / PATCHED_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def patched(patched_checkout):
    return load_tensordict_utils(patched_checkout, "patched_tensordict_utils")


@pytest.fixture(scope="module")
def fixed():
    module = load_tensordict_utils(stock_verl().parent, "fixed_tensordict_utils")
    assert verl_fixes.fix_nested_position_ids(module)
    return module


def make_batch(rows, consolidated):
    data = TensorDict({"position_ids": torch.nested.as_nested_tensor(rows, layout=torch.jagged)}, [len(rows)])
    return pickle.loads(pickle.dumps(data.consolidate())) if consolidated else data


def make_rows(lengths):
    return [torch.arange(NUM_AXES * n).view(NUM_AXES, n) + 1000 * i for i, n in enumerate(lengths)]


def mini_batches(utils, data, size):
    """What the engines get: the worker's fix, mini-batches, the engine's fix, and micro-batches of one row."""
    utils.maybe_fix_3d_position_ids(data)
    for mini_batch in utils.make_iterator(data, mini_batch_size=size, epochs=1):
        utils.maybe_fix_3d_position_ids(mini_batch)
        for micro_batch in [mini_batch, *utils.chunk_tensordict(mini_batch, size)]:
            yield micro_batch["position_ids"]


@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize("uniform", [False, True])
def test_fix_and_patch_agree_and_keep_the_values(patched, fixed, uniform, consolidated):
    chance = random.Random(f"{uniform} {consolidated}")
    for _ in range(20):
        size, count = chance.choice([1, 2, 4]), chance.choice([1, 2, 3])
        lengths = [chance.randint(2, 40) for _ in range(size * count)]
        if uniform:
            lengths = lengths[:1] * len(lengths)
        rows = make_rows(lengths)
        from_patched = list(mini_batches(patched, make_batch(rows, consolidated), size))
        from_fixed = list(mini_batches(fixed, make_batch(rows, consolidated), size))

        expected = []
        for start in range(0, len(rows), size):
            expected += [rows[start : start + size], *([row] for row in rows[start : start + size])]
        assert len(from_fixed) == len(from_patched) == len(expected)
        for ours, theirs, wanted in zip(from_fixed, from_patched, expected, strict=True):
            assert ours._ragged_idx == theirs._ragged_idx == 2
            assert torch.equal(ours.offsets(), theirs.offsets())
            assert torch.equal(ours.values(), theirs.values())
            assert torch.equal(ours.values(), torch.cat(wanted, dim=1)), lengths


@pytest.mark.parametrize("length", [1, 4, 7, 12, 64])
def test_uniform_batch_equals_the_same_rows_of_a_mixed_batch(fixed, length):
    """The same three rows, once alone (one length) and once beside a fourth row that makes the batch ragged."""
    rows = make_rows([length] * 3)
    alone = make_batch(rows, consolidated=False)
    mixed = make_batch([*rows, torch.zeros(NUM_AXES, length + 1, dtype=torch.long)], consolidated=False)
    for data in (alone, mixed):
        fixed.maybe_fix_3d_position_ids(data)
    from_mixed = fixed.index_select_tensor_dict(mixed, [0, 1, 2])["position_ids"]
    assert torch.equal(alone["position_ids"].values(), from_mixed.values())
    assert torch.equal(alone["position_ids"].offsets(), from_mixed.offsets())


def test_other_verl_versions_are_left_alone(small_checkout):
    (small_checkout / "verl" / "version" / "version").write_text("0.9.2\n")
    module = load_tensordict_utils(small_checkout, "other_tensordict_utils")
    original = module.maybe_fix_3d_position_ids
    assert not verl_fixes.fix_nested_position_ids(module)
    assert module.maybe_fix_3d_position_ids is original


def test_names_bound_before_the_fix_are_replaced_too(monkeypatch):
    """verl's engine_workers does `from ... import maybe_fix_3d_position_ids`, perhaps before this plugin is loaded."""
    module = load_tensordict_utils(stock_verl().parent, "late_tensordict_utils")
    importer = types.ModuleType("verl.imported_early")
    importer.maybe_fix_3d_position_ids = module.maybe_fix_3d_position_ids
    stranger = types.ModuleType("verlike")
    stranger.maybe_fix_3d_position_ids = module.maybe_fix_3d_position_ids
    for bystander in (importer, stranger):
        monkeypatch.setitem(sys.modules, bystander.__name__, bystander)

    verl_fixes.fix_nested_position_ids(module)
    assert importer.maybe_fix_3d_position_ids is module.maybe_fix_3d_position_ids
    assert stranger.maybe_fix_3d_position_ids is not module.maybe_fix_3d_position_ids
