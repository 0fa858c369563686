# SPDX-License-Identifier: Apache-2.0
"""The modules import each other without cycles, and none hides a module of the standard library."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PACKAGES = ("verl_gndpo", "data_prep", "benchmarks")
# As scripts, the converters import their core as `_core`, and the benchmarks their common part as `_common`. In a
# wheel, the converters are `verl_gndpo.data_prep`.
ALIASES = {"_core": "data_prep._core", "_common": "benchmarks._common", "verl_gndpo.data_prep": "data_prep"}


def modules_of(root: Path, packages: tuple[str, ...] = PACKAGES) -> dict[str, Path]:
    """Return the file of each module by its dotted name; a package's name stands for its `__init__`."""
    found = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(module: str, path: Path) -> Iterator[str]:
    """Yield every absolute dotted name that a module imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
            base = parts[: len(parts) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def import_graph(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Return the modules that each module imports. A name that is not a module stands for the module that has it."""
    graph = {}
    for module, path in modules.items():
        graph[module] = set()
        for name in imported_names(module, path):
            for alias, target in ALIASES.items():
                if name == alias or name.startswith(alias + "."):
                    name = target + name[len(alias) :]
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name and name != module:
                graph[module].add(name)
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components with more than one module, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_no_module_takes_part_in_an_import_cycle():
    graph = import_graph(modules_of(REPO))
    assert sum(map(len, graph.values())) > 100
    assert cycles(graph) == []


@pytest.mark.parametrize(
    "late_import",
    [
        "from pack import first",
        "import pack.first",
        "from pack.first import thing",
        "from . import first",
        "from .first import thing",
        "def f():\n    from pack import first",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pack.first",
    ],
)
def test_a_cycle_is_found_however_it_is_written(tmp_path, late_import):
    (tmp_path / "pack").mkdir()
    for name, text in {
        "__init__": "",
        "first": "from pack.second import thing",
        "second": "import json\nfrom pack import third",
        "third": late_import,
        "aside": "import pack.first",
    }.items():
        (tmp_path / "pack" / f"{name}.py").write_text(text)
    assert cycles(import_graph(modules_of(tmp_path, ("pack",)))) == [["pack.first", "pack.second", "pack.third"]]


def test_no_module_has_the_name_of_one_of_the_standard_library():
    """A script's own folder comes first on the path, so that such a name breaks any script beside it."""
    names = {part for module in modules_of(REPO) for part in module.split(".")}
    assert names & sys.stdlib_module_names == set()
