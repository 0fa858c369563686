# SPDX-License-Identifier: Apache-2.0
"""What a worker fetches of a batch with images: stock verl's way against the images of a prompt once.

    python benchmarks/image_fetch.py [--json OUT] [--prompts 8] [--responses 16] [--patches 700] [--rounds 3]

The rows are put into verl's TransferQueue, and fetched from it as verl's workers fetch their share of a batch. Bytes
are those that the kernel counts on the loopback device, seconds those of the call. The default shape is that of a
Geometry3K diagram for Qwen2.5-VL: 700 patches of 1,176 float32 numbers, 3.3 MB a row.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from _common import machine, print_table, write_json

if TYPE_CHECKING:
    from tensordict import TensorDict
    from transfer_queue import KVBatchMeta

PATCH = 1176


def put_rows(prompts: int, responses: int, patches: int) -> "KVBatchMeta":
    """Store the rows of a batch one by one, as verl's agent loop does, and return what a trainer knows of them."""
    import torch
    import transfer_queue as tq
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    keys, tags = [], []
    for prompt in range(prompts):
        images = torch.randn(patches, PATCH)
        for session in range(responses):
            row = {
                "uid": f"prompt{prompt}",
                "input_ids": torch.arange(patches // 4 + 100 + session),
                "response_mask": torch.ones(50 + session, dtype=torch.long),
                "multi_modal_inputs": {"pixel_values": images, "image_grid_thw": torch.tensor([[1, 1, patches]])},
            }
            keys.append(f"prompt{prompt}_{session}_0")
            tags.append({"status": "success", "seq_len": len(row["input_ids"])})
            tq.kv_batch_put(
                keys=keys[-1:], tags=tags[-1:], partition_id="train", fields=list_of_dict_to_tensordict([row])
            )
    return tq.KVBatchMeta(keys=keys, tags=tags, partition_id="train", fields=list(row))


def same(one: "TensorDict", other: "TensorDict") -> bool:
    """Return True if two fetched batches have the same rows in the same order."""
    import torch
    from verl.utils import tensordict_utils as tu

    from verl_gndpo.teacher.packing import equal_inputs

    images = zip(tu.get(one, "multi_modal_inputs"), tu.get(other, "multi_modal_inputs"), strict=True)
    ids = zip(one["input_ids"].unbind(), other["input_ids"].unbind(), strict=True)
    return all(equal_inputs(*pair) for pair in images) and all(torch.equal(*pair) for pair in ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--patches", type=int, default=700)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    import hydra
    import ray
    import transfer_queue as tq
    from verl.utils import transferqueue_utils as bridge

    from verl_gndpo.verl_patches import apply

    ray.init(num_cpus=16, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra.compose("ppo_trainer").transfer_queue
    config.enable = True
    config.backend.SimpleStorage.num_data_storage_units = 1
    tq.init(config)
    bridge.TQ_INITIALIZED = True
    try:
        batch = put_rows(args.prompts, args.responses, args.patches)
        ways = {"verl": bridge._async_meta_to_realdata}
        apply("images_once")
        ways["once"] = bridge._async_meta_to_realdata
        samples = {name: [] for name in ways}
        # The first round is not counted: there, images are compared, and connections made.
        for number in range(args.rounds + 1):
            fetched = {}
            for name, way in ways.items():
                bridge._async_meta_to_realdata = way
                before, start = psutil.net_io_counters(pernic=True)["lo"].bytes_recv, time.perf_counter()
                fetched[name] = bridge._meta_to_realdata(batch)
                seconds = time.perf_counter() - start
                sent = psutil.net_io_counters(pernic=True)["lo"].bytes_recv - before
                if number:
                    samples[name].append((sent / 1e9, seconds))
            if not same(fetched["verl"], fetched["once"]):
                raise SystemExit("the two ways fetched different rows")
    finally:
        tq.close()
        ray.shutdown()

    medians = {name: [statistics.median(x) for x in zip(*values, strict=True)] for name, values in samples.items()}
    figures = {
        "machine": machine(),
        "shape": {"prompts": args.prompts, "responses": args.responses, "patches": args.patches},
        "rows": [{"way": name, "gigabytes": sent, "seconds": seconds} for name, (sent, seconds) in medians.items()],
        "bytes_vs_verl": medians["once"][0] / medians["verl"][0],
        "speedup_vs_verl": medians["verl"][1] / medians["once"][1],
    }
    write_json(args.json, figures)
    rows = [list(row.values()) for row in figures["rows"]]
    print_table(f"{args.prompts} prompts x {args.responses} responses", ["way", "GB", "s"], rows)
    print(f"{figures['bytes_vs_verl']:.3f} of the bytes, {figures['speedup_vs_verl']:.1f}x faster")


if __name__ == "__main__":
    main()
