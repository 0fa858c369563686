# SPDX-License-Identifier: Apache-2.0
"""The teacher as a verl worker. Ray unpickles it by importing this module, which must not import the trainer."""

import torch
from tensordict import TensorDict
from verl.single_controller.base.decorator import make_nd_compute_dataproto_dispatch_fn, register
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.profiler import DistProfiler
from verl.workers.config import HFModelConfig, TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

from verl_gndpo.config import TeacherConfig
from verl_gndpo.platforms import without_accelerator
from verl_gndpo.teacher.engine import TeacherEngineConfig, image_inputs

# What of a batch the teacher reads; verl's `response_mask` gives the response lengths.
FIELDS = ["input_ids", "position_ids", "response_mask", "multi_modal_inputs"]


def _training_worker_config(teacher: TeacherConfig) -> TrainingWorkerConfig:
    on_cpu = without_accelerator()
    dtype = teacher.dtype or ("float32" if on_cpu else "bfloat16")
    return TrainingWorkerConfig(
        model_type="teacher",
        model_config=HFModelConfig(
            path=teacher.model.path,
            trust_remote_code=teacher.model.trust_remote_code,
            external_lib=teacher.model.external_lib,
            override_config=dict(teacher.model.override_config),
            # The ids come from the student; the two tokenizers were compared before the run.
            load_tokenizer=False,
            enable_gradient_checkpointing=False,
            # verl's own way of packing patches the attention; here `shared_prompt` is the attention, without padding.
            use_remove_padding=False,
        ),
        engine_config=TeacherEngineConfig(
            strategy=teacher.fsdp.strategy,
            fsdp_size=teacher.fsdp.fsdp_size,
            param_offload=teacher.fsdp.param_offload and not on_cpu,
            reshard_after_forward=teacher.fsdp.reshard_after_forward,
            wrap_policy=dict(teacher.fsdp.wrap_policy),
            model_dtype=dtype,
            mixed_precision={"param_dtype": dtype, "reduce_dtype": "float32", "buffer_dtype": "float32"},
            use_torch_compile=False,
            use_dynamic_bsz=True,
            infer_max_token_len_per_gpu=teacher.max_token_len_per_gpu,
            logits_chunk_tokens=teacher.logits_chunk_tokens,
            temperature=teacher.temperature,
        ),
        checkpoint_config=CheckpointConfig(load_contents=["model"], save_contents=["model"]),
    )


class TeacherWorker(TrainingWorker):
    """A frozen model, sharded with FSDP, that scores the response tokens of a batch; nothing else."""

    def __init__(self, config: TeacherConfig):
        """
        Args:
            config: a resolved `teacher` section (`read_teacher_config`).
        """
        super().__init__(_training_worker_config(config))

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"))
    @DistProfiler.annotate(color="olive", role="compute_teacher_log_prob")
    def compute_teacher_log_prob(self, data: TensorDict) -> TensorDict:
        """Log-probs of the response tokens under the teacher.

        Args:
            data: this rank's rows, with the keys of FIELDS; see `TeacherEngine.forward_backward_batch`.

        Returns:
            `teacher_log_probs`, nested (batch, response length), float32, nats, rows in the order of `data`.

        Raises:
            ValueError: a row's image tokens and image patches don't match.
        """
        check_image_tokens(data, self.model_config.hf_config)
        with self.engine.eval_mode():
            output = self.engine.infer_batch(data)
        return tu.get_tensordict(tensor_dict=output["model_output"]).cpu()


def check_image_tokens(data: TensorDict, hf_config) -> None:
    """Compare each row's image placeholders with the patches that come with it.

    Raises:
        ValueError: they differ; names the row and both numbers.
    """
    token_id = getattr(hf_config, "image_token_id", None)
    merge = getattr(getattr(hf_config, "vision_config", None), "spatial_merge_size", None)
    if token_id is None or merge is None:
        return
    for row, (ids, inputs) in enumerate(zip(data["input_ids"].unbind(), image_inputs(data), strict=True)):
        grid = inputs.get("image_grid_thw")
        features = 0 if grid is None else int((torch.as_tensor(grid).prod(-1) // merge**2).sum())
        tokens = int((ids == token_id).sum())
        if tokens != features:
            raise ValueError(
                f"row {row}: {tokens} image tokens in its ids but images for {features}; "
                "the prompt's <image> placeholders and its images differ, or the policy sampled an image token"
            )
