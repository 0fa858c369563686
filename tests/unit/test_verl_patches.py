# SPDX-License-Identifier: Apache-2.0
"""patches/ and its run-time counterpart: stock verl 0.9.1 fails, patched verl and fixed verl agree with each other."""

import importlib.metadata
import importlib.util
import json
import os
import pickle
import pkgutil
import random
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from verl_gndpo.verl_patches import PATCHES as INDEX
from verl_gndpo.verl_patches import internvl, position_ids, qwen2_vl

REPO = Path(__file__).parents[2]
PATCHES_FOLDER = REPO / "patches" / "verl-0.9.1"
NUM_AXES = 4


class Patch(NamedTuple):
    """A diff's file name, the one file of verl that it changes, and the test that it adds."""

    name: str
    file: str
    test: str


POSITION_IDS = Patch(
    name="0001-repack-3d-position-ids.patch",
    file="verl/utils/tensordict_utils.py",
    test="tests/utils/test_3d_position_ids_on_cpu.py",
)
TEXT_ONLY = Patch(
    name="0002-unpack-text-only-vision-output.patch",
    file="verl/models/transformers/qwen2_vl.py",
    test="tests/models/test_qwen2_vl_text_only_on_cpu.py",
)
INTERNVL_PROCESSOR = Patch(
    name="0003-accept-internvl-processor.patch",
    file="verl/utils/tokenizer/tokenizer.py",
    test="tests/utils/test_internvl_processor_on_cpu.py",
)
INTERNVL_PIXELS = Patch(
    name="0004-internvl-pixel-values.patch",
    file="verl/experimental/agent_loop/agent_loop.py",
    test="tests/experimental/agent_loop/test_internvl_multi_modal_inputs_on_cpu.py",
)
INTERNVL_PLACEHOLDERS = Patch(
    name="0005-internvl-image-placeholders.patch",
    file="verl/workers/rollout/utils.py",
    test="tests/workers/rollout/test_internvl_image_tokens_on_cpu.py",
)
INTERNVL_TEXT_ONLY = Patch(
    name="0006-internvl-text-only-batches.patch",
    file="verl/models/transformers/monkey_patch.py",
    test="tests/models/test_internvl_text_only_on_cpu.py",
)
UNEVEN_SHARDS = Patch(
    name="0007-wait-for-uneven-fsdp2-shards.patch",
    file="verl/utils/fsdp_utils.py",
    test="tests/utils/test_fsdp2_offload_on_cpu.py",
)
GLM4V = Patch(
    name="0008-unpack-glm4v-vision-output.patch",
    file="verl/models/transformers/glm4v.py",
    test="tests/models/test_glm4v_vision_output_on_cpu.py",
)
WRAP_TARGETS = Patch(
    name="0009-shard-no-embedding-of-a-vision-tower.patch",
    file="verl/utils/fsdp_utils.py",
    test="tests/utils/test_fsdp2_wrap_targets_of_towers_on_cpu.py",
)
QWEN3_5_CACHE = Patch(
    name="0010-qwen3_5-linear-attention-cache.patch",
    file="verl/models/transformers/qwen3_5.py",
    test="tests/models/test_qwen3_5_cache_on_cpu.py",
)
SAVED_WEIGHTS = Patch(
    name="0011-copy-saved-fsdp2-weights.patch",
    file="verl/utils/fsdp_utils.py",
    test="tests/utils/test_fsdp2_saved_weights_on_cpu.py",
)
PATCHES = [
    POSITION_IDS,
    TEXT_ONLY,
    INTERNVL_PROCESSOR,
    INTERNVL_PIXELS,
    INTERNVL_PLACEHOLDERS,
    INTERNVL_TEXT_ONLY,
    UNEVEN_SHARDS,
    GLM4V,
    WRAP_TARGETS,
    QWEN3_5_CACHE,
    SAVED_WEIGHTS,
]

each_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name[:4])
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
    for name in ("verl/version/version", *(patch.file for patch in PATCHES)):
        target = tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(stock_verl().parent / name, target)
    (tmp_path / "checkout" / "tests").mkdir()
    return tmp_path / "checkout"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the script -------------------------------------------------------------------------------------------------------


def test_every_diff_is_tested_and_has_a_run_time_patch():
    assert sorted(path.name for path in PATCHES_FOLDER.iterdir()) == [patch.name for patch in PATCHES]
    entries = {entry.diff: entry.module for entry in INDEX if entry.diff}
    assert entries == {patch.name: patch.file.removesuffix(".py").replace("/", ".") for patch in PATCHES}


