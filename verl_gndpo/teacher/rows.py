# SPDX-License-Identifier: Apache-2.0
"""Checks that the teacher can score each row of a batch, with errors that name the row.

Ids, positions and images are the student's. Each row is checked before any of it reaches the model. Otherwise an id
without an embedding, an image placeholder without an image, or a placeholder that the policy sampled would surface as
an index error on the device, or as an image in another one's place.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from verl_gndpo.families import family_of

NAMES = {"uid": "prompt", "session_id": "response", "index": "sample"}
"""Fields of verl's agent loop that name a row, and what each is called in messages: the prompt's id, the number of the
response to it, and the row of the data set. Any of them may be missing."""


def name_of(data: TensorDict, row: int) -> str:
    """Return a row's name for messages: "row 3 (prompt 9f0c, response 2, sample 17)", or "row 3" without such fields.

    Args:
        data: the rows of one rank. `uid`, `session_id` and `index` are tensors or objects, one per row or one for all.
    """
    known = []
    for key, meaning in NAMES.items():
        values = tu.get(data, key)
        value = values[row] if isinstance(values, list | torch.Tensor) else values
        if isinstance(value, torch.Tensor):
            value = value.item() if value.numel() == 1 else value.tolist()
        if value is not None:
            known.append(f"{meaning} {value}")
    return f"row {row} ({', '.join(known)})" if known else f"row {row}"


def image_inputs(data: TensorDict) -> list[dict[str, Any]]:
    """Return each row's images, by the names of the model's inputs; an empty dict for a row without images."""
    rows = data.get("multi_modal_inputs", [{}] * len(data))
    return [getattr(inputs, "data", inputs) or {} for inputs in rows]


def check_rows(data: TensorDict, hf_config: Any) -> None:
    """Refuse a batch with a row that the teacher can't score.

    Args:
        data: nested `input_ids` (batch, length), `response_mask` (batch, response length), and optionally
            `multi_modal_inputs`.
        hf_config: the teacher's.

    Raises:
        ValueError: a response has no prompt, ids lie outside the vocabulary, or the numbers of image tokens and image
            features differ; names the row and both numbers.
    """
    check_lengths(data)
    check_token_ids(data, hf_config.get_text_config().vocab_size)
    check_image_tokens(data, hf_config)


def check_lengths(data: TensorDict) -> None:
    """Check that each row's response follows a prompt.

    Raises:
        ValueError: nothing stands before the response that could predict its first token.
    """
    lengths = (data[name].offsets().diff().tolist() for name in ("input_ids", "response_mask"))
    for row, (ids, response) in enumerate(zip(*lengths, strict=True)):
        if response >= ids:
            raise ValueError(f"{name_of(data, row)}: {response} response tokens of {ids} ids leave no prompt")


def check_positions(data: TensorDict) -> None:
    """Check that each row has as many positions as ids. verl must have repacked the positions before (`infer_batch`).

    Raises:
        ValueError: the numbers differ; names the row and both numbers.
    """
    for row, (ids, positions) in enumerate(zip(data["input_ids"].unbind(), data["position_ids"].unbind(), strict=True)):
        if positions.shape[-1] != len(ids):
            raise ValueError(f"{name_of(data, row)}: {len(ids)} ids but {positions.shape[-1]} positions")


def check_token_ids(data: TensorDict, vocab_size: int) -> None:
    """Check that the teacher has an embedding and a logit for each id.

    Raises:
        ValueError: it has none for some id; names the row, the position, the id and the size of the vocabulary.
    """
    ids = data["input_ids"]
    wrong = (ids.values() < 0) | (ids.values() >= vocab_size)
    if not wrong.any():
        return
    flat = int(wrong.nonzero()[0])
    row = int((ids.offsets() <= flat).sum()) - 1
    position = flat - int(ids.offsets()[row])
    response = position - (int(ids.offsets().diff()[row]) - int(data["response_mask"].offsets().diff()[row]))
    where = f"token {position} of the prompt" if response < 0 else f"token {response} of the response"
    raise ValueError(
        f"{name_of(data, row)}: {where} has the id {int(ids.values()[flat])}, but the teacher's vocabulary has "
        f"{vocab_size} ids, from 0 on: it can neither read nor score that token. If the student's vocabulary is padded "
        "further than the teacher's, keep the rollout from sampling the padding"
    )


def sampled_placeholders(data: TensorDict, hf_config: Any) -> list[torch.Tensor]:
    """Mark the image placeholders that the policy sampled, which stand for no image: those in the response with mask 1.

    The images that tools return in a multi-turn rollout stand in the response, too; their placeholders have mask 0.

    Returns:
        (length,) bool per row.
    """
    placeholders = family_of(hf_config).placeholder_ids(hf_config).values()
    result = []
    for ids, mask in zip(data["input_ids"].unbind(), data["response_mask"].unbind(), strict=True):
        sampled = torch.zeros_like(ids, dtype=torch.bool)
        for token_id in placeholders:
            sampled |= ids == token_id
        sampled[: len(ids) - len(mask)] = False
        sampled[len(ids) - len(mask) :] &= mask.to(ids.device) != 0
        result.append(sampled)
    return result


def rows_with_images_in_response(data: TensorDict, hf_config: Any) -> set[int]:
    """Return the rows whose responses hold images, which tools return in a multi-turn rollout."""
    placeholders = family_of(hf_config).placeholder_ids(hf_config).values()
    rows = set()
    for row, (ids, mask) in enumerate(zip(data["input_ids"].unbind(), data["response_mask"].unbind(), strict=True)):
        response = ids[len(ids) - len(mask) :][mask.to(ids.device) == 0]
        if any(bool((response == token_id).any()) for token_id in placeholders):
            rows.add(row)
    return rows


def check_image_tokens(data: TensorDict, hf_config: Any) -> None:
    """Compare each row's placeholders of images and videos with the features of the images and videos in it.

    Placeholders that the policy sampled are not counted.

    Raises:
        ValueError: the numbers differ; names the row and both numbers.
    """
    family = family_of(hf_config)
    placeholders = family.placeholder_ids(hf_config)
    if not placeholders:
        return
    sampled = sampled_placeholders(data, hf_config)
    for row, (ids, inputs) in enumerate(zip(data["input_ids"].unbind(), image_inputs(data), strict=True)):
        for medium, features in family.count_features(inputs, hf_config).items():
            if medium not in placeholders:
                continue
            tokens = int(((ids == placeholders[medium]) & ~sampled[row]).sum())
            if tokens != features:
                raise ValueError(
                    f"{name_of(data, row)}: {tokens} {medium} tokens in its ids but {medium}s for {features}; the "
                    f"prompt's <{medium}> placeholders and its {medium}s differ, or the processor cut them otherwise "
                    "for this model"
                )


def check_number(data: TensorDict, rows: Sequence[int], lengths: Sequence[int], found: int) -> None:
    """Check that a forward pass has returned as many log-probs as its rows have response tokens.

    Args:
        rows: of the batch, those of the pass.
        lengths: of their responses.
        found: number of log-probs.

    Raises:
        ValueError: there are more or fewer; names the first and the last row.
    """
    if found != sum(lengths):
        raise ValueError(
            f"the teacher returned {found} log-probs of {sum(lengths)} response tokens for {len(rows)} rows, from "
            f"{name_of(data, rows[0])} to {name_of(data, rows[-1])}"
        )


def check_log_probs(data: TensorDict, log_probs: list[torch.Tensor]) -> None:
    """Check that the teacher has returned a finite number for each response token.

    Args:
        log_probs: (response length,) per row, nats.

    Raises:
        ValueError: the numbers of log-probs and response tokens differ, or a log-prob is not finite; names the row.
    """
    lengths = data["response_mask"].offsets().diff().tolist()
    if len(log_probs) != len(lengths):
        raise ValueError(f"the teacher scored {len(log_probs)} rows of {len(lengths)}")
    for row, (scores, length) in enumerate(zip(log_probs, lengths, strict=True)):
        if len(scores) != length:
            raise ValueError(f"{name_of(data, row)}: {len(scores)} log-probs of {length} response tokens")
    finite = torch.cat(log_probs).isfinite()
    if bool(finite.all()):
        return
    for row, (ids, scores) in enumerate(zip(data["input_ids"].unbind(), log_probs, strict=True)):
        wrong = (~scores.isfinite()).nonzero().flatten().tolist()
        if wrong:
            token = int(ids[len(ids) - len(scores) + wrong[0]])
            raise ValueError(
                f"{name_of(data, row)}: the teacher's log-prob of token {wrong[0]} of the response (id {token}) is "
                f"{scores[wrong[0]].item()}, and {len(wrong)} of {len(scores)} are not finite. A teacher in float16 "
                "overflows where bfloat16 does not, and weights that were not all loaded do so in any dtype"
            )


@contextmanager
def explain_lack_of_memory(rows: TensorDict, limit: int) -> Iterator[None]:
    """Say what to do when the accelerator has no memory left.

    Args:
        rows: what is being scored.
        limit: `teacher.max_token_len_per_gpu`.

    Raises:
        torch.OutOfMemoryError: instead of torch's.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        lengths = rows["input_ids"].offsets().diff()
        raise torch.OutOfMemoryError(
            f"the teacher has no memory left for {len(lengths)} rows of {int(lengths.sum())} tokens, the longest of "
            f"{int(lengths.max())}. Lower teacher.max_token_len_per_gpu (now {limit}) or teacher.logits_chunk_tokens, "
            "or take more GPUs for it; `verl-gndpo plan` computes what scoring takes. The last checkpoint can be "
            f"resumed. {error}"
        ) from error
