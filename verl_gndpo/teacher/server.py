# SPDX-License-Identifier: Apache-2.0
"""`teacher.backend=server`: verl's own teacher replicas (vLLM or SGLang), for our estimators.

With `distillation.enabled`, verl's agent loop sends them each response as soon as it is finished. verl would put their
log-probs into the actor's loss. Here they become advantages, like a worker's, and the actor keeps its policy loss. A
replica that is lost is replaced (`server_keeper.py`).
"""

import math
from dataclasses import fields
from typing import Any

import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf, open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.experimental.teacher_loop import teacher_model
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import RolloutConfig

from verl_gndpo.config import ConfigError, TeacherConfig, as_dict
from verl_gndpo.teacher.routing import Routing
from verl_gndpo.teacher.server_client import KeptServerClient
from verl_gndpo.teacher.server_keeper import keep_servers
from verl_gndpo.teacher.waiting import TeacherLostError
from verl_gndpo.verl_patches.server_start import limit_start_of_servers


class ServerTeacher:
    """Checks the replicas' log-probs, which come with a batch, and stores those of the responses, as a worker does."""

    def __init__(self, teacher: TeacherConfig):
        self.routing = Routing(teacher)
        self.restarts = 0
        """How often replicas had been replaced in this run when the last batch was scored."""

        self._teacher = teacher
        limit_start_of_servers(teacher_model, teacher)

    def clients(self, config: Any, manager: Any) -> dict[str, KeptServerClient]:
        """Return clients for verl's agent loop, by teacher's key, and have the replicas replaced from now on.

        Args:
            config: verl's whole config.
            manager: verl's `MultiTeacherModelManager`, whose replicas are ready.
        """
        self._keeper = keep_servers(manager, self._teacher)
        return {
            key: KeptServerClient(config, balancer, key, self._keeper, self._teacher.timeout_s)
            for key, balancer in manager.load_balancer_handle.items()
        }

    def score(self, batch: KVBatchMeta) -> dict[str, float]:
        """Store `teacher_log_probs` of every row of a batch.

        Returns:
            gndpo/teacher_ahead_share: share of the rows that were scored before the step asked for them: 1.

        Raises:
            TeacherLostError: replicas were lost more often than `teacher.max_restarts`, and prompts with them.
            ValueError: a replica has scored other tokens than the student's.
        """
        try:
            self.restarts = ray.get(self._keeper.restarts.remote())
        except TeacherLostError as error:
            # Without the traceback of the keeper's process.
            raise TeacherLostError(str(getattr(error, "cause", error))) from None
        fields = ["input_ids", "response_mask", "teacher_logprobs", "teacher_ids"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        scores = response_log_probs(data, batch.keys)
        tq.kv_batch_put(
            keys=batch.keys,
            partition_id=batch.partition_id,
            fields=TensorDict({"teacher_log_probs": scores}, batch_size=len(batch)),
        )
        return {"gndpo/teacher_ahead_share": 1.0}


def response_log_probs(data: TensorDict, names: list[str]) -> torch.Tensor:
    """Return the log-probs of the response tokens from what verl stores of a replica's answer.

    Args:
        data: nested `input_ids` (batch, length), `response_mask` (batch, response length), and `teacher_logprobs` and
            `teacher_ids` (batch, length, 1): at each place, log-prob and id of the next token.
        names: names of the rows, for messages.

    Returns:
        Nested (batch, response length), float32, nats.

    Raises:
        ValueError: a replica has scored other tokens than the student's.
    """
    rows = []
    responses = data["response_mask"].offsets().diff().tolist()
    fields = (data[name].unbind() for name in ("input_ids", "teacher_logprobs", "teacher_ids"))
    for name, response, ids, log_probs, scored in zip(names, responses, *fields, strict=True):
        if len(ids) != len(log_probs):
            raise ValueError(f"row {name}: {len(ids)} tokens, but the teacher has scored {len(log_probs)}")
        place = slice(len(ids) - response - 1, len(ids) - 1)
        wrong = (scored[place, 0] != ids[len(ids) - response :]).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(
                f"row {name}: response token {at} is {int(ids[len(ids) - response + at])}, but the teacher has scored "
                f"{int(scored[place, 0][at])}: its server sees another prompt than the student"
            )
        rows.append(log_probs[place, 0].float())
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def distillation_section(config: Any, teacher: TeacherConfig) -> Any:
    """Return verl's `distillation` section for the replicas that `teacher` asks for.

    Args:
        config: verl's whole config, which is not changed.
        teacher: a resolved `teacher` section with `backend=server`.

    Raises:
        ConfigError: verl refuses it; most likely a setting in `teacher.server`.
    """
    section = as_dict(config.distillation)
    if not teacher.from_distillation:
        section |= _own_servers(section, teacher)
    section["enabled"] = True
    # A loss that verl's checks accept. The actor does not compute it.
    section["distillation_loss"] |= {"loss_mode": "k1", "use_policy_gradient": True}
    result = OmegaConf.create(section)
    try:
        omega_conf_to_dataclass(result)
    # verl's dataclasses, hydra and OmegaConf each raise their own.
    except Exception as error:
        raise ConfigError(f"verl refuses these teacher servers: {' '.join(str(error).split())}") from error
    return result


def _own_servers(section: dict[str, Any], teacher: TeacherConfig) -> dict[str, Any]:
    """Return the keys of verl's section `distillation` that describe the replicas of `teacher.models`.

    Args:
        section: `distillation` as it is.
        teacher: a resolved `teacher` section with `backend=server`.
    """
    unknown = sorted(set(teacher.server) - {field.name for field in fields(RolloutConfig)})
    if unknown:
        raise ConfigError(f"teacher.server.{unknown[0]} is not a setting of verl's rollout servers")
    template = section["teacher_models"]["teacher_model"]
    replica = template["inference"] = template["inference"] | teacher.server
    size = math.prod(replica.get(f"{kind}_parallel_size", 1) for kind in ("tensor_model", "data", "pipeline_model"))
    gpus = teacher.n_gpus_per_node * teacher.nnodes
    if size < 1 or gpus % (size * len(teacher.teachers)):
        raise ConfigError(
            f"teacher.n_gpus_per_node x teacher.nnodes is {gpus}, which {len(teacher.teachers)} teacher(s) can't share "
            f"in replicas of {size} GPUs (teacher.server.tensor_model_parallel_size times data_ and "
            "pipeline_model_parallel_size; verl's default is 2)"
        )
    replicas = gpus // size // len(teacher.teachers)
    entries = [
        template | {"key": model.keys[0], "model_path": model.path, "num_replicas": replicas}
        for model in teacher.teachers.values()
    ]
    # verl reads this entry if there is one teacher, and only the other entries if there are several.
    models = {"teacher_model": entries[0]}
    if len(entries) > 1:
        models |= {f"teacher_{number}": entry for number, entry in enumerate(entries)}
    return {
        "teacher_models": models,
        "n_gpus_per_node": teacher.n_gpus_per_node,
        "nnodes": teacher.nnodes,
        "teacher_key": teacher.routing_key,
    }


def use_servers(config: Any, teacher: TeacherConfig) -> None:
    """Change verl's config so that it starts the replicas, and its agent loop asks them."""
    with open_dict(config):
        config.distillation = distillation_section(config, teacher)
