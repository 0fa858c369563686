# SPDX-License-Identifier: Apache-2.0
"""verl's trainers, with a teacher: the step of GNDPO.

    rollout -> teacher log-probs -> student log-probs -> advantages over the whole batch -> actor update

For baseline=kl the student comes before the teacher, who compares its most likely tokens with its own.

The three trainers of verl's registry are replaced, under their own names, by subclasses that differ from them only when
`algorithm.adv_estimator` is one of ours. (Under a new name verl would give a trainer its asynchronous replay buffer.)
"""

import logging
import os
from functools import cached_property

import transfer_queue as tq
from omegaconf import open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl import DataProto
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
from verl.utils.debug import marked_timer
from verl.workers.utils.padding import response_to_nested

from verl_gndpo.advantage import SignalState
from verl_gndpo.checkpoint import load_state, save_state
from verl_gndpo.config import GNDPOConfig, read_signal_config, read_teacher_config, uses_gndpo
from verl_gndpo.doctor.run import raise_on_errors
from verl_gndpo.kl import IDS, LOG_PROBS, REQUEST
from verl_gndpo.observe.monitor import SignalMonitor
from verl_gndpo.teacher.client import TeacherClient, score_while_generating
from verl_gndpo.teacher.server import ServerTeacher, use_servers
from verl_gndpo.verl_patches.policy_loss import keep_policy_loss
from verl_gndpo.verl_patches.replay_buffer import poll_often
from verl_gndpo.verl_patches.resource_pools import call_when_created

logger = logging.getLogger(__name__)

TEACHER_POOL = "teacher_pool"

# What of a multimodal student belongs to its images, as peft's `exclude_modules` matches the names of modules.
VISION_MODULES = r".*\b(visual|vision_tower|vision_model|multi_modal_projector)\b.*"


