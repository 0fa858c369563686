# SPDX-License-Identifier: Apache-2.0
"""A vision tower encodes each distinct image of a call once, although prompts that share an image each bring a copy."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from verl_gndpo.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def encode_distinct_images(model: "PreTrainedModel") -> None:
    """Have the vision towers of a model encode each distinct image of a call once; see `DistinctImages`.

    A tower whose inputs can't be cut into images encodes every copy, as before.

    Args:
        model: a Hugging Face model, with or without vision.
    """
    for tower in family_of(model).find_towers(model).values():
        parameters = inspect.signature(tower.forward).parameters
        by_grid = "grid_thw" in parameters and hasattr(tower, "spatial_merge_size")
        if by_grid or next(iter(parameters)) == "pixel_values":
            DistinctImages(tower)


class DistinctImages:
    """A vision tower that encodes each distinct image of a call once.

    Prompts that share an image each bring a copy of it. The tower's own forward is replaced on the instance, so that
    its parameters keep their names. There are two kinds of towers. One takes all patches in one row with a grid per
    image, and returns rows of patches or of merged tokens, image by image (Qwen-VL). The other takes and returns one
    row per image or tile (InternVL). Everything else that a tower returns has rows of one of these kinds, such as
    Qwen3-VL's features of inner layers.
    """

    def __init__(self, tower: torch.nn.Module):
        self._tower: Any = tower
        self._encode: Callable[..., Any] = tower.forward
        tower.forward = self._forward

    def _forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor | None = None, **options: Any) -> Any:
        """Encode the distinct images and repeat their features for the copies.

        Args:
            pixel_values: (patches, features) with a grid, (images, ...) without.
            grid_thw: (images, 3), time, height and width in patches.
            options: handed on. A tensor among them may belong to the images; then every copy is encoded.
        """
        grid = {} if grid_thw is None else {"grid_thw": grid_thw}
        if any(not isinstance(value, bool | int | str | None) for value in options.values()):
            return self._encode(pixel_values, **grid, **options)
        shapes: list = [()] * len(pixel_values) if grid_thw is None else grid_thw.tolist()
        rows = [math.prod(shape) for shape in shapes]
        images = pixel_values.split(rows)
        distinct, which = _distinct(images, shapes)
        if len(distinct) == len(images):
            return self._encode(pixel_values, **grid, **options)
        if grid_thw is not None:
            grid = {"grid_thw": grid_thw[distinct]}
        encoded = self._encode(torch.cat([images[i] for i in distinct]), **grid, **options)
        rows = [rows[i] for i in distinct]
        sizes = [rows] if grid_thw is None else [rows, [n // self._tower.spatial_merge_size**2 for n in rows]]
        return _repeat(encoded, {sum(size): size for size in sizes}, which)


def _repeat(encoded: Any, sizes: dict[int, list[int]], which: list[int]) -> Any:
    """Give each image of a call the rows of the distinct image that it equals.

    Args:
        encoded: a tower's output for the distinct images: tensors, in any nesting.
        sizes: the numbers of rows that the distinct images may have in a tensor, by their sum.
        which: the position of each image's equal among the distinct ones.

    Raises:
        ValueError: a tensor's number of rows is none of these sums.
    """
    if isinstance(encoded, torch.Tensor):
        if len(encoded) not in sizes:
            raise ValueError(f"a vision tower returned {len(encoded)} rows for images that have {list(sizes)}")
        parts = encoded.split(sizes[len(encoded)])
        return torch.cat([parts[i] for i in which])
    if isinstance(encoded, dict):
        return type(encoded)(**{key: _repeat(value, sizes, which) for key, value in encoded.items()})
    if isinstance(encoded, list | tuple):
        return type(encoded)(_repeat(value, sizes, which) for value in encoded)
    return encoded


def _distinct(images: Sequence[torch.Tensor], shapes: list) -> tuple[list[int], list[int]]:
    """Return the indices of the distinct images, and for each image the position of its equal among them.

    An accelerator is waited for twice, whatever the number of images.
    """
    if not images:
        return [], []
    # The sum finds candidates; only equality makes two images one.
    sums = torch.stack([image.sum(dtype=torch.float64) for image in images]).tolist()
    first: dict[tuple, int] = {}
    candidates = [
        first.setdefault((*shape, of_image), i) for i, (shape, of_image) in enumerate(zip(shapes, sums, strict=True))
    ]
    again = [(i, candidate) for i, candidate in enumerate(candidates) if candidate != i]
    equal = torch.stack([(images[i] == images[j]).all() for i, j in again]).tolist() if again else []
    # An image with the sum of another one, but other pixels, is so rare that it may as well be encoded again.
    same = {i: j for (i, j), is_equal in zip(again, equal, strict=True) if is_equal}
    distinct = [i for i in range(len(images)) if i not in same]
    position = {i: number for number, i in enumerate(distinct)}
    return distinct, [position[same.get(i, i)] for i in range(len(images))]
