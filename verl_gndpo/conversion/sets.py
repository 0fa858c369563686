# SPDX-License-Identifier: Apache-2.0
"""The data sets that this package has converters for, from the converters' own declarations."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import verl_gndpo.data_prep

from .recipe import Recipe

COLUMNS = ("name", "set", "rows", "download", "licence", "use")
MANY_SPLITS = 3


def converters() -> dict[str, ModuleType]:
    """Return the module of each converter by name, in alphabetical order; each declares its set as `RECIPE`."""
    package = verl_gndpo.data_prep
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    modules = {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if isinstance(getattr(module, "RECIPE", None), Recipe)}


def validation_only() -> dict[str, str]:
    """Return for each set that no model may be trained on its hub id and the reason.

    A file states this itself (`data_facts.FileFacts.validation_only`), unless another program rewrote it since.
    """
    recipes = [module.RECIPE for module in converters().values()]
    return {recipe.hub_id: recipe.validation_only for recipe in recipes if recipe.validation_only}


def table() -> list[tuple[str, ...]]:
    """Return the table of data sets: one row per set, one text per column of `COLUMNS`."""
    return [
        (
            recipe.name,
            recipe.hub_id,
            _rows(recipe.rows),
            recipe.download,
            recipe.license,
            "validation only" if recipe.validation_only else "",
        )
        for recipe in (module.RECIPE for module in converters().values())
    ]


def markdown_table() -> str:
    """Return the table of data sets in Markdown, with links to the hub, as docs/data.md shows it."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, hub_id, *rest in table():
        cells = (f"`{name}`", f"[{hub_id}](https://huggingface.co/datasets/{hub_id})", *rest)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plain_table() -> str:
    """Return the table of data sets for a terminal, with aligned columns."""
    rows = [COLUMNS, *table()]
    widths = [max(len(row[place]) for row in rows) for place in range(len(COLUMNS))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _rows(rows: dict[str, int]) -> str:
    if len(rows) > MANY_SPLITS and len(set(rows.values())) == 1:
        first, *_, last = rows
        return f"{first} to {last}: {rows[first]:,} each"
    return ", ".join(f"{split} {number:,}" for split, number in rows.items())
