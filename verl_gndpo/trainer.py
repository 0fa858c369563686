# SPDX-License-Identifier: Apache-2.0
"""verl's trainers, with a teacher: the step of GNDPO.

    rollout -> teacher log-probs -> student log-probs -> advantages over the whole batch -> actor update

The three trainers of verl's registry are replaced, under their own names, by subclasses that differ from them only when
`algorithm.adv_estimator` is one of ours. (Under a new name verl would give a trainer its asynchronous replay buffer.)
"""

import ray
import transfer_queue as tq
from omegaconf import open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl import DataProto
from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
from verl.utils.debug import marked_timer
from verl.workers.utils.padding import response_to_nested

from verl_gndpo.config import read_signal_config, read_teacher_config, uses_gndpo
from verl_gndpo.diagnostics import describe_signal
from verl_gndpo.preflight import require
from verl_gndpo.teacher.shared_prompt import order_by_prompt
from verl_gndpo.teacher.worker import FIELDS, TeacherWorker

# verl's replay buffer looks for finished rollouts every 2 s; with rollouts of a few seconds that is a large part of a
# step.
POLL_INTERVAL_S = 0.2


class GNDPOTrainerMixin:
    """Asks the teacher and hands the batch to the estimator; everything else is the trainer that it is mixed into."""

    def __init__(self, config):
        self.uses_gndpo = uses_gndpo(config)
        if self.uses_gndpo:
            require(config)
            _honour_frozen_tower(config.actor_rollout_ref)
        super().__init__(config)
        # A custom sampler (trainer.v1.sampler.custom_sampler) owns its polling and may have no such attribute.
        if self.uses_gndpo and hasattr(self.replay_buffer, "poll_interval"):
            self.replay_buffer.poll_interval = min(self.replay_buffer.poll_interval, POLL_INTERVAL_S)

    def _setup(self):
        super()._setup()
        if not self.uses_gndpo:
            return
        # By now the rollout replicas sleep, so that the weights can go through the accelerator to where they are kept.
        self.teacher_wg = RayWorkerGroup(
            resource_pool=self.resource_pool_manager.resource_pool_dict["global_pool"],
            ray_cls_with_init=RayClassWithInitArgs(
                cls=ray.remote(TeacherWorker), config=read_teacher_config(self.config)
            ),
            device_name=self.config.trainer.device,
            name_prefix="teacher",
        )
        self.teacher_wg.reset()

    def _balance_batch(self, batch: KVBatchMeta, metrics, **kwargs) -> KVBatchMeta:
        batch = super()._balance_batch(batch, metrics, **kwargs)
        if self.uses_gndpo:
            # Here the batch has its final rows and order, and none of verl's own timers runs.
            with marked_timer("teacher_log_prob", self.timing_raw, color="olive"):
                self._compute_teacher_log_prob(batch)
        return batch

    def _compute_teacher_log_prob(self, batch: KVBatchMeta) -> None:
        """Let the teacher score the batch; it writes `teacher_log_probs` beside verl's own fields."""
        # Rows of one prompt together, so that a rank can share it; the result is stored by key, whatever the order.
        order = order_by_prompt(batch.keys, batch.tags, self.teacher_wg.world_size)
        request = KVBatchMeta(
            keys=[batch.keys[row] for row in order],
            tags=[batch.tags[row] for row in order],
            partition_id=batch.partition_id,
            fields=FIELDS,
            extra_info={},
        )
        scored = self.teacher_wg.compute_teacher_log_prob(request)
        if len(scored) != len(batch):
            raise RuntimeError(f"the teacher scored {len(scored)} of {len(batch)} rows")

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if not self.uses_gndpo:
            return super()._compute_advantage(batch, metrics)
        algorithm = self.config.algorithm
        data = tq.kv_batch_get(
            keys=batch.keys,
            partition_id=batch.partition_id,
            select_fields=[
                "uid",
                "response_mask",
                "rm_scores",
                "old_log_probs",
                "rollout_log_probs",
                "teacher_log_probs",
            ],
        )
        nested_mask = data["response_mask"]
        index = data.pop("uid")
        data = DataProto(batch=data.to_padded_tensor())

        # The same importance weights and rejection masks as for any other estimator.
        correction = algorithm.get("rollout_correction", None)
        corrects = (
            correction is not None and "rollout_log_probs" in data.batch and not correction.get("bypass_mode", False)
        )
        if corrects:
            data, correction_metrics = compute_rollout_correction_and_add_to_batch(data, correction)
            metrics.update(correction_metrics)

        signal = {key: data.batch[key] for key in ("teacher_log_probs", "old_log_probs", "response_mask")}
        advantages, returns = get_adv_estimator_fn(algorithm.adv_estimator)(
            token_level_rewards=data.batch["rm_scores"], index=index.tolist(), config=algorithm, **signal
        )
        settings = read_signal_config(algorithm, algorithm.adv_estimator)
        metrics.update(describe_signal(**signal, advantages=advantages, settings=settings))

        output = {"advantages": advantages, "returns": returns}
        if corrects:
            output["response_mask"] = data.batch["response_mask"]
            if "rollout_is_weights" in data.batch:
                output["rollout_is_weights"] = data.batch["rollout_is_weights"]
        return tq.kv_batch_put(
            keys=batch.keys,
            partition_id=batch.partition_id,
            fields=TensorDict(
                {name: response_to_nested(value, nested_mask) for name, value in output.items()}, batch_size=len(batch)
            ),
        )


def _honour_frozen_tower(student) -> None:
    """Have the actor's processes import `freeze_vision`, beside whatever `model.external_lib` names already."""
    if student.actor.get("freeze_vision_tower") and student.actor.strategy in ("fsdp", "fsdp2"):
        libraries = student.model.get("external_lib") or []
        libraries = [libraries] if isinstance(libraries, str) else list(libraries)
        with open_dict(student.model):
            student.model.external_lib = [*libraries, "verl_gndpo.freeze_vision"]


def install(v1) -> None:
    """Put the mixin in front of the trainers that `verl.trainer.ppo.v1`, given as the module, has registered."""
    registry = v1.trainer_base.TRAINER_REGISTRY
    for name in ("sync", "colocate_async", "separate_async"):
        trainer = registry[name]
        registry[name] = type(f"GNDPO{trainer.__name__}", (GNDPOTrainerMixin, trainer), {"__doc__": trainer.__doc__})
