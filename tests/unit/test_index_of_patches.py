# SPDX-License-Identifier: Apache-2.0
"""The index of verl_patches: it is complete, its entries are true of the installed verl, and their states are told."""

import ast
import dataclasses
import importlib.metadata
import importlib.util
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import verl_gndpo
from verl_gndpo.verl_patches import PATCHES, describe
from verl_gndpo.verl_patches import patch as machinery
from verl_gndpo.verl_patches.patch import Patch, apply, apply_all, index, patches

PACKAGE = Path(verl_gndpo.__file__).parent
SOURCES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}

# Functions that are set outside of a patch, on modules of the teacher's model, which this package has built itself.
OWN_OBJECTS = {
    ("teacher/scoring.py", "lm_head.forward"),
    ("teacher/distinct_images.py", "tower.forward"),
    ("student/projection.py", "lm_head.forward"),
}
# Set and restored within one call of a patch, which benchmarks/gpu_check.py also makes without verl.
OWN_OBJECTS |= {("verl_patches/offload.py", "FSDPParam.reset_sharded_param")}
# The packages that a training run is made of.
WATCHED = {
    "verl",
    "vllm",
    "torch",
    "torchvision",
    "transformers",
    "tensordict",
    "transfer_queue",
    "ray",
    "importlib",
    "sys",
}
# The function that all patches use to set an attribute.
TOOL = ("verl_patches/patch.py", "replace")


def patch_name(function: ast.AST) -> str | None:
    """The entry that a function applies, by its decorator."""
    for decorator in getattr(function, "decorator_list", []):
        if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", None) == "patches":
            return ast.literal_eval(decorator.args[0])
    return None


def root(node: ast.AST) -> str | None:
    """The name that an expression like `a.b[c].d` begins with."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def outside_of_patches(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, without the functions that are patches."""
    for child in ast.iter_child_nodes(node):
        if patch_name(child) is None:
            yield child
            yield from outside_of_patches(child)


