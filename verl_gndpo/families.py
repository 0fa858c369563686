# SPDX-License-Identifier: Apache-2.0
"""Facts of model families: which modules see images, which ids stand for images, and how many features an image makes.

This is the only module that names such things; everything else asks `family_of`. A family that nobody has declared is
described by `UNDECLARED`: its vision tower and projector are found by the structure that Hugging Face models share.
Declare a family with `register_family` where structure is not enough; docs/extending/model_family.md shows how.

Importing this module is cheap: plugin processes that never build a model import it, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MEDIA = ("image", "video")
"""What models of this project see besides text."""

CountFeatures = Callable[[Mapping[str, Any], Any], dict[str, int]]
"""(the image inputs of a row by name, config) -> number of features by medium."""


def count_patches(inputs: Mapping[str, Any], config: Any) -> dict[str, int]:
    """Count the features of images and videos that are cut into a grid of patches, which are merged in squares.

    Args:
        inputs: `image_grid_thw` and `video_grid_thw`, (images, 3): frames, height and width in patches. A medium
            without a grid has no features.
        config: of the model; its vision config has `spatial_merge_size`.
    """
    merge = config.vision_config.spatial_merge_size**2
    counts = {}
    for medium in MEDIA:
        grid = inputs.get(f"{medium}_grid_thw")
        counts[medium] = 0 if grid is None else sum(math.prod(image) // merge for image in grid.tolist())
    return counts


def count_tiles(inputs: Mapping[str, Any], config: Any) -> dict[str, int]:
    """Count the features of images that are cut into tiles, each of which becomes `config.image_seq_length` features.

    Args:
        inputs: `pixel_values`, (tiles, channels, height, width).
    """
    tiles = inputs.get("pixel_values")
    return {"image": 0 if tiles is None else len(tiles) * config.image_seq_length}


def _count_where_certain(inputs: Mapping[str, Any], config: Any) -> dict[str, int]:
    """Count the features of a row of an undeclared family: where there are no inputs, or nothing but a grid of patches
    for its images."""
    if not inputs:
        return dict.fromkeys(MEDIA, 0)
    merges = hasattr(getattr(config, "vision_config", None), "spatial_merge_size")
    if merges and set(inputs) == {"pixel_values", "image_grid_thw"}:
        return {"image": count_patches(inputs, config)["image"]}
    return {}


@dataclass(frozen=True)
class ModelFamily:
    """A family of Hugging Face models that keep their vision in the same places."""

    name: str

    model_types: tuple[str, ...]
    """`model_type` of the configs of its models."""

    towers: tuple[str, ...] | None = None
    """The last parts of the names of the modules that encode images. None: the modules whose config is the model's
    vision config."""

    projectors: tuple[str, ...] | None = None
    """The last parts of the names of the modules outside the towers that map image features to the language model's
    embeddings; () where the tower does it. None: the modules with parameters that stand beside the decoder and the
    tower."""

    placeholders: Mapping[str, str] = field(default_factory=lambda: {m: f"{m}_token_id" for m in MEDIA})
    """By medium, the attribute of the config with the id at which the model puts a feature of that medium."""

    marks: tuple[str, ...] = ()
    """Attributes of the config with further ids by which the model finds its images."""

    vision_attribute: str = "vision_config"
    """The attribute of the config that describes the tower; None or missing in a text-only model."""

    count_features: CountFeatures = _count_where_certain
    """Counts the features of a row's images, which must equal the row's placeholders. A medium that it leaves out is
    not compared."""

    token_inputs: Mapping[str, int] = field(default_factory=dict)
    """Further inputs of the decoder with an entry for each token, and the dimension of the tokens. Only sequence
    parallelism needs them."""

    masked_inputs: Mapping[str, str] = field(default_factory=dict)
    """Inputs of the decoder that are lists of (masked tokens, ...) tensors, and the input of `token_inputs` that is
    their mask. Only sequence parallelism needs them."""

    @property
    def id_attributes(self) -> tuple[str, ...]:
        """The attributes of the config with the ids by which the model finds its images and videos."""
        return (*self.placeholders.values(), *self.marks)

    def vision_config_of(self, config: Any) -> Any | None:
        """Return the part of a config that describes the tower; None for a text-only model."""
        return getattr(config, self.vision_attribute, None)

    def placeholder_ids(self, config: Any) -> dict[str, int]:
        """Return the ids at which a model puts features, by medium; empty for a text-only model."""
        ids = {medium: getattr(config, attribute, None) for medium, attribute in self.placeholders.items()}
        return {medium: token_id for medium, token_id in ids.items() if token_id is not None}

    def find_towers(self, model: PreTrainedModel) -> dict[str, torch.nn.Module]:
        """Return the modules of a model that encode images, by name; empty for a text-only model."""
        if self.towers is not None:
            return _outermost(model, self.towers)
        vision = self.vision_config_of(model.config)
        if vision is None:
            return {}
        encoders = [n for n, module in model.named_modules() if type(getattr(module, "config", None)) is type(vision)]
        return _outermost(model, encoders)

    def find_projectors(self, model: PreTrainedModel) -> dict[str, torch.nn.Module]:
        """Return the modules outside the towers that map image features to embeddings, by name."""
        towers = self.find_towers(model)
        if not towers:
            return {}
        if self.projectors is not None:
            return _outermost(model, self.projectors, outside=towers)
        decoder = model.get_decoder()
        place = next(name for name, module in model.named_modules() if module is decoder).rpartition(".")[0]
        beside = [
            f"{place}.{name}".lstrip(".")
            for name, module in model.get_submodule(place).named_children()
            if module not in (decoder, model.get_output_embeddings()) and any(True for _ in module.parameters())
        ]
        return _outermost(model, beside, outside=towers)


def _outermost(
    model: PreTrainedModel, names: Collection[str], outside: Collection[str] = ()
) -> dict[str, torch.nn.Module]:
    """Return the modules with a name that is, or ends in, one of `names`, unless another one contains them.

    Args:
        outside: names of modules whose inner modules are left out, too.
    """
    found: dict[str, torch.nn.Module] = {}
    # Outer modules come before the modules inside of them.
    for name, module in model.named_modules():
        if (name in names or name.rpartition(".")[2] in names) and not any(
            name == outer or name.startswith(f"{outer}.") for outer in (*found, *outside)
        ):
            found[name] = module
    return found


QWEN_VL = ModelFamily(
    name="Qwen-VL",
    model_types=("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    towers=("visual",),
    # The tower's last layers merge patches into embeddings.
    projectors=(),
    marks=("vision_start_token_id", "vision_end_token_id"),
    count_features=count_patches,
    # Qwen3-VL adds the features of inner layers of the tower to those of the first layers of the language model.
    token_inputs={"visual_pos_masks": 1},
    masked_inputs={"deepstack_visual_embeds": "visual_pos_masks"},
)

INTERNVL = ModelFamily(
    name="InternVL",
    # Of transformers' own InternVL, whose released checkpoints end in `-HF`.
    model_types=("internvl",),
    towers=("vision_tower",),
    projectors=("multi_modal_projector",),
    # Its videos are images.
    placeholders={"image": "image_token_id"},
    count_features=count_tiles,
)

UNDECLARED = ModelFamily(
    name="undeclared",
    model_types=(),
    marks=(
        "vision_start_token_id",
        "vision_end_token_id",
        "image_token_index",
        "video_token_index",
    ),
)
"""Describes every model whose `model_type` no family declares."""

_declared: dict[str, ModelFamily] = {}


def register_family(family: ModelFamily) -> None:
    """Declare a model family, for all models of its `model_types` in this process.

    Raises:
        ValueError: it has no model type, or one that another family has declared.
    """
    if not family.model_types:
        raise ValueError(f"model family {family.name} names no model_types")
    for model_type in family.model_types:
        other = _declared.get(model_type, family)
        if other != family:
            raise ValueError(f"model family {family.name}: {other.name} has declared model_type {model_type!r} already")
    _declared.update(dict.fromkeys(family.model_types, family))


def declared_families() -> list[ModelFamily]:
    """Return all declared families, in the order of their declaration."""
    return list({id(family): family for family in _declared.values()}.values())


def family_of(model: Any) -> ModelFamily:
    """Return the family of a model.

    Args:
        model: a Hugging Face model or its config.
    """
    config = getattr(model, "config", model)
    return _declared.get(config.model_type, UNDECLARED)


for _family in (QWEN_VL, INTERNVL):
    register_family(_family)
