# SPDX-License-Identifier: Apache-2.0
"""Loaded by verl in the driver of a real run (VERL_USE_EXTERNAL_MODULES): keeps what the estimator saw, changes
nothing.

Each batch goes to `$CAPTURE_DIR/step_<n>.<k>.pt` before verl clears it, k being 0 unless a step has several batches:
prompt order, ids, positions, images, masks, the log-probs of student and teacher, the advantages that were written
back, and verl's tags, such as the versions of the weights that have sampled a row.
"""

import os
from pathlib import Path

from wrapt import register_post_import_hook

FIELDS = [
    *("input_ids", "position_ids", "response_mask", "multi_modal_inputs", "data_source"),
    *("old_log_probs", "rollout_log_probs", "teacher_log_probs"),
]


def _watch(module) -> None:
    compute = module.GNDPOTrainerMixin._compute_advantage

    def _compute_advantage(self, batch, metrics):
        import torch
        import transfer_queue as tq

        result = compute(self, batch, metrics)
        fields = [*FIELDS, "advantages"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        rows = []
        for i in range(len(batch)):
            row = {"tag": batch.tags[i]}
            for key in data.keys():
                value = data[i][key]
                row[key] = getattr(value, "data", value) if not isinstance(value, torch.Tensor) else value
            rows.append(row)
        path = Path(os.environ["CAPTURE_DIR"]) / f"step_{self.global_steps}.{self.local_trigger_step}.pt"
        torch.save(rows, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        return result

    module.GNDPOTrainerMixin._compute_advantage = _compute_advantage


if "CAPTURE_DIR" in os.environ:
    register_post_import_hook(_watch, "verl_gndpo.trainer")