def set_attributes(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST | None]]:
    """Every attribute or item that is set or deleted outside of patches, with the value that it gets."""
    for node in outside_of_patches(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
            targets = getattr(node, "targets", None) or [node.target]
            for target in targets:
                parts = target.elts if isinstance(target, ast.Tuple) else [target]
                for part in parts:
                    if isinstance(part, ast.Attribute | ast.Subscript):
                        yield part, getattr(node, "value", None)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("setattr", "delattr"):
            yield ast.Attribute(node.args[0], "?"), node.args[2] if len(node.args) > 2 else None


def foreign_names(tree: ast.AST) -> set[str]:
    """The names that a file imports from packages that are watched."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            watched = [alias for alias in node.names if alias.name.split(".")[0] in WATCHED]
            found |= {alias.asname or alias.name.split(".")[0] for alias in watched}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in WATCHED:
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def unlisted_changes(tree: ast.AST, file: str) -> list[str]:
    """What a file sets on modules and classes of other packages, and which functions it sets on any object but its own
    (`self`, `cls`), outside of patches."""
    foreign = foreign_names(tree)
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    found = []
    for target, value in set_attributes(tree):
        name, text = root(target), ast.unparse(target)
        is_function = isinstance(value, ast.Lambda) or getattr(value, "attr", getattr(value, "id", None)) in functions
        on_own = name in ("self", "cls", None) or (file, text) in OWN_OBJECTS
        if not on_own and (name in foreign or (is_function and isinstance(target, ast.Attribute))):
            found.append(f"{file}:{target.value.lineno}: {text}")
    return found


def test_nothing_changes_other_packages_outside_of_the_index():
    found = []
    for path, tree in SOURCES.items():
        file = str(path.relative_to(PACKAGE))
        if file == TOOL[0]:
            tree.body = [node for node in tree.body if getattr(node, "name", None) != TOOL[1]]
        found += unlisted_changes(tree, file)
    assert found == []


@pytest.mark.parametrize(
    ("code", "caught"),
    [
        ("import verl.utils.x as x\nx.f = 1", True),
        ("from torch.distributed import fsdp\ndef g():\n    fsdp.a.b = lambda: None", True),
        ("import importlib.metadata\nimportlib.metadata.version = str", True),
        ("import torch\nsetattr(torch.cpu, 'x', 1)", True),
        ("from verl import Engine\nEngine.registry['a'] = 1", True),
        ("import torch\ndel torch.x", True),
        ("import sys\nsys.modules['verl'].x = 1", True),
        ("def g(buffer):\n    def wait(): pass\n    buffer.wait = wait", True),
        ("def g(buffer):\n    buffer.wait = lambda: None", True),
        ("import torch\n@patches('a')\ndef g(x):\n    torch.a = 1\n    def h(): pass\n    x.h = h", False),
        ("from dataclasses import dataclass\nclass A:\n    def __init__(self):\n        self.a = lambda: 1", False),
        ("from verl_gndpo.config import C\ndef f(c):\n    c.limit = 1", False),
        ("import os\nos.environ['a'] = 'b'", False),
    ],
)
def test_the_search_for_changes_finds_them(code, caught):
    assert bool(unlisted_changes(ast.parse(code), "x.py")) == caught


def test_every_entry_names_its_function_and_every_such_function_has_an_entry():
    applied = {}
    for path, tree in SOURCES.items():
        module = ".".join(["verl_gndpo", *path.relative_to(PACKAGE).with_suffix("").parts])
        for node in ast.walk(tree):
            name = patch_name(node)
            if name is not None:
                assert name not in applied, f"two functions apply {name}"
                applied[name] = f"{module}:{node.name}"
    assert applied == {entry.name: entry.applied_by for entry in PATCHES}


@pytest.mark.parametrize("entry", [e for e in PATCHES if e.on_import], ids=lambda entry: entry.name)
@pytest.mark.skipif(importlib.metadata.version("verl") != "0.9.1", reason="the entries are about verl 0.9.1")
def test_what_an_entry_changes_exists(entry):
    """An entry that has outlived its cause would name something that is gone."""
    if entry.module == "torch.cpu":
        # It adds what is missing.
        return
    try:
        spec = importlib.util.find_spec(entry.module)
    except ModuleNotFoundError:
        assert entry.module.startswith("vllm."), "only vLLM may be missing here"
        pytest.skip("no vLLM here")
    for change in entry.changes.split(" and "):
        name = change.split(".")[-1]
        assert name in Path(spec.origin).read_text() or entry.module == "verl.trainer.ppo.v1"


@pytest.mark.parametrize("entry", PATCHES, ids=lambda entry: entry.name)
def test_an_entry_says_everything(entry):
    assert entry.breaks.endswith(".") and entry.breaks.count(". ") == 0, "one sentence"
    assert entry.since and entry.remove_when and not entry.remove_when.endswith(".")
    assert entry.upstream.startswith("none known") or "https://github.com/" in entry.upstream
    assert (entry.where in ("every process", "without accelerator")) or not entry.diff


def row(name: str) -> dict[str, str]:
    return next(row for row in describe() if row["name"] == name)


def test_the_states_of_this_process():
    import verl.utils.tensordict_utils  # noqa: F401

    assert row("position_ids")["state"] == "applied"
    # This process belongs to no actor that wants it.
    assert row("freeze_vision_tower")["state"] in ("not needed", "waits for verl.workers.engine.fsdp.transformer_impl")
    assert row("position_ids")["diff"] == "0001-repack-3d-position-ids.patch" and row("trainers")["diff"] == "none"
    assert [row["name"] for row in describe()] == [entry.name for entry in PATCHES]


@pytest.fixture
def scratch_index(monkeypatch):
    """An index of one's own; the process's comes back at the end."""
    for name in ("_INDEX", "_STATES"):
        monkeypatch.setattr(machinery, name, {})
    monkeypatch.setattr(machinery, "_HOOKED", set())


def entry(name: str, module: str) -> Patch:
    return Patch(name, module, "x", "a:b", "It breaks.", "1", "none known", "2", "every process")


def fake_module(tmp_path: Path, version: str) -> types.ModuleType:
    (tmp_path / "verl" / "version").mkdir(parents=True)
    (tmp_path / "verl" / "version" / "version").write_text(f"{version}\n")
    module = types.ModuleType("verl.some.module")
    module.__file__ = str(tmp_path / "verl" / "some" / "module.py")
    return module


def test_a_patch_waits_for_its_module_and_is_applied_once(scratch_index, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "changed_package.py").write_text("count = 0\n")
    (tmp_path / "changing_package.py").write_text(
        "from verl_gndpo.verl_patches import patches\n"
        "@patches('a')\n"
        "def change(module):\n"
        "    module.count += 1\n"
        "    return True\n"
    )
    index(dataclasses.replace(entry("a", "changed_package"), applied_by="changing_package:change"))
    apply_all("without accelerator")
    assert row("a")["state"] == "not needed", "it belongs to every process"
    for _ in range(2):
        apply_all("every process")
        assert row("a")["state"] == "waits for changed_package" and "changing_package" not in sys.modules
    import changed_package

    assert row("a")["state"] == "applied" and changed_package.count == 1
    apply("a")
    assert changed_package.count == 1


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("0.8.0", "version differs"),
        ("0.9.0", "applied"),
        ("0.9.1", "applied"),
        ("0.9.2", "applied"),
        ("0.10.0.dev", "applied"),
    ],
)
def test_the_decorator_checks_the_version_of_the_verl_that_it_is_given(scratch_index, tmp_path, version, state):
    index(entry("a", "verl.some.module"))
    seen = []

    @patches("a")
    def change(module: types.ModuleType) -> bool:
        seen.append(module)
        return True

    assert row("a")["state"] == "not needed"
    module = fake_module(tmp_path, version)
    assert change(module) == (state == "applied") == bool(seen)
    assert row("a")["state"] == state


@pytest.mark.parametrize("version", ["0.9.1", "0.9.2"])
def test_a_target_that_has_changed_is_left_alone_in_an_untested_verl(scratch_index, tmp_path, version):
    index(entry("a", "verl.some.module"))
    change = patches("a")(lambda module: module.gone)
    module = fake_module(tmp_path, version)
    if version == "0.9.1":
        with pytest.raises(AttributeError):
            change(module)
    else:
        with pytest.warns(UserWarning, match=r"verl\.some\.module of verl 0\.9\.2 .*'gone'.*is left out. Without it"):
            assert not change(module)
        assert row("a")["state"] == "target has changed"


def test_other_packages_are_changed_whatever_verls_version_is(scratch_index, tmp_path):
    index(entry("a", "torch.some"))
    assert patches("a")(lambda module: True)(fake_module(tmp_path, "0.9.2"))
    assert row("a")["state"] == "applied"


def test_a_patch_that_changes_nothing_says_so(scratch_index):
    index(entry("a", "torch.some"))
    assert not patches("a")(lambda: False)()
    assert row("a")["state"] == "not needed"


def test_names_are_used_once(scratch_index):
    with pytest.raises(ValueError, match="two patches are called a"):
        index(entry("a", "torch"), entry("a", "verl"))


def test_the_readmes_example_of_a_patch_works(scratch_index, tmp_path):
    readme = (PACKAGE.parent / "patches" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    index(entry("empty_batch", "verl.utils.seqlen_balancing"))
    namespace = {}
    exec(textwrap.dedent(code), namespace)
    module = fake_module(tmp_path, "0.9.1")
    module.get_reverse_idx = lambda idx_map: [idx_map[0]]
    assert namespace["accept_empty_batch"](module) and row("empty_batch")["state"] == "applied"
    assert module.get_reverse_idx([]) == [] and module.get_reverse_idx([3]) == [3]
