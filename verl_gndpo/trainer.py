# SPDX-License-Identifier: Apache-2.0
"""The step of GNDPO, to be mixed into verl's trainers.

    rollout -> teacher's log-probs -> student's log-probs -> advantages over the whole batch -> actor update

`step_order` is that list, and says when it differs. `verl_patches/trainers.py` puts the mixin in front of the trainers
in verl's registry. They differ from verl's only when `algorithm.adv_estimator` is one of ours.
"""

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl import DataProto
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
from verl.utils import tracking
from verl.utils.debug import marked_timer
from verl.workers.utils.padding import response_to_nested

from verl_gndpo.advantage import SignalState, Trace
from verl_gndpo.checkpoint import (
    describe_run,
    explain_full_disk,
    fingerprint,
    keep_previous,
    load_state,
    log_of,
    mend_tracker,
    save_run,
    save_state,
    step_folder,
    warn_of_other_data,
)
from verl_gndpo.config import (
    GNDPOConfig,
    Signal,
    TeacherConfig,
    read_signal_config,
    read_teacher_config,
    uses_gndpo,
)
from verl_gndpo.doctor.run import raise_on_errors
from verl_gndpo.kl import IDS, LOG_PROBS, REQUEST
from verl_gndpo.observe.lost_prompts import LostPrompts
from verl_gndpo.observe.monitor import SignalMonitor
from verl_gndpo.observe.stalled_rollouts import StalledRollouts
from verl_gndpo.rewards.manager import use_reward_manager
from verl_gndpo.student.placement import keep_prompts_together
from verl_gndpo.student.run import share_prompts
from verl_gndpo.teacher.client import TeacherClient, score_while_generating
from verl_gndpo.teacher.server import ServerTeacher, use_servers
from verl_gndpo.verl_patches.actor import apply_in_actor, divide_by_real_rows, freeze_tower_in_actor
from verl_gndpo.verl_patches.file_logger import go_on_with_log
from verl_gndpo.verl_patches.policy_loss import keep_policy_loss
from verl_gndpo.verl_patches.replay_buffer import poll_often
from verl_gndpo.verl_patches.resource_pools import place_when_created, rollout_groups
from verl_gndpo.verl_settings import ignored_settings

if TYPE_CHECKING:
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer as _Trainer
else:
    # Importing verl's trainers imports this module, through the patch that extends them.
    _Trainer = object

logger = logging.getLogger(__name__)

TEACHER_POOL = "teacher_pool"


def step_order(signal: Signal) -> tuple[str, ...]:
    """Return what a step computes between the rollout and the actor's update, in order.

    verl computes "student" and "advantages", in this order. The mixin computes the rest, before or between them.
    """
    if signal.baseline == "kl":
        # The teacher compares the student's most likely tokens with its own.
        return ("student", "teacher", "advantages")
    return ("teacher", "student", "advantages")


def sort_rows(batch: KVBatchMeta) -> None:
    """Bring a batch, which has the order in which responses were finished, into one that is the same in each run."""
    prompts = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["prompts"])["prompts"]
    # A key is "{prompt}_{session}_{turn}", with a random name for the prompt.
    numbers = [tuple(map(int, key.split("_")[1:])) for key in batch.keys]
    rows = [(prompt.tolist(), number) for prompt, number in zip(prompts.unbind(), numbers, strict=True)]
    batch.reorder(sorted(range(len(batch)), key=rows.__getitem__))


