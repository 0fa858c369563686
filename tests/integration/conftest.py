# SPDX-License-Identifier: Apache-2.0
import hydra
import pytest
import ray
import transfer_queue as tq


@pytest.fixture(scope="module")
def queue():
    """Start verl's TransferQueue, as in its config, with one storage unit, in a Ray of its own."""
    ray.init("local", num_cpus=32, num_gpus=2, include_dashboard=False, object_store_memory=200_000_000)
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra.compose("ppo_trainer").transfer_queue
    config.enable = True
    config.backend.SimpleStorage.num_data_storage_units = 1
    tq.init(config)
    yield
    tq.close()
    ray.shutdown()
