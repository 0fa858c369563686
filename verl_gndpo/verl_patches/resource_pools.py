# SPDX-License-Identifier: Apache-2.0
"""Places all groups of GPUs before the first worker starts, and lets the teacher start beside the actor."""

import math
import threading
from collections.abc import Callable
from typing import Any

from verl_gndpo.verl_patches.patch import patches

SECONDS = 45.0
"""How long Ray may take to place the groups of one pool. It takes milliseconds where there is room."""

SETTINGS = {
    "global_pool": "trainer.n_gpus_per_node and trainer.nnodes",
    "teacher_pool": "teacher.n_gpus_per_node and teacher.nnodes (those of distillation with teacher.from_distillation)",
    "reward_pool": "reward.reward_model.n_gpus_per_node and reward.reward_model.nnodes",
    "rollout_pool": "actor_rollout_ref.rollout.n_gpus_per_node and actor_rollout_ref.rollout.nnodes",
}
"""The settings of each of the trainer's pools."""

ROLLOUT_CPUS = 2
"""CPUs that verl asks for with each GPU of a rollout replica of `separate_async`."""


class PlacementError(RuntimeError):
    """Ray has no room for a group of GPUs; the message says what was asked for and what is free."""


@patches("resource_pools")
def place_when_created(
    pools: Any, device_name: str, placed: Callable[[], None] = lambda: None, rollout: list[int] | None = None
) -> bool:
    """Make verl's `ResourcePoolManager` place its groups right after it has created its pools, and then call `placed`.

    verl places a pool when its first worker starts, in the order in which workers start, and waits for ever. A small
    group may then take the only node that is large enough for another one.

    Args:
        pools: verl's `ResourcePoolManager`.
        device_name: as in verl's `trainer.device`.
        placed: is called when all groups have their GPUs.
        rollout: sizes of groups that verl places by itself, later than all others (`rollout_groups`). Here they are
            placed together with the others, and their GPUs are given back.
    """
    create_resource_pool = pools.create_resource_pool

    def create_and_place() -> None:
        from ray.util import remove_placement_group
        from verl.single_controller.ray import RayResourcePool

        create_resource_pool()
        later = {"rollout_pool": RayResourcePool(rollout, max_colocate_count=ROLLOUT_CPUS)} if rollout else {}
        place(pools.resource_pool_dict | later, device_name)
        for pool in later.values():
            for group in pool.pgs:
                remove_placement_group(group)
        placed()

    pools.create_resource_pool = create_and_place
    return True


def rollout_groups(config: Any) -> list[int]:
    """Return the sizes of the groups of GPUs of verl's standalone rollout replicas, which only `separate_async` has.

    As in verl's `LLMServerManager` and `RolloutReplica`.
    """
    if config.trainer.v1.trainer_mode != "separate_async":
        return []
    rollout = config.actor_rollout_ref.rollout
    size = math.prod(rollout[f"{kind}_parallel_size"] for kind in ("tensor_model", "data", "pipeline_model"))
    replicas = rollout.n_gpus_per_node * rollout.nnodes // size
    on_a_node = min(rollout.n_gpus_per_node, size)
    return [on_a_node] * (size // on_a_node * replicas)


def place(pools: dict[str, Any], device_name: str) -> None:
    """Have Ray reserve the GPUs of all pools: those with the largest groups first, because these fit on fewest nodes.

    Args:
        pools: verl's `RayResourcePool`s by name.
        device_name: as in verl's `trainer.device`.

    Raises:
        PlacementError: a pool is not placed within `SECONDS`.
    """
    for name in sorted(pools, key=lambda name: -max(pools[name].store)):
        problems: list[BaseException] = []

        def reserve(pool: Any = pools[name], problems: list[BaseException] = problems) -> None:
            try:
                pool.get_placement_groups(device_name=device_name)
            # Whatever Ray raises is raised again in the caller's thread.
            except BaseException as error:
                problems.append(error)

        free = _free()
        # verl's function waits for ever. A thread that still waits ends with the process.
        thread = threading.Thread(target=reserve, daemon=True)
        thread.start()
        thread.join(SECONDS)
        if problems:
            raise problems[0]
        if thread.is_alive():
            raise PlacementError(_describe(name, pools[name], free))


def _free() -> dict[str, dict[str, float]]:
    """Return what is free on each node, by its address."""
    import ray

    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    available = ray._private.state.available_resources_per_node()
    return {f"{addresses[node]} ({node[:6]})": found for node, found in available.items() if node in addresses}


def _describe(name: str, pool: Any, free: dict[str, dict[str, float]]) -> str:
    from verl.plugin.platform import get_platform

    kind = get_platform().ray_resource_name()
    groups = " and ".join(f"{size} {kind} and {size * pool.max_colocate_count} CPUs" for size in pool.store)
    nodes = "; ".join(
        f"{node} has {found.get(kind, 0):g} {kind} and {found.get('CPU', 0):g} CPUs" for node, found in free.items()
    )
    return (
        f"Ray has not found room for {name} within {SECONDS:g} s. It asks for {groups}, each group on one node. Free "
        f"before that: {nodes}. Change {SETTINGS.get(name, 'the size of this pool')}, end other jobs, or start Ray "
        "with more CPUs (ray_kwargs.ray_init.num_cpus, or --num-cpus of `ray start`)"
    )