def test_apply_then_say_so_when_repeated(small_checkout):
    stock = contents(small_checkout)

    check = apply_patches(small_checkout, "--check")
    assert check.returncode == 0, check.stderr
    assert check.stdout == "".join(f"would apply: {patch.name}\n" for patch in PATCHES)
    assert contents(small_checkout) == stock

    first = apply_patches(small_checkout)
    assert first.returncode == 0, first.stderr
    assert first.stdout == "".join(f"applied: {patch.name}\n" for patch in PATCHES)
    patched = contents(small_checkout)
    assert patched.keys() - stock.keys() == {Path(patch.test) for patch in PATCHES}
    assert {path for path in stock if patched[path] != stock[path]} == {Path(patch.file) for patch in PATCHES}

    for options in ((), ("--check",)):
        again = apply_patches(small_checkout, *options)
        assert again.returncode == 0, again.stderr
        assert again.stdout == "".join(f"already applied: {patch.name}\n" for patch in PATCHES)
        assert contents(small_checkout) == patched


@each_patch
def test_only_what_is_missing_is_applied(small_checkout, patch):
    assert apply_patches(small_checkout).returncode == 0
    patched = contents(small_checkout)
    # Not the whole file, which another diff may change as well.
    undo = ["git", "apply", "--reverse", str(PATCHES_FOLDER / patch.name)]
    subprocess.run(undo, cwd=small_checkout, check=True)
    assert contents(small_checkout) != patched

    result = apply_patches(small_checkout)
    assert result.returncode == 0, result.stderr
    others = [f"already applied: {other.name}" for other in PATCHES if other != patch]
    assert result.stdout.splitlines() == [*others, f"applied: {patch.name}"]
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
    patched = contents(small_checkout)
    assert all(patched[Path(patch.file)] != stock[Path(patch.file)] for patch in PATCHES)


def test_hard_linked_original_is_not_written_through(small_checkout, tmp_path):
    """uv links an environment's files to its cache: writing through the link would patch every other environment."""
    link = tmp_path / "cache.py"
    os.link(small_checkout / POSITION_IDS.file, link)
    before = link.read_bytes()
    assert apply_patches(small_checkout).returncode == 0
    assert link.read_bytes() == before != (small_checkout / POSITION_IDS.file).read_bytes()


@pytest.mark.parametrize("options", [(), ("--check",)])
def test_other_version_is_refused_by_name(small_checkout, options):
    (small_checkout / "verl" / "version" / "version").write_text("0.9.2\n")
    before = contents(small_checkout)
    result = apply_patches(small_checkout, *options)
    assert result.returncode == 2
    assert "no patches for verl 0.9.2" in result.stderr and "verl-0.9.1" in result.stderr
    assert contents(small_checkout) == before


@each_patch
def test_patch_that_does_not_fit_changes_nothing(small_checkout, patch):
    """Half of the patch (its new test file) and the other patches could be applied here; none of them is."""
    (small_checkout / patch.file).write_text("something else\n")
    before = contents(small_checkout)
    result = apply_patches(small_checkout)
    assert result.returncode == 1
    first = next(other for other in PATCHES if other.file == patch.file)
    assert first.name in result.stderr and patch.file in result.stderr
    assert contents(small_checkout) == before


@pytest.mark.parametrize("arguments", [["no/such/folder"], [], [".", "--force"], [".", "."]])
def test_wrong_use(arguments, tmp_path):
    command = ["bash", str(REPO / "patches" / "apply.sh"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("apply.sh: ")


# --- the diffs' own tests, in stock, patched and fixed verl -----------------------------------------------------------

RUN_UPSTREAM_TESTS = """
import json, sys
import pytest

class Outcomes(dict):
    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            file, name = report.nodeid.split("::")
            self.setdefault(file, {})[name] = [report.outcome, report.longreprtext]

def outcomes():
    found = Outcomes()
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "--noconftest", "--rootdir=."]
    pytest.main([*options, "tests"], plugins=[found])
    return found

results = {"as_is": outcomes()}
if "--then-fix" in sys.argv:
    from verl_gndpo.verl_patches import PATCHES, apply
    for _ in range(2):  # it is safe to repeat
        apply(*(patch.name for patch in PATCHES if patch.diff))
    results["fixed"] = outcomes()
import verl
results["verl"] = verl.__path__[0]
json.dump(results, open("results.json", "w"))
"""


def run_upstream_tests(checkout, *options):
    """Run the diffs' tests in one process, on the verl in `checkout`: {file: {name: (outcome, failure text)}}."""
    # Without the plugin nothing but that sitecustomize makes torchvision, which the Qwen-VL models import, importable
    # beside a CPU torch.
    python_path = [checkout, REPO, REPO / "verl_gndpo" / "platforms" / "startup"]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, python_path)),
        "VERL_USE_EXTERNAL_PLUGINS": "none",
        "PYTEST_ADDOPTS": "",
    }
    command = [sys.executable, "-c", RUN_UPSTREAM_TESTS, *options]
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
    """Stock verl with the diffs' tests; after that, the same process and the same modules with the fixes applied."""
    checkout = tmp_path_factory.mktemp("stock")
    shutil.copytree(stock_verl(), checkout / "verl")
    shutil.copytree(patched_checkout / "tests", checkout / "tests")
    return run_upstream_tests(checkout, "--then-fix")


