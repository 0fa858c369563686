# SPDX-License-Identifier: Apache-2.0
"""The teachers as a verl worker. Ray unpickles it by importing this module, which must not import the trainer."""

import json
import os

import ray
import torch
from tensordict import TensorDict
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name, get_torch_device
from verl.utils.distributed import initialize_global_process_group_ray
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

from verl_gndpo.config import Teacher, TeacherConfig
from verl_gndpo.kl import IDS, LOG_PROBS
from verl_gndpo.platforms import without_accelerator
from verl_gndpo.teacher.architecture import model_config
from verl_gndpo.teacher.engine import TeacherEngineConfig
from verl_gndpo.teacher.routing import Routing
from verl_gndpo.teacher.rows import NAMES, check_rows, explain_lack_of_memory
from verl_gndpo.verl_patches import apply

# Fields of a batch that the teacher reads. `response_mask` has the response lengths; NAMES are for errors. verl skips
# fields that a batch lacks, such as the student's most likely tokens unless the baseline is `kl`.
FIELDS = ["input_ids", "position_ids", "response_mask", "multi_modal_inputs", *NAMES, IDS, LOG_PROBS]


def _training_worker_config(teacher: TeacherConfig, model: Teacher) -> TrainingWorkerConfig:
    on_cpu = without_accelerator()
    return TrainingWorkerConfig(
        model_type="teacher",
        model_config=model_config(model),
        engine_config=TeacherEngineConfig(
            strategy=teacher.fsdp.strategy,
            fsdp_size=teacher.fsdp.fsdp_size,
            param_offload=teacher.fsdp.param_offload and not on_cpu,
            reshard_after_forward=teacher.fsdp.reshard_after_forward,
            wrap_policy=dict(teacher.fsdp.wrap_policy),
            model_dtype=teacher.dtype,
            mixed_precision={"param_dtype": teacher.dtype, "reduce_dtype": "float32", "buffer_dtype": "float32"},
            use_torch_compile=False,
            use_dynamic_bsz=True,
            infer_max_token_len_per_gpu=teacher.max_token_len_per_gpu,
            logits_chunk_tokens=teacher.logits_chunk_tokens,
            ulysses_sequence_parallel_size=teacher.ulysses_sequence_parallel_size,
            temperature=teacher.temperature,
            self_check=teacher.self_check,
            attention=teacher.attention,
            sharing=teacher.sharing,
        ),
        checkpoint_config=CheckpointConfig(load_contents=["model"], save_contents=["model"]),
    )


class TeacherWorker(Worker):
    """Scores response tokens with frozen models that are sharded with FSDP.

    Several teachers run in one process. Teachers with the same weights share them.
    """

    def __init__(self, config: TeacherConfig):
        """
        Args:
            config: a resolved `teacher` section (`read_teacher_config`).
        """
        super().__init__()
        apply("images_once")
        # Before verl's workers, which would take torch's default time-out.
        initialize_global_process_group_ray(timeout_second=config.nccl_timeout)
        self._routing = Routing(config)
        self._limit = config.max_token_len_per_gpu
        # Offloading the weights frees torch's cache, too.
        self._frees_cache = config.placement == "colocated" and not config.fsdp.param_offload
        self.models: dict[str, TrainingWorker] = {}
        self._model_of: dict[str, str] = {}
        for name, model in config.teachers.items():
            weights = (model.path, model.trust_remote_code, model.external_lib, model.override_config)
            key = self._model_of[name] = json.dumps(weights, sort_keys=True, default=str)
            if key not in self.models:
                self.models[key] = TrainingWorker(_training_worker_config(config, model))
        # All models have the same layout over ranks.
        self.set_dispatch_collect("train", **next(iter(self.models.values())).get_dispatch_collect())

    def whereabouts(self) -> tuple[str, int]:
        """Return Ray's id of the node and the id of the process on it."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reset(self) -> None:
        """Load the weights."""
        for model in self.models.values():
            model.reset()

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def compute_teacher_log_prob(self, data: TensorDict) -> TensorDict:
        """Score the response tokens of each row under its teacher; under several, return the weighted mean.

        Args:
            data: this rank's rows, at least one, with FIELDS and the routing column, if there is one. See
                `TeacherEngine.forward_backward_batch`.

        Returns:
            `teacher_log_probs`, nested (batch, response length), float32, nats, rows in the order of `data`. If `data`
            has the student's most likely tokens, also `teacher_kl` of the same shape. (The expectation of the teachers'
            mean log-ratio is the mean of their KL divergences, so both use the same weights.)

        Raises:
            NoTeacherError: a row has no teacher.
            ValueError: a row that can't be scored; see `check_rows` and `check_log_probs`.
        """
        # Before rows are selected from the batch, because verl sends positions with wrong lengths.
        tu.maybe_fix_3d_position_ids(data)
        keys = data[self._routing.column] if self._routing.column else [""] * len(data)
        routes = [self._routing.route(key) for key in keys]
        scores: dict[str, list[torch.Tensor | None]] = {}
        for key, model in self.models.items():
            shares = [sum(weight for name, weight in route.weights if self._model_of[name] == key) for route in routes]
            rows = [row for row, share in enumerate(shares) if share > 0]
            if not _on_any_rank(bool(rows)):
                continue
            # All ranks gather the weights together, so a rank without rows for this teacher scores its shortest row.
            taken = rows or [int(data["input_ids"].offsets().diff().argmin())]
            part = data if len(taken) == len(data) else tu.index_select_tensor_dict(data, taken)
            check_rows(part, model.model_config.hf_config)
            with model.engine.eval_mode(), explain_lack_of_memory(part, self._limit):
                output = model.engine.infer_batch(part)["model_output"]
            for name, scored in output.items():
                sums = scores.setdefault(name, [None] * len(data))
                for row, of_row in zip(rows, scored.unbind(), strict=False):
                    term = shares[row] * of_row
                    sums[row] = term if sums[row] is None else sums[row] + term
        # Every row has a teacher, so every row has a sum.
        nested = {
            name: torch.nested.as_nested_tensor([x for x in sums if x is not None], layout=torch.jagged)
            for name, sums in scores.items()
        }
        result = tu.get_tensordict(tensor_dict=nested).cpu()
        if self._frees_cache:
            # The rollout engine is about to wake up on the same GPU, and can't use what torch keeps here.
            get_torch_device().empty_cache()
        return result


def _on_any_rank(here: bool) -> bool:
    if torch.distributed.get_world_size() == 1:
        return here
    flag = torch.tensor(int(here), device=get_device_name())
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)