class GNDPOTrainerMixin:
    """Asks the teacher and hands the batch to the estimator; everything else is the trainer that it is mixed into."""

    runs_gndpo_step = True
    """Tells this class from verl's own without importing it."""

    signal_state: SignalState | None = None
    """What scale=ema carries from step to step; None for any other scale."""

    def __init__(self, config):
        self.uses_gndpo = uses_gndpo(config)
        if self.uses_gndpo:
            raise_on_errors(config)
            self.teacher_config = read_teacher_config(config)
            if self.teacher_config.backend == "server":
                use_servers(config, self.teacher_config)
            _honour_frozen_tower(config.actor_rollout_ref)
            signal = read_signal_config(config.algorithm, config.algorithm.adv_estimator).signal
            if signal.baseline == "kl":
                _import_in_actor(config.actor_rollout_ref, "verl_gndpo.verl_patches.student_top_k")
            if signal.scale == "ema":
                self.signal_state = SignalState()
        super().__init__(config)
        if self.uses_gndpo:
            poll_often(self.replay_buffer)

    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        if not self.uses_gndpo:
            return
        teacher = self.teacher_config
        if teacher.backend == "server":
            keep_policy_loss(self.role_worker_mapping)
            self.teacher = ServerTeacher(teacher)
            return
        pools, name = self.resource_pool_manager, "global_pool"
        if teacher.placement == "dedicated":
            name = TEACHER_POOL
            pools.resource_pool_spec[name] = [teacher.n_gpus_per_node] * teacher.nnodes

        def start_teacher():
            self.teacher = TeacherClient(teacher, pools.resource_pool_dict[name], self.config.trainer.device)

        # It starts while the actor and the rollout engines do.
        call_when_created(pools, start_teacher)

    def _setup(self):
        super()._setup()
        if self.uses_gndpo:
            self.monitor = SignalMonitor(self.config, self._gndpo, self.tokenizer, self.processor)
        if not self.uses_gndpo or self.teacher_config.backend == "server":
            return
        # By now the rollout replicas sleep, so that the weights can go through the accelerator to where they are kept.
        self.teacher.load()
        if self.teacher_config.placement == "dedicated" and not self._needs_kl:
            self.score_finished = score_while_generating(self.replay_buffer, self.teacher)

    def _balance_batch(self, batch: KVBatchMeta, metrics, **kwargs) -> KVBatchMeta:
        batch = super()._balance_batch(batch, metrics, **kwargs)
        if self.uses_gndpo and not self._needs_kl:
            # Here the batch has its final rows and order, and none of verl's own timers runs.
            self._ask_teacher(batch, metrics)
            if self.teacher_config.backend == "server":
                self._warn_of_failed_prompts()
            elif self.teacher_config.placement == "dedicated":
                self.score_finished()
        return batch

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if not self._needs_kl:
            return super()._compute_old_log_prob(batch, metrics)
        batch.extra_info[REQUEST] = self._gndpo.signal.top_k
        batch = super()._compute_old_log_prob(batch, metrics)
        # verl's own timer of the student's pass runs here, too, so that its time includes the teacher's.
        self._ask_teacher(batch, metrics)
        return batch

    def _ask_teacher(self, batch: KVBatchMeta, metrics: dict) -> None:
        with marked_timer("teacher_log_prob", self.timing_raw, color="olive"):
            overlap = self.teacher.score(batch)
        if self.teacher_config.placement == "dedicated":
            metrics.update(overlap)

    @cached_property
    def _gndpo(self) -> GNDPOConfig:
        """The resolved `algorithm.gndpo`."""
        return read_signal_config(self.config.algorithm, self.config.algorithm.adv_estimator)

    @property
    def _needs_kl(self) -> bool:
        """Whether the baseline is the KL divergence, for which the teacher has to know the student's distribution."""
        return self.uses_gndpo and self._gndpo.signal.baseline == "kl"

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
                *(["teacher_kl"] if self._needs_kl else []),
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
        stages = {"kl": data.batch["teacher_kl"]} if self._needs_kl else {}
        if self.signal_state is not None:
            stages["state"] = self.signal_state
        advantages, returns = get_adv_estimator_fn(algorithm.adv_estimator)(
            token_level_rewards=data.batch["rm_scores"],
            index=index.tolist(),
            config=algorithm,
            teacher=teachers,
            **signal,
            **stages,
        )
        with marked_timer("gndpo_diagnostics", self.timing_raw, color="olive"):
            seen = self.monitor.look(
                batch,
                self.global_steps,
                metrics,
                **signal,
                advantages=advantages,
                lengths=nested_mask.offsets().diff().numpy(),
                uids=index.tolist(),
                teachers=teachers,
            )
        metrics.update(seen)

        output = {"advantages": advantages, "returns": returns}
        if corrects:
            output["response_mask"] = data.batch["response_mask"]
            if "rollout_is_weights" in data.batch:
                output["rollout_is_weights"] = data.batch["rollout_is_weights"]
        batch = tq.kv_batch_put(
            keys=batch.keys,
            partition_id=batch.partition_id,
            fields=TensorDict(
                {name: response_to_nested(value, nested_mask) for name, value in output.items()}, batch_size=len(batch)
            ),
        )
        if self._needs_kl:
            # The update has no use for them, and they are most of what is stored of a token.
            batch.fields = [name for name in batch.fields if name not in (IDS, LOG_PROBS)]
        return batch

    def _save_checkpoint(self):
        if self.signal_state is not None:
            # Before verl's files, the last of which says that the checkpoint is complete.
            folder = os.path.join(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}")
            save_state(folder, self.signal_state)
        super()._save_checkpoint()

    def _load_checkpoint(self):
        super()._load_checkpoint()
        # verl leaves it at 0 where there is nothing to resume.
        if self.signal_state is None or self.global_steps == 0:
            return
        trainer = self.config.trainer
        folder = os.path.join(trainer.default_local_dir, f"global_step_{self.global_steps}")
        if trainer.resume_mode == "resume_path":
            folder = trainer.resume_from_path
        state = load_state(folder)
        if state is None:
            logger.warning("%s holds no state of scale=ema, whose average starts anew", folder)
        else:
            self.signal_state = state


def _honour_frozen_tower(student) -> None:
    """Have the actor's processes import `freeze_vision`."""
    if student.actor.get("freeze_vision_tower") and student.actor.strategy in ("fsdp", "fsdp2"):
        _import_in_actor(student, "verl_gndpo.verl_patches.freeze_vision_tower")
        if student.model.get("lora_rank") and not student.model.get("exclude_modules"):
            with open_dict(student.model):
                # peft adds its adapters after the tower is frozen, and vLLM would leave those of the tower out.
                student.model.exclude_modules = VISION_MODULES


def _import_in_actor(student, module: str) -> None:
    """Have the actor's processes import a module, beside whatever `model.external_lib` names already."""
    libraries = student.model.get("external_lib") or []
    libraries = [libraries] if isinstance(libraries, str) else list(libraries)
    with open_dict(student.model):
        student.model.external_lib = [*libraries, module]
