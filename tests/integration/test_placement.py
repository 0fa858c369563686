# SPDX-License-Identifier: Apache-2.0
"""Where Ray places the groups of GPUs, on clusters of several raylets on this machine with logical GPUs."""

import time

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table
from verl.single_controller.ray import RayResourcePool, ResourcePoolManager

from tests.helpers import verl_config
from verl_gndpo.verl_patches import resource_pools
from verl_gndpo.verl_patches.resource_pools import PlacementError, place_when_created, rollout_groups

STORE = 80 * 2**20
ROLLOUT = "actor_rollout_ref.rollout"


@pytest.fixture
def cluster(monkeypatch):
    """Start a cluster whose nodes have these numbers of GPUs, and a function that creates verl's pools in it."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    started = []

    def start(*gpus: int, cpus: int = 64) -> dict[str, int]:
        node = {"num_cpus": cpus, "object_store_memory": STORE}
        head = node | {"num_gpus": gpus[0], "include_dashboard": False}
        started.append(Cluster(initialize_head=True, head_node_args=head))
        for number in gpus[1:]:
            started[0].add_node(num_gpus=number, **node)
        ray.init(address=started[0].address, logging_level="ERROR", log_to_driver=False)
        started[0].wait_for_nodes()
        return {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in ray.nodes()}

    yield start
    ray.shutdown()
    started[0].shutdown()


def create(rollout: list[int] | None = None, **spec: list[int]) -> ResourcePoolManager:
    """Create the pools of a run as the trainer does."""
    pools = ResourcePoolManager(resource_pool_spec=spec, mapping={})
    calls: list[bool] = []

    def placed() -> None:
        calls.append(all(p.pgs for p in pools.resource_pool_dict.values()))

    place_when_created(pools, "cpu", placed, rollout)
    pools.create_resource_pool()
    # The teacher starts once, when every group has its GPUs.
    assert calls == [True]
    return pools


def nodes_of(pools: ResourcePoolManager, name: str, sizes: dict[str, int]) -> list[int]:
    """Return the GPUs of the node of each group of a pool."""
    tables = [placement_group_table(group) for group in pools.resource_pool_dict[name].pgs]
    assert all(len(set(table["bundles_to_node_id"].values())) == 1 for table in tables)
    return sorted(sizes[table["bundles_to_node_id"][0]] for table in tables)


@pytest.mark.parametrize(
    ("gpus", "actor", "teacher"), [((8, 4), [8], [4]), ((8, 4), [4], [8]), ((8, 8), [6, 6], [2, 2])]
)
def test_a_small_group_leaves_the_large_node_to_a_large_one(cluster, gpus, actor, teacher):
    sizes = cluster(*gpus)
    pools = create(global_pool=actor, teacher_pool=teacher)
    for name, groups in (("global_pool", actor), ("teacher_pool", teacher)):
        expected = groups if len(set(gpus)) == 2 else list(gpus)
        assert nodes_of(pools, name, sizes) == sorted(expected)


def test_what_fits_nowhere_is_an_error_that_says_what_is_free(cluster, monkeypatch):
    assert resource_pools.SECONDS < 60
    monkeypatch.setattr(resource_pools, "SECONDS", 3)
    cluster(4, 8)
    start = time.monotonic()
    with pytest.raises(PlacementError) as raised:
        # As many GPUs as the cluster has, but no node with ten.
        create(global_pool=[10], teacher_pool=[2])
    assert time.monotonic() - start < 30
    message = str(raised.value)
    assert "global_pool" in message and "10 GPU and 30 CPUs" in message and "trainer.n_gpus_per_node" in message
    assert "has 4 GPU and 64 CPUs" in message and "has 8 GPU and 64 CPUs" in message


def test_too_few_cpus_are_named(cluster, monkeypatch):
    """verl asks for three per GPU."""
    monkeypatch.setattr(resource_pools, "SECONDS", 3)
    cluster(8, cpus=12)
    with pytest.raises(PlacementError, match=r"8 GPU and 24 CPUs.* has 8 GPU and 12 CPUs.*num_cpus"):
        create(global_pool=[8])


def test_replicas_of_separate_async_that_fit_nowhere_are_an_error_before_the_start(cluster, monkeypatch):
    """verl places them after everything else, and would wait for ever."""
    monkeypatch.setattr(resource_pools, "SECONDS", 3)
    cluster(4, 2)
    with pytest.raises(PlacementError, match=r"rollout_pool.*2 GPU and 4 CPUs and 2 GPU and 4 CPUs.*rollout\.n_gpus"):
        create(rollout=[2, 2], global_pool=[4])


def test_replicas_of_separate_async_find_their_gpus_later(cluster):
    sizes = cluster(4, 2)
    pools = create(rollout=[2], global_pool=[4])
    assert nodes_of(pools, "global_pool", sizes) == [4]
    pools.resource_pool_dict["later"] = RayResourcePool([2], max_colocate_count=2)
    pools.resource_pool_dict["later"].get_placement_groups(device_name="cpu")
    assert nodes_of(pools, "later", sizes) == [2]


@pytest.mark.parametrize(
    ("overrides", "groups"),
    [
        ([], []),
        (["trainer.v1.trainer_mode=separate_async"], [2, 2, 2, 2]),
        (["trainer.v1.trainer_mode=separate_async", f"{ROLLOUT}.tensor_model_parallel_size=8"], [4, 4]),
        (["trainer.v1.trainer_mode=separate_async", f"{ROLLOUT}.data_parallel_size=2"], [4, 4]),
    ],
)
def test_groups_of_the_rollout(overrides, groups):
    sizes = [f"{ROLLOUT}.nnodes=2", f"{ROLLOUT}.n_gpus_per_node=4", f"{ROLLOUT}.tensor_model_parallel_size=2"]
    assert rollout_groups(verl_config(*sizes, *overrides)) == groups