@pytest.fixture(scope="module")
def patched_results(patched_checkout):
    return run_upstream_tests(patched_checkout)["as_is"]


def is_about_equal_lengths(name):
    return "[" in name and "[3-5-4-" not in name


def is_about_text_only(name):
    return name.startswith("test_text_only")


@pytest.mark.parametrize(
    ("patch", "meets_the_bug"),
    [
        (POSITION_IDS, is_about_equal_lengths),
        (TEXT_ONLY, is_about_text_only),
        (INTERNVL_PROCESSOR, lambda name: name.startswith("test_internvl")),
        (INTERNVL_PIXELS, lambda name: name.startswith("test_images")),
        (INTERNVL_PLACEHOLDERS, lambda name: name.startswith("test_images")),
        (INTERNVL_TEXT_ONLY, lambda name: name != "test_image"),
        (UNEVEN_SHARDS, lambda name: name == "test_uneven_shards"),
        (GLM4V, lambda name: name.startswith("test_features")),
        (WRAP_TARGETS, lambda name: name.startswith("test_the_position_embedding")),
        (QWEN3_5_CACHE, lambda name: name.startswith("test_parts")),
        (SAVED_WEIGHTS, lambda name: name != "test_the_layout_is_that_of_the_model"),
    ],
)
def test_stock_verl_fails_where_the_bug_is_only(stock_results, patch, meets_the_bug):
    outcomes = stock_results["as_is"][patch.test]
    failed = {name for name, (outcome, _) in outcomes.items() if outcome == "failed"}
    assert failed == {name for name in outcomes if meets_the_bug(name)} != set()
    assert outcomes.keys() - failed, "nothing passed, so the failures may have another cause"


@pytest.mark.parametrize(
    ("patch", "name", "error"),
    [
        # A batch of one row is a batch of equally long rows.
        (
            POSITION_IDS,
            "test_index_select[7-as_built]",
            "RuntimeError: split_with_sizes expects split_sizes to sum exactly to 7",
        ),
        # Equal lengths: the crash, worded by torch's symbolic split_with_sizes.
        (POSITION_IDS, "test_index_select[5-5-5-as_built]", "RuntimeError"),
        # seq_len == 4 * batch_size, and a single row in chunks: wrong values and no error at all.
        (POSITION_IDS, "test_index_select[8-8-as_built]", "AssertionError"),
        (POSITION_IDS, "test_chunks[7-as_built]", "AssertionError"),
        (TEXT_ONLY, "test_text_only[qwen2_vl]", "'BaseModelOutputWithPooling' object has no attribute 'mean'"),
        (TEXT_ONLY, "test_text_only[qwen2_5_vl]", "'BaseModelOutputWithPooling' object has no attribute 'mean'"),
        # A warning, None, and with it a run without a single image.
        (INTERNVL_PROCESSOR, "test_internvl", "isinstance(None, InternVLProcessor)"),
        (INTERNVL_PIXELS, "test_images[1]", "ValueError: Number of image placeholders in the prompt does not match"),
        (INTERNVL_PLACEHOLDERS, "test_images[a<IMG_CONTEXT>b-images0]", "At index 1 diff: 258 != 260"),
        (INTERNVL_TEXT_ONLY, "test_tower_runs_once", "assert 0 == 1"),
        (INTERNVL_TEXT_ONLY, "test_refused[fused]", "DID NOT RAISE"),
        (
            GLM4V,
            "test_features_of_a_text_only_batch_count_for_nothing",
            "'BaseModelOutputWithPooling' object has no attribute 'mean'",
        ),
        (WRAP_TARGETS, "test_the_position_embedding_of_a_tower_is_left_to_the_module_around_it", "position_embedding"),
        (QWEN3_5_CACHE, "test_parts_continue_from_a_cache[[5, 7]]", "'DynamicCache' object has no attribute"),
        (SAVED_WEIGHTS, "test_an_update_leaves_saved_weights_alone", "Tensor-likes are not equal"),
    ],
)
def test_how_stock_verl_fails(stock_results, patch, name, error):
    assert error in stock_results["as_is"][patch.test][name][1]


@each_patch
def test_patched_verl_passes(patched_results, stock_results, patch):
    outcomes = patched_results[patch.test]
    assert outcomes.keys() == stock_results["as_is"][patch.test].keys()
    assert {name: text for name, (outcome, text) in outcomes.items() if outcome != "passed"} == {}


