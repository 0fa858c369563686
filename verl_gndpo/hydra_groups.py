# SPDX-License-Identifier: Apache-2.0
"""Offer this project's config groups to Hydra: `+recipe=gndpo`, `+gndpo=default`, `+teacher=worker`."""

from types import ModuleType


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

    packages = {"gndpo": "algorithm.gndpo", "teacher": "teacher", "recipe": "_global_"}
    for (group, name), node in default_groups().items():
        ConfigStore.instance().store(group=group, name=name, node=node, package=packages[group], provider="verl-gndpo")
