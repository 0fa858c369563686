# SPDX-License-Identifier: Apache-2.0
"""Gives each rank of the actor whole prompts, which it can run once."""

import logging

from transfer_queue import KVBatchMeta

from verl_gndpo.teacher.client import prompt_of
from verl_gndpo.teacher.routing import place_rows

logger = logging.getLogger(__name__)


def keep_prompts_together(batch: KVBatchMeta, ranks: int) -> int:
    """Reorder a batch so that the rows of a prompt are on one rank, and all ranks have about the same work.

    A prompt counts once and each response for itself. Within a rank, prompts keep the order of their first rows, so
    that mini-batches are not sorted by length.

    Args:
        batch: as verl has balanced it; changed.
        ranks: among which verl deals out equal parts, in order.

    Returns:
        The number of prompts whose rows are on several ranks, because whole prompts don't fill equal parts.
    """
    prompts = [prompt_of(key) for key in batch.keys]
    order = place_rows(
        prompts=prompts,
        routes=[None] * len(prompts),
        tokens=[tag["seq_len"] for tag in batch.tags],
        ranks=ranks,
        shared=[tag["prompt_len"] for tag in batch.tags],
    )
    size = len(order) // ranks
    first: dict[str, int] = {}
    for row, prompt in enumerate(prompts):
        first.setdefault(prompt, row)
    parts = [
        sorted(order[rank * size : (rank + 1) * size], key=lambda row: (first[prompts[row]], row))
        for rank in range(ranks)
    ]
    batch.reorder([row for part in parts for row in part])
    on_rank = [{prompts[row] for row in part} for part in parts]
    split = [prompt for prompt in first if sum(prompt in there for there in on_rank) > 1]
    if split:
        logger.warning(
            "The responses to %d of %d prompts are on several of the %d ranks, each of which runs the prompt: whole "
            "prompts do not fill equal parts of %d rows.",
            len(split),
            len(first),
            ranks,
            size,
        )
    return len(split)