@each_patch
def test_stock_verl_passes_after_the_run_time_fix(stock_results, patch):
    """Applied late, when the module to fix has been imported and used: the hardest order."""
    outcomes = stock_results["fixed"][patch.test]
    assert outcomes.keys() == stock_results["as_is"][patch.test].keys()
    assert {name: text for name, (outcome, text) in outcomes.items() if outcome != "passed"} == {}


# --- the run-time fixes in this process, beside the patched file where that can be loaded alone -----------------------


def load_tensordict_utils(checkout, name):
    """`verl/utils/tensordict_utils.py` alone, under another name: it imports nothing of verl."""
    spec = importlib.util.spec_from_file_location(name, Path(checkout) / POSITION_IDS.file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def patched(patched_checkout):
    return load_tensordict_utils(patched_checkout, "patched_tensordict_utils")


@pytest.fixture(scope="module")
def fixed():
    module = load_tensordict_utils(stock_verl().parent, "fixed_tensordict_utils")
    assert position_ids.repack_position_ids(module)
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


@each_patch
def test_other_verl_versions_are_left_alone(small_checkout, patch):
    (small_checkout / "verl" / "version" / "version").write_text("0.9.2\n")
    name = patch.file.removesuffix(".py").replace("/", ".")
    module = types.ModuleType(name)
    module.__file__ = str(small_checkout / patch.file)
    before = dict(vars(module))
    entry = next(entry for entry in INDEX if entry.diff == patch.name)
    assert not pkgutil.resolve_name(entry.applied_by)(module)
    assert vars(module) == before


def test_batches_with_images_or_videos_go_through_unchanged():
    """They need the whole model (for one, `visual.dtype`), not the stand-in that text-only batches get."""
    module = types.ModuleType("fixed_qwen2_vl")
    module.__file__ = str(stock_verl().parent / TEXT_ONLY.file)
    # Its source calls the tower without unpacking, as that of stock verl.
    module._get_input_embeds = lambda *args, **kwargs: (args, kwargs, lambda model: model.visual(None, grid_thw=None))[
        :2
    ]
    assert qwen2_vl.unpack_text_only_output(module)

    model = types.SimpleNamespace(config=None, get_input_embeddings=None, visual=None)
    with_image = (model, "ids", "mask", "pixels", None, "grid", None)
    with_video = (model, "ids", "mask", None, "pixels", None, "grid")
    for batch in (with_image, with_video):
        assert module._get_input_embeds(*batch) == (batch, {})
    (stand_in, *_), _ = module._get_input_embeds(model, "ids", "mask", None, None, None, None)
    assert stand_in is not model


START, CONTEXT, END = 90, 91, 92
SEGMENTS = st.one_of(
    st.lists(st.sampled_from([1, 2, START, END]), max_size=4),
    st.integers(1, 5).map(lambda tiles: [START, *[CONTEXT] * tiles, END]),
)


@pytest.fixture(scope="module")
def collapse(patched_checkout):
    """`qwen2_5_vl_dedup_image_tokens` of the patched file and of a stock one that is fixed."""
    functions = []
    for name, checkout in (("patched_rollout_utils", patched_checkout), ("fixed_rollout_utils", stock_verl().parent)):
        spec = importlib.util.spec_from_file_location(name, checkout / INTERNVL_PLACEHOLDERS.file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if name.startswith("fixed"):
            assert internvl.collapse_placeholders(module)
        functions.append(module.qwen2_5_vl_dedup_image_tokens)
    return functions


@given(segments=st.lists(SEGMENTS, max_size=6))
def test_every_image_of_internvl_becomes_one_placeholder_and_nothing_else_changes(collapse, segments):
    """Also beside frames without an image, which a policy may have sampled."""
    ids = {"image_token_id": CONTEXT, "start_image_token_id": START, "end_image_token_id": END}
    processor = type("InternVLProcessor", (), ids)()
    prompt = [token for segment in segments for token in segment]
    expected = [token for s in segments for token in ([CONTEXT] if CONTEXT in s else s)]
    for function in collapse:
        assert function(prompt, processor) == expected


def test_names_bound_before_the_fix_are_replaced_too(monkeypatch):
    """verl's engine_workers does `from ... import maybe_fix_3d_position_ids`, perhaps before this plugin is loaded."""
    module = load_tensordict_utils(stock_verl().parent, "late_tensordict_utils")
    importer = types.ModuleType("verl.imported_early")
    importer.maybe_fix_3d_position_ids = module.maybe_fix_3d_position_ids
    stranger = types.ModuleType("verlike")
    stranger.maybe_fix_3d_position_ids = module.maybe_fix_3d_position_ids
    for bystander in (importer, stranger):
        monkeypatch.setitem(sys.modules, bystander.__name__, bystander)

    position_ids.repack_position_ids(module)
    assert importer.maybe_fix_3d_position_ids is module.maybe_fix_3d_position_ids
    assert stranger.maybe_fix_3d_position_ids is not module.maybe_fix_3d_position_ids
