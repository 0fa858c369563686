# SPDX-License-Identifier: Apache-2.0
"""Lets an actor keep its policy loss while verl's own teacher servers run (`teacher.backend=server`)."""

from typing import Any

import ray
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.trainer.ppo.utils import Role
from verl.workers.engine_workers import ActorRolloutRefWorker

from verl_gndpo.verl_patches.patch import patches


class _PolicyLoss:
    """Gives an actor of verl the policy loss of its own section although `distillation.enabled` is set."""

    def __init__(self, config: Any, role: str, distillation_config: Any = None, **kwargs: Any) -> None:
        super().__init__(config, role, **kwargs)  # type: ignore[call-arg]  # The next class is verl's worker.


class PolicyLossWorker(_PolicyLoss, ActorRolloutRefWorker):
    """The actor of verl's trainers `sync` and `colocate_async`."""


class DetachPolicyLossWorker(_PolicyLoss, DetachActorWorker):
    """The actor of verl's trainer `separate_async`."""


POLICY_LOSS_WORKERS = {ActorRolloutRefWorker: PolicyLossWorker, DetachActorWorker: DetachPolicyLossWorker}


@patches("policy_loss")
def keep_policy_loss(role_worker_mapping: dict[Role, Any]) -> bool:
    """Replace the actor's worker in a trainer's mapping from roles to Ray actor classes."""
    for role in {Role.Actor, Role.ActorRollout, Role.ActorRolloutRef} & role_worker_mapping.keys():
        stock = role_worker_mapping[role].__ray_actor_class__
        role_worker_mapping[role] = ray.remote(POLICY_LOSS_WORKERS[stock])
    return True
