# SPDX-License-Identifier: Apache-2.0
"""Imported by verl in each process of a soak: adds to each step's metrics what TransferQueue holds after it."""

from wrapt import register_post_import_hook


def _describe_queue() -> dict[str, int]:
    import ray
    import torch
    import transfer_queue as tq
    from transfer_queue import interface

    def size(value: object) -> int:
        if isinstance(value, dict):
            return sum(map(size, value.values()))
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        return len(value) if isinstance(value, bytes | bytearray | memoryview | str) else 0

    def describe(unit: object) -> tuple[int, int]:
        return unit.storage_data.active_key_count, size(unit.storage_data.field_data)

    units = [ray.get(unit.__ray_call__.remote(describe)) for unit in interface._TQ_STORAGE["SimpleStorage"].values()]
    keys = sum(len(partition) for partition in (tq.kv_list() or {}).values())
    return {
        "soak/queue_keys": keys,
        "soak/queue_rows": sum(rows for rows, _ in units),
        "soak/queue_bytes": sum(held for _, held in units),
    }


def _watch(tracking: object) -> None:
    log = tracking.Tracking.log

    def _log(self, data, step, backend=None):
        if "training/global_step" in data:
            data = data | _describe_queue()
        return log(self, data, step, backend)

    tracking.Tracking.log = _log


register_post_import_hook(_watch, "verl.utils.tracking")
