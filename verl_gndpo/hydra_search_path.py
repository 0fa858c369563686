# SPDX-License-Identifier: Apache-2.0
"""Lets Hydra find the config groups of this package: `+teacher=worker`, `+gndpo=default`."""


def register(plugins) -> None:
    """Add a search-path plugin to Hydra, given as its module `hydra.core.plugins`."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class GNDPOSearchPath(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append(provider="verl-gndpo", path="pkg://verl_gndpo.hydra_groups")

    plugins.Plugins.instance().register(GNDPOSearchPath)
