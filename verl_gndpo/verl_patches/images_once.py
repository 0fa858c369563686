# SPDX-License-Identifier: Apache-2.0
"""Makes a worker fetch the images of a prompt once, and not once for each of its responses.

verl's agent loop stores the processor's output for the images, some megabytes, beside every response. The rows of a
prompt that come to one worker hold the same output, unless tools have returned further images.
"""

import functools
import logging
from types import ModuleType
from typing import Any

from tensordict import NonTensorStack, TensorDict
from verl.utils import tensordict_utils as tu

from verl_gndpo.teacher.packing import equal_inputs
from verl_gndpo.verl_patches.patch import apply, patches, replace

logger = logging.getLogger(__name__)

IMAGES = "multi_modal_inputs"
NEEDED = {IMAGES, "uid", "input_ids", "response_mask"}
"""Fields of a batch that tell which rows have the same images."""


@patches("images_once")
def fetch_images_once(transferqueue_utils: ModuleType) -> bool:
    """Make the workers of this process share the images of a prompt among its rows.

    The first batch with rows that would share is fetched whole and compared. If the images of a prompt's responses
    differ there, as those of an agent loop do that augments them, nothing is shared in this process.
    """
    stock = transferqueue_utils._async_meta_to_realdata
    client = transferqueue_utils.tq
    compared = differ = False

    @functools.wraps(stock)
    async def fetch(meta: Any) -> TensorDict:
        """Fetch a batch like stock verl's function. Rows of a prompt get the same object as IMAGES."""
        nonlocal compared, differ
        if isinstance(meta, transferqueue_utils.KVBatchMeta):
            meta = await transferqueue_utils.async_kv_batch_meta2batch_meta(meta)
        if differ or not set(meta.field_names) >= NEEDED:
            return await stock(meta)
        data = await stock(meta.select_fields([name for name in meta.field_names if name != IMAGES]))
        source = rows_with_the_same_images(data)
        taken = sorted(set(source)) if compared else list(range(len(source)))
        stored = await client.get_client().async_get_data(meta.select_samples(taken).select_fields([IMAGES]))
        images = dict(zip(taken, tu.get(stored, IMAGES), strict=True))
        if not compared and len(set(source)) < len(source):
            compared = True
            differ = any(not equal_inputs(images[row] or {}, images[first] or {}) for row, first in enumerate(source))
            if differ:
                logger.warning("The responses to a prompt have different images, so each row's images are fetched.")
        data[IMAGES] = NonTensorStack(*(images[row if differ else first] for row, first in enumerate(source)))
        return data

    replace(transferqueue_utils, "_async_meta_to_realdata", fetch)
    return True


def rows_with_the_same_images(data: TensorDict) -> list[int]:
    """Return the row that each row shares its images with: the first of those with the same prompt, or itself.

    A row whose response has tokens that the policy did not sample shares nothing: a tool may have returned an image.

    Args:
        data: `uid` per row, nested `input_ids` (batch, length) and `response_mask` (batch, response length).
    """
    first: dict[tuple, int] = {}
    source = []
    rows = zip(tu.get(data, "uid"), data["input_ids"].unbind(), data["response_mask"].unbind(), strict=True)
    for row, (uid, ids, mask) in enumerate(rows):
        prompt = (uid, ids[: len(ids) - len(mask)].numpy().tobytes())
        source.append(first.setdefault(prompt, row) if bool(mask.bool().all()) else row)
    return source


apply("images_once")
