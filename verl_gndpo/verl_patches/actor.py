# SPDX-License-Identifier: Apache-2.0
"""Brings patches into the processes of a run's actor, by verl's own setting `model.external_lib`.

verl imports the modules that it names in the process that builds the model. The modules of such patches apply
themselves when they are imported.
"""

from omegaconf import DictConfig, open_dict

from verl_gndpo.verl_patches import PATCHES


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
