# SPDX-License-Identifier: Apache-2.0
"""Lets the teacher start as soon as there are GPUs for it."""

from collections.abc import Callable
from typing import Any

from verl_gndpo.verl_patches.patch import patches


@patches("resource_pools")
def call_when_created(pools: Any, created: Callable[[], None]) -> bool:
    """Make verl's `ResourcePoolManager` call `created` right after it has created its pools."""
    create_resource_pool = pools.create_resource_pool

    def create_and_call() -> None:
        create_resource_pool()
        created()

    pools.create_resource_pool = create_and_call
    return True
