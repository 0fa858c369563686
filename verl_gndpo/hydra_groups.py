# SPDX-License-Identifier: Apache-2.0
"""Offer this project's config groups to Hydra: `+recipe=gndpo`, `+gndpo=default`, `+teacher=worker`."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

from verl_gndpo.verl_patches.patch import patches

RECIPE_OVERRIDE = "+recipe=gndpo"


def register(plugins: ModuleType) -> None:
    """Add a search-path plugin to Hydra, given as its module `hydra.core.plugins`.

    Hydra asks such a plugin whenever it starts to compose, so that the groups hold the parameters of all bounds that
    are registered by then.
    """
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class GNDPOGroups(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            store_groups()

    plugins.Plugins.instance().register(GNDPOGroups)


def store_groups() -> None:
    """Write the groups into Hydra's config store, or again where a bound has been registered since."""
    from hydra.core.config_store import ConfigStore

    from verl_gndpo.config import default_groups

    packages = {"gndpo": "algorithm.gndpo", "teacher": "teacher", "student": "student", "recipe": "_global_"}
    for (group, name), node in default_groups().items():
        ConfigStore.instance().store(group=group, name=name, node=node, package=packages[group], provider="verl-gndpo")


@patches("recipe_override")
def write_out_recipe(overrides_parser: ModuleType) -> bool:
    """Make `+recipe=gndpo` on a command line stand for one override per setting.

    It then wins over what stands before it, and what stands after it wins over it. In the defaults list of a config
    file, `recipe: gndpo` remains a group.
    """
    parser = overrides_parser.OverridesParser
    parse = parser.parse_overrides

    def parse_overrides(self: Any, overrides: list[str]) -> Any:
        return parse(self, [line for override in overrides for line in _lines_of(override)])

    parser.parse_overrides = parse_overrides
    return True


def _lines_of(override: str) -> Iterator[str]:
    from verl_gndpo.presets import RECIPE

    if override != RECIPE_OVERRIDE:
        yield override
        return
    for key, value in RECIPE.items():
        yield f"++{key}={as_override(value)}"


def as_override(value: Any) -> str:
    """Return a value as it is written on a command line of Hydra."""
    return "null" if value is None else str(value)
