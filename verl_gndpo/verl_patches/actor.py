# SPDX-License-Identifier: Apache-2.0
"""Brings patches into the processes of a run's actor, by verl's own setting `model.external_lib`.

verl imports the modules that it names in the process that builds the model. The modules of such patches apply
themselves when they are imported.
"""

from typing import Any

from omegaconf import DictConfig, open_dict

from verl_gndpo.verl_patches import PATCHES
from verl_gndpo.verl_patches.patch import patches


def apply_in_actor(student: DictConfig, name: str) -> None:
    """Apply a patch in the actor's processes, beside whatever `model.external_lib` names already.

    Args:
        student: verl's section `actor_rollout_ref`; changed.
        name: the patch's entry in the index.
    """
    (entry,) = (patch for patch in PATCHES if patch.name == name)
    libraries = student.model.get("external_lib") or []
    libraries = [libraries] if isinstance(libraries, str) else list(libraries)
    with open_dict(student.model):
        student.model.external_lib = list(dict.fromkeys([*libraries, entry.applied_by.split(":")[0]]))


def freeze_tower_in_actor(student: DictConfig) -> None:
    """Freeze the student's vision tower if `actor.freeze_vision_tower` asks for it and the engine is FSDP's.

    Args:
        student: verl's section `actor_rollout_ref`; changed.
    """
    if student.actor.get("freeze_vision_tower") and student.actor.strategy in ("fsdp", "fsdp2"):
        apply_in_actor(student, "freeze_vision_tower")


@patches("real_rows")
def divide_by_real_rows(actor: Any) -> bool:
    """Make the actor's update divide the loss by the rows that verl has not added to fill the batch.

    verl divides a mini-batch's loss by its number of rows, those of padding included. Where a batch has several
    mini-batches, each is taken to have its share of the padding.

    Args:
        actor: the trainer's group of workers.
    """
    update = actor.update_actor

    def update_actor(batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run stock verl's method."""
        real = sum(not tag.get("is_padding", False) for tag in batch.tags)
        if real < len(batch):
            batch.extra_info["global_batch_size"] *= real / len(batch)
        return update(batch, *args, **kwargs)

    actor.update_actor = update_actor
    return True
