# SPDX-License-Identifier: Apache-2.0
"""Find the parts of a checkpoint of verl. Imports neither torch nor verl, because the doctor asks for it first."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRACKER = "latest_checkpointed_iteration.txt"
"""verl writes the step of the newest checkpoint into it, beside the folders global_step_N."""
SHARD = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
DESCRIPTIONS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("preprocessor_config.json", "processor_config.json"),
)
"""What transformers reads beside the weights. Damaged, each leads to an error of its own, often without its name."""


class ExportError(ValueError):
    """A checkpoint can't be exported. The message is one line: what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """The parts of a checkpoint of verl's FSDP engines."""

    actor: Path
    """The folder with the weights of the ranks."""

    world_size: int
    """Number of ranks that wrote it."""

    @property
    def hugging_face(self) -> Path:
        """Return the folder with config, generation config, tokenizer and processor."""
        return self.actor / "huggingface"

    @property
    def step_folder(self) -> Path:
        """Return the folder of the step, which is the folder with the weights itself if that is not called actor."""
        return self.actor.parent if self.actor.name == "actor" else self.actor

    @property
    def step(self) -> int | None:
        """Return the global step, or None if no folder is named after it."""
        found = re.fullmatch(r"global_step_(\d+)", self.step_folder.name)
        return int(found[1]) if found else None

    def shard(self, rank: int) -> Path:
        """Return the file with a rank's weights."""
        return self.actor / f"model_world_size_{self.world_size}_rank_{rank}.pt"


def find_actor(path: Path) -> Path | None:
    """Return the folder of a checkpoint that holds the ranks' weights, or None if `path` belongs to no checkpoint.

    Args:
        path: the folder global_step_N, its actor, actor/huggingface, or the run's folder with TRACKER.
    """
    path = path.absolute()
    tracker = path / TRACKER
    if tracker.is_file():
        # An empty or damaged tracker leads to a folder that does not exist.
        path = path / f"global_step_{tracker.read_text(errors='replace').strip()}"
    candidates = [path, path / "actor"]
    if path.name == "huggingface":
        candidates.append(path.parent)
    return next((folder for folder in candidates if _has_shards(folder)), None)


def find_checkpoint(path: Path) -> Checkpoint:
    """Find a checkpoint, and see that no part of it is missing.

    Args:
        path: as for `find_actor`.

    Raises:
        ExportError: there is no checkpoint of verl's FSDP engines, or a file of it is missing.
    """
    if not path.exists():
        raise ExportError(f"{path} does not exist")
    actor = find_actor(path)
    if actor is None:
        raise ExportError(_say_what_it_is(path))
    sizes = {int(found[1]) for file in actor.iterdir() if (found := SHARD.fullmatch(file.name))}
    described = actor / "fsdp_config.json"
    if described.is_file():
        world_size = read_json(described).get("world_size")
        if not isinstance(world_size, int) or world_size < 1:
            raise ExportError(f"{described} has no world_size of 1 or more -> restore it, or export another checkpoint")
    elif len(sizes) == 1:
        world_size = sizes.pop()
    else:
        raise ExportError(f"{actor} has weights of runs with {sorted(sizes)} ranks -> keep the files of one run only")
    checkpoint = Checkpoint(actor, world_size)
    missing = [rank for rank in range(world_size) if not checkpoint.shard(rank).is_file()]
    if missing:
        raise ExportError(
            f"{len(missing)} of {world_size} ranks have no weights in {actor}, "
            f"first {checkpoint.shard(missing[0]).name} -> copy them from the node "
            "that wrote them, or export another checkpoint"
        )
    if not (checkpoint.hugging_face / "config.json").is_file():
        raise ExportError(
            f"{checkpoint.hugging_face} has no config.json -> copy rank 0's folder huggingface, or the config and "
            "tokenizer of the model that was trained, to it"
        )
    for name in DESCRIPTIONS:
        if (checkpoint.hugging_face / name).is_file():
            read_json(checkpoint.hugging_face / name)
    if not any(file for start in ("tokenizer", "vocab") for file in checkpoint.hugging_face.glob(f"{start}*")):
        raise ExportError(
            f"{checkpoint.hugging_face} has no tokenizer -> copy the tokenizer of the model that was trained to it"
        )
    return checkpoint


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ExportError: the file holds no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ExportError(f"{path} is damaged: {error} -> restore it, or export another checkpoint") from error
    if not isinstance(content, dict):
        raise ExportError(f"{path} holds no JSON object -> restore it, or export another checkpoint")
    return content


def _has_shards(folder: Path) -> bool:
    return folder.is_dir() and any(SHARD.fullmatch(file.name) for file in folder.glob("model_world_size_*_rank_*.pt"))


def _say_what_it_is(path: Path) -> str:
    """Say what a folder is that is no checkpoint, and what to do with it."""
    for actor in (path, path / "actor"):
        if (actor / "dist_ckpt").is_dir() or (actor / "model").is_dir():
            return (
                f"{actor} looks like a checkpoint of verl's Megatron engine, and export reads those of FSDP -> python "
                f"-m verl.model_merger merge --backend megatron --local_dir {actor} --target_dir DIR"
            )
    if (path / "config.json").is_file() and (any(path.glob("*.safetensors")) or any(path.glob("*.bin"))):
        return f"{path} is a Hugging Face model folder already -> use it as it is"
    if (path / TRACKER).is_file():
        return f"{path / TRACKER} names a step whose folder has no weights -> give a folder global_step_N of this run"
    return (
        f"{path} is no checkpoint of verl: no file model_world_size_*_rank_*.pt in it or in its folder actor -> give a "
        "folder global_step_N of trainer.default_local_dir"
    )
