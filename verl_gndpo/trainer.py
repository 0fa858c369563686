# SPDX-License-Identifier: Apache-2.0
"""verl's trainers, with a teacher: the step of GNDPO.

    rollout -> teacher log-probs -> student log-probs -> advantages over the whole batch -> actor update

The three trainers of verl's registry are replaced, under their own names, by subclasses that differ from them only when
`algorithm.adv_estimator` is one of ours. (Under a new name verl would give a trainer its asynchronous replay buffer.)
"""

import logging

import ray
import transfer_queue as tq
from omegaconf import open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl import DataProto
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
from verl.trainer.ppo.utils import Role
from verl.utils.debug import marked_timer
from verl.workers.utils.padding import response_to_nested

from verl_gndpo.config import read_signal_config, read_teacher_config, uses_gndpo
from verl_gndpo.diagnostics import describe_signal, describe_teachers
from verl_gndpo.preflight import require
from verl_gndpo.teacher.client import TeacherClient, score_while_generating
from verl_gndpo.teacher.server import POLICY_LOSS_WORKERS, ServerTeacher, use_servers

logger = logging.getLogger(__name__)

# verl's replay buffer looks for finished rollouts every 2 s; with rollouts of a few seconds that is a large part of a
# step.
POLL_INTERVAL_S = 0.2

TEACHER_POOL = "teacher_pool"

# What of a multimodal student belongs to its images, as peft's `exclude_modules` matches the names of modules.
VISION_MODULES = r".*\b(visual|vision_tower|vision_model|multi_modal_projector)\b.*"


class GNDPOTrainerMixin:
    """Asks the teacher and hands the batch to the estimator; everything else is the trainer that it is mixed into."""

    def __init__(self, config):
        self.uses_gndpo = uses_gndpo(config)
        if self.uses_gndpo:
            require(config)
            self.teacher_config = read_teacher_config(config)
            if self.teacher_config.backend == "server":
                use_servers(config, self.teacher_config)
            _honour_frozen_tower(config.actor_rollout_ref)
        super().__init__(config)
        # A custom sampler (trainer.v1.sampler.custom_sampler) owns its polling and may have no such attribute.
        if self.uses_gndpo and hasattr(self.replay_buffer, "poll_interval"):
            self.replay_buffer.poll_interval = min(self.replay_buffer.poll_interval, POLL_INTERVAL_S)

    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        if not self.uses_gndpo:
            return
        teacher = self.teacher_config
        if teacher.backend == "server":
            for role in {Role.Actor, Role.ActorRollout, Role.ActorRolloutRef} & self.role_worker_mapping.keys():
                stock = self.role_worker_mapping[role].__ray_actor_class__
                self.role_worker_mapping[role] = ray.remote(POLICY_LOSS_WORKERS[stock])
            self.teacher = ServerTeacher(teacher)
            return
        pools, name = self.resource_pool_manager, "global_pool"
        if teacher.placement == "dedicated":
            name = TEACHER_POOL
            pools.resource_pool_spec[name] = [teacher.n_gpus_per_node] * teacher.nnodes
        create = pools.create_resource_pool

        def create_and_start():
            create()
            # As early as there is a place for it: it starts while the actor and the rollout engines do.
            self.teacher = TeacherClient(teacher, pools.resource_pool_dict[name], self.config.trainer.device)

        pools.create_resource_pool = create_and_start

    def _setup(self):
        super()._setup()
        if not self.uses_gndpo or self.teacher_config.backend == "server":
            return
        # By now the rollout replicas sleep, so that the weights can go through the accelerator to where they are kept.
        self.teacher.load()
        if self.teacher_config.placement == "dedicated":
            self.score_finished = score_while_generating(self.replay_buffer, self.teacher)

    def _balance_batch(self, batch: KVBatchMeta, metrics, **kwargs) -> KVBatchMeta:
        batch = super()._balance_batch(batch, metrics, **kwargs)
        if self.uses_gndpo:
            # Here the batch has its final rows and order, and none of verl's own timers runs.
            with marked_timer("teacher_log_prob", self.timing_raw, color="olive"):
                overlap = self.teacher.score(batch)
            if self.teacher_config.placement == "dedicated":
                metrics.update(overlap)
            if self.teacher_config.backend == "server":
                self._warn_of_failed_prompts()
            elif self.teacher_config.placement == "dedicated":
                self.score_finished()
        return batch

    def _warn_of_failed_prompts(self) -> None:
        # A custom sampler may keep no such account.
        failed = getattr(self.replay_buffer, "failure_keys", {}).get("train")
        if failed:
            logger.warning(
                "%d prompts of this step have failed and verl goes on without them; where the teacher's servers are "
                "the reason, the log has it under 'Error in _run_prompt'",
                len(failed),
            )

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if not self.uses_gndpo:
            return super()._compute_advantage(batch, metrics)
        algorithm = self.config.algorithm
        routing = self.teacher.routing
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
                *([routing.column] if routing.column else []),
            ],
        )
        nested_mask = data["response_mask"]
        index = data.pop("uid")
        teachers = [routing.route(key).label for key in data.pop(routing.column).tolist()] if routing.column else None
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
            token_level_rewards=data.batch["rm_scores"],
            index=index.tolist(),
            config=algorithm,
            teacher=teachers,
            **signal,
        )
        settings = read_signal_config(algorithm, algorithm.adv_estimator)
        metrics.update(describe_signal(**signal, advantages=advantages, settings=settings))
        if teachers is not None:
            metrics.update(describe_teachers(teachers, **signal, advantages=advantages, settings=settings))

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
            if student.model.get("lora_rank") and not student.model.get("exclude_modules"):
                # peft adds its adapters after the tower is frozen, and vLLM would leave those of the tower out.
                student.model.exclude_modules = VISION_MODULES


def install(v1) -> None:
    """Put the mixin in front of the trainers that `verl.trainer.ppo.v1`, given as the module, has registered."""
    registry = v1.trainer_base.TRAINER_REGISTRY
    for name in ("sync", "colocate_async", "separate_async"):
        trainer = registry[name]
        registry[name] = type(f"GNDPO{trainer.__name__}", (GNDPOTrainerMixin, trainer), {"__doc__": trainer.__doc__})