class GNDPOTrainerMixin(_Trainer):
    """Asks the teacher, and gives the batch to the estimator. The trainer that it extends does everything else."""

    runs_gndpo_step = True
    """Distinguishes this class from verl's own without an import of it."""

    signal_state: SignalState | None = None
    """The running average of scale=ema; None for any other scale."""

    teacher: TeacherClient | ServerTeacher

    _score_finished: Callable[[], None] | None = None
    """Lets a dedicated teacher begin with prompts that are finished already; None if it must wait for the batch."""

    def __init__(self, config: DictConfig) -> None:
        self.uses_gndpo = uses_gndpo(config)
        if self.uses_gndpo:
            raise_on_errors(config)
            self.teacher_config: TeacherConfig = read_teacher_config(config)
            self._prepare(config)
        self._shares_prompts = share_prompts(config)
        super().__init__(config)
        if self.uses_gndpo:
            # Of what this run reads: the files may be replaced while it lasts.
            self._data = fingerprint(config.data.train_files)
            self._saved: Path | None = None
            poll_often(self.replay_buffer)
            self._lost_prompts = LostPrompts(
                self.replay_buffer,
                prompts=config.data.train_batch_size // self.parameter_sync_step,
                responses=config.actor_rollout_ref.rollout.n,
                limit=self._gndpo.max_lost_share,
            )
            StalledRollouts(self.replay_buffer, limit=self._gndpo.rollout_timeout_s, workers=self._workers_of_rollouts)

    def _prepare(self, config: DictConfig) -> None:
        """Change verl's config where our settings ask for more than an advantage estimator."""
        gndpo = read_signal_config(config.algorithm, config.algorithm.adv_estimator)
        signal = gndpo.signal
        for ignored in ignored_settings(config, gndpo):
            OmegaConf.update(config, ignored.key, ignored.instead)
        if self.teacher_config.backend == "server":
            use_servers(config, self.teacher_config)
        elif self.teacher_config.from_distillation:
            # Its teachers are scored by our workers. verl starts no servers and adds no loss.
            config.distillation.enabled = False
        use_reward_manager(config)
        apply_in_actor(config.actor_rollout_ref, "images_once")
        freeze_tower_in_actor(config.actor_rollout_ref)
        if signal.baseline == "kl":
            apply_in_actor(config.actor_rollout_ref, "student_top_k")
        if signal.scale == "ema":
            self.signal_state = SignalState()

    @cached_property
    def _gndpo(self) -> GNDPOConfig:
        """Return the resolved `algorithm.gndpo`."""
        return read_signal_config(self.config.algorithm, self.config.algorithm.adv_estimator)

    @property
    def _needs_kl(self) -> bool:
        """Return True if the baseline is the KL divergence, which takes the student's distribution."""
        return self.uses_gndpo and self._gndpo.signal.baseline == "kl"

    # --- set-up -------------------------------------------------------------------------------------------------------

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        if not self.uses_gndpo:
            return
        teacher, device_name = self.teacher_config, self.config.trainer.device
        pools, name = self.resource_pool_manager, "global_pool"
        rollout = rollout_groups(self.config)
        if teacher.backend == "server":
            keep_policy_loss(self.role_worker_mapping)
            self.teacher = ServerTeacher(teacher)
            place_when_created(pools, device_name, rollout=rollout)
            return
        if teacher.placement == "dedicated":
            name = TEACHER_POOL
            pools.resource_pool_spec[name] = [teacher.n_gpus_per_node] * teacher.nnodes

        def start_teacher() -> None:
            self.teacher = TeacherClient(teacher, pools.resource_pool_dict[name], device_name)

        # It starts while the actor and the rollout engines do.
        place_when_created(pools, device_name, start_teacher, rollout)

    def get_teacher_client(self) -> Any:
        """Return what verl's agent loop asks for a teacher's log-probs."""
        if self.uses_gndpo and isinstance(self.teacher, ServerTeacher):
            return self.teacher.clients(self.config, self.teacher_model_manager)
        return super().get_teacher_client()

    def _setup(self) -> None:
        super()._setup()
        if not self.uses_gndpo:
            return
        divide_by_real_rows(self.actor_rollout_wg)
        go_on_with_log(tracking, log_of(self.config.trainer), self.global_steps)
        self.monitor = SignalMonitor(self.config, self._gndpo, self.tokenizer, self.processor)
        if isinstance(self.teacher, ServerTeacher):
            return
        # By now the rollout replicas sleep, so that the weights can go through the accelerator to where they are kept.
        self.teacher.load()
        if self.teacher_config.placement == "dedicated" and not self._needs_kl:
            self._score_finished = score_while_generating(self.replay_buffer, self.teacher)

    def _workers_of_rollouts(self) -> dict[str, Any]:
        """Return Ray's handles of the processes that make and grade responses, by what they are."""
        groups = {
            "rollout server": [
                server
                for manager in self._rollout_server_managers()
                for replica in manager.get_replicas()
                for server in replica.servers
            ],
            "agent loop's worker": self.agent_loop_manager.agent_loop_workers,
            "reward worker": self.get_reward_handles() or [],
        }
        return {f"{name} {i}": worker for name, group in groups.items() for i, worker in enumerate(group)}

    # --- a step -------------------------------------------------------------------------------------------------------

    def _run_until(self, end: str, batch: KVBatchMeta, metrics: dict) -> None:
        """Compute our parts of the step that stand directly before `end`, one of verl's parts, in `step_order`."""
        ours = {"teacher": self._ask_teacher}
        order = step_order(self._gndpo.signal)
        before = order[: order.index(end)]
        start = max((place + 1 for place, part in enumerate(before) if part not in ours), default=0)
        for part in before[start:]:
            ours[part](batch, metrics)

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, **kwargs: Any) -> KVBatchMeta:
        if self.uses_gndpo and self._gndpo.rollout_seed is not None:
            sort_rows(batch)
        batch = super()._balance_batch(batch, metrics, **kwargs)
        if self._shares_prompts:
            ranks = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
            metrics["student/split_prompts"] = keep_prompts_together(batch, ranks)
        if self.uses_gndpo:
            metrics.update(self._lost_prompts.take())
            # From here on the batch has its final rows and order. None of verl's timers runs.
            self._run_until("student", batch, metrics)
        return batch

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if self._needs_kl:
            batch.extra_info[REQUEST] = self._gndpo.signal.top_k
        batch = super()._compute_old_log_prob(batch, metrics)
        if self.uses_gndpo:
            # verl's timer of the student's pass is still running, so it includes the time of what is computed here.
            self._run_until("advantages", batch, metrics)
        return batch

    def _ask_teacher(self, batch: KVBatchMeta, metrics: dict) -> None:
        """Score a batch with the teacher, which stores its log-probs beside the rows."""
        with marked_timer("teacher_log_prob", self.timing_raw, color="olive"):
            overlap = self.teacher.score(batch)
        if self.teacher_config.placement == "dedicated":
            metrics.update(overlap)
        metrics["gndpo/teacher_restarts"] = float(self.teacher.restarts)
        if self._score_finished is not None:
            self._score_finished()

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if not self.uses_gndpo:
            return super()._compute_advantage(batch, metrics)
        stored = self._fetch(batch)
        nested_mask, uids = stored["response_mask"], stored.pop("uid").tolist()
        column = self.teacher.routing.column
        teachers = None
        if column:
            teachers = [self.teacher.routing.route(key).label for key in stored.pop(column).tolist()]
        data = DataProto(batch=stored.to_padded_tensor())
        data, changed = self._correct_rollout(data, metrics)

        log_probs = {name: data.batch[name] for name in ("teacher_log_probs", "old_log_probs")}
        advantages, returns, trace = self._estimate(data, log_probs, uids, teachers)
        with marked_timer("gndpo_diagnostics", self.timing_raw, color="olive"):
            metrics.update(
                self.monitor.look(
                    batch,
                    self.global_steps,
                    metrics,
                    **log_probs,
                    trace=trace,
                    lengths=nested_mask.offsets().diff().numpy(),
                    uids=uids,
                    teachers=teachers,
                )
            )

        output = {"advantages": advantages, "returns": returns} | {name: data.batch[name] for name in changed}
        nested = {name: response_to_nested(value, nested_mask) for name, value in output.items()}
        batch = tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(nested, batch_size=len(batch))
        )
        if self._needs_kl:
            # The update does not need them, and they are most of what is stored for each token.
            batch.fields = [name for name in batch.fields if name not in (IDS, LOG_PROBS)]
        return batch

    def _fetch(self, batch: KVBatchMeta) -> TensorDict:
        """Return what the estimator needs of a batch, as TransferQueue stores it: nested by response."""
        fields = ["uid", "response_mask", "rm_scores", "old_log_probs", "rollout_log_probs", "teacher_log_probs"]
        if self._needs_kl:
            fields.append("teacher_kl")
        if self.teacher.routing.column:
            fields.append(self.teacher.routing.column)
        return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)

    def _correct_rollout(self, data: DataProto, metrics: dict) -> tuple[DataProto, list[str]]:
        """Apply verl's rollout correction, if it is configured, as for any other estimator.

        Returns:
            The batch with its importance weights and rejection masks, and the names of the entries that are new or
            changed.
        """
        correction = self.config.algorithm.get("rollout_correction", None)
        if correction is None or correction.get("bypass_mode", False) or "rollout_log_probs" not in data.batch:
            return data, []
        data, correction_metrics = compute_rollout_correction_and_add_to_batch(data, correction)
        metrics.update(correction_metrics)
        return data, [name for name in ("response_mask", "rollout_is_weights") if name in data.batch]

    def _estimate(
        self, data: DataProto, log_probs: dict[str, torch.Tensor], uids: list[str], teachers: list[str] | None
    ) -> tuple[torch.Tensor, torch.Tensor, Trace]:
        """Run the estimator over the whole batch.

        Args:
            data: a padded batch.
            log_probs: those of teacher and student.
            uids: the prompt of each row.
            teachers: the teacher of each row; None if there is only one.

        Returns:
            Advantages and returns, both (batch, response_length), and the stages that led to them.
        """
        algorithm = self.config.algorithm
        optional: dict[str, Any] = {}
        if self._needs_kl:
            optional["kl"] = data.batch["teacher_kl"]
        if self.signal_state is not None:
            optional["state"] = self.signal_state
        traces: list[Trace] = []
        advantages, returns = get_adv_estimator_fn(algorithm.adv_estimator)(
            token_level_rewards=data.batch["rm_scores"],
            index=uids,
            config=algorithm,
            teacher=teachers,
            response_mask=data.batch["response_mask"],
            on_trace=traces.append,
            **log_probs,
            **optional,
        )
        return advantages, returns, traces[0]

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        if not self.uses_gndpo:
            return super()._save_checkpoint()
        folder = step_folder(self.config.trainer, self.global_steps)
        with explain_full_disk(folder):
            # Before verl's files, the last of which says that the checkpoint is complete.
            save_run(folder, describe_run(self.config, self._gndpo.signal, self._data))
            if self.signal_state is not None:
                save_state(folder, self.signal_state)
            with keep_previous(self.config.trainer, self._saved):
                super()._save_checkpoint()
        self._saved = folder

    def _load_checkpoint(self) -> None:
        trainer = self.config.trainer
        if self.uses_gndpo and trainer.resume_mode == "auto":
            mend_tracker(Path(trainer.default_local_dir))
        super()._load_checkpoint()
        # verl leaves the step at 0 where there is nothing to resume.
        if not self.uses_gndpo or self.global_steps == 0:
            return
        folder = step_folder(trainer, self.global_steps)
        if trainer.resume_mode == "resume_path":
            folder = Path(trainer.resume_from_path)
        warn_of_other_data(folder, self._data)
        if self.signal_state is None:
            return
        state = load_state(folder)
        if state is None:
            logger.warning("%s holds no state of scale=ema, whose average starts anew", folder)
        else:
            self.signal_state = state
