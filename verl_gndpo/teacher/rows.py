# SPDX-License-Identifier: Apache-2.0
"""Whether a row of a batch can be scored by the teacher, and errors that name the row which can't.

The ids, positions and images are the student's. Here each row is looked at before any of it reaches the model: an id
that the teacher has no embedding for, an image placeholder without an image, or a placeholder that the policy sampled
would otherwise surface as an index error on the device, or as an image in another one's place.
"""

import math
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

# What verl's agent loop says of a row, beside its tensors: the prompt's id, which of its responses, which row of the
# data set. Any of them may be missing.
NAMES = {"uid": "prompt", "session_id": "response", "index": "sample"}


def name_of(data: TensorDict, row: int) -> str:
    """A row for people: "row 3 (prompt 9f0c, response 2, sample 17)", or "row 3" of a batch without such fields.

    Args:
        data: the rows of one rank; `uid`, `session_id` and `index` are tensors or objects, one a row or one for all.
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


def image_inputs(data: TensorDict) -> list[dict]:
    """What each row of a batch brings of images, by the names of the model's inputs; empty without any."""
    rows = data.get("multi_modal_inputs", [{}] * len(data))
    return [getattr(inputs, "data", inputs) or {} for inputs in rows]


def check_rows(data: TensorDict, hf_config: Any) -> None:
    """Refuse a batch with a row that the teacher can't score.

    Args:
        data: nested `input_ids` (batch, length), `response_mask` (batch, response length), and perhaps
            `multi_modal_inputs`.
        hf_config: the teacher's.

    Raises:
        ValueError: a response without a prompt, ids outside of the vocabulary, or other numbers of image tokens and
            image features; names the row and both numbers.
    """
    check_lengths(data)
    check_token_ids(data, hf_config.get_text_config().vocab_size)
    check_image_tokens(data, hf_config)


def check_lengths(data: TensorDict) -> None:
    """Compare the lengths of each row's ids and response.

    Raises:
        ValueError: nothing stands before the response that could predict its first token.
    """
    lengths = (data[name].offsets().diff().tolist() for name in ("input_ids", "response_mask"))
    for row, (ids, response) in enumerate(zip(*lengths, strict=True)):
        if response >= ids:
            raise ValueError(f"{name_of(data, row)}: {response} response tokens of {ids} ids leave no prompt")


def check_positions(data: TensorDict) -> None:
    """Compare the numbers of each row's ids and positions, once verl has repacked these (`infer_batch`).

    Raises:
        ValueError: they differ; names the row and both numbers.
    """
    for row, (ids, positions) in enumerate(zip(data["input_ids"].unbind(), data["position_ids"].unbind(), strict=True)):
        if positions.shape[-1] != len(ids):
            raise ValueError(f"{name_of(data, row)}: {len(ids)} ids but {positions.shape[-1]} positions")


def check_token_ids(data: TensorDict, vocab_size: int) -> None:
    """Look for ids that the teacher has no embedding and no logit for.

    Raises:
        ValueError: there is one; names the row, the position, the id and the size of the vocabulary.
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


def placeholder_ids(hf_config: Any) -> dict[str, int]:
    """The ids at which a model puts features of images and videos, by "image" and "video"."""
    ids = {kind: getattr(hf_config, f"{kind}_token_id", None) for kind in ("image", "video")}
    return {kind: token_id for kind, token_id in ids.items() if token_id is not None}


def _sampled(ids: torch.Tensor, mask: torch.Tensor, hf_config: Any) -> torch.Tensor:
    """(length,), where a row has a placeholder that the policy sampled: in the response, with mask 1.

    A multi-turn rollout's tool images stand in the response, too; their placeholders have mask 0.
    """
    sampled = torch.zeros_like(ids, dtype=torch.bool)
    for token_id in placeholder_ids(hf_config).values():
        sampled |= ids == token_id
    sampled[: len(ids) - len(mask)] = False
    sampled[len(ids) - len(mask) :] &= mask.to(ids.device) != 0
    return sampled


def sampled_placeholders(data: TensorDict, hf_config: Any) -> list[torch.Tensor]:
    """Of each row (length,), where the policy sampled a placeholder, which stands for no image."""
    rows = zip(data["input_ids"].unbind(), data["response_mask"].unbind(), strict=True)
    return [_sampled(ids, mask, hf_config) for ids, mask in rows]


def holds_images_in_response(data: TensorDict, hf_config: Any) -> list[bool]:
    """Of each row, whether images stand in its response: a tool's, in a rollout of several turns."""
    result = []
    for ids, mask in zip(data["input_ids"].unbind(), data["response_mask"].unbind(), strict=True):
        response = ids[len(ids) - len(mask) :][mask.to(ids.device) == 0]
        result.append(any(bool((response == token_id).any()) for token_id in placeholder_ids(hf_config).values()))
    return result


def feature_counts(inputs: dict, hf_config: Any) -> dict[str, int]:
    """How many rows of features a row's images and videos become, by "image" and "video", where the config says it.

    Qwen2-VL to Qwen3-VL cut an image into a grid of patches and merge them in squares; InternVL makes a fixed number of
    features of each tile, and its videos are images.
    """
    merge = getattr(getattr(hf_config, "vision_config", None), "spatial_merge_size", None)
    counts = {}
    for kind in placeholder_ids(hf_config):
        grid = inputs.get(f"{kind}_grid_thw")
        if merge is not None:
            # verl and the processors write one row (frames, height, width) an image.
            counts[kind] = 0 if grid is None else sum(math.prod(image) // merge**2 for image in _rows(grid))
        elif kind == "image" and getattr(hf_config, "image_seq_length", None) is not None:
            tiles = inputs.get("pixel_values")
            counts[kind] = 0 if tiles is None else len(tiles) * hf_config.image_seq_length
    return counts


def _rows(grid: Any) -> list[list[int]]:
    return torch.as_tensor(grid).tolist()


def check_image_tokens(data: TensorDict, hf_config: Any) -> None:
    """Compare each row's placeholders of images and videos with the features of those that come with it.

    Placeholders that the policy sampled are not counted.

    Raises:
        ValueError: they differ; names the row and both numbers.
    """
    placeholders = placeholder_ids(hf_config)
    sampled = sampled_placeholders(data, hf_config)
    for row, (ids, inputs) in enumerate(zip(data["input_ids"].unbind(), image_inputs(data), strict=True)):
        for kind, features in feature_counts(inputs, hf_config).items():
            tokens = int(((ids == placeholders[kind]) & ~sampled[row]).sum())
            if tokens != features:
                raise ValueError(
                    f"{name_of(data, row)}: {tokens} {kind} tokens in its ids but {kind}s for {features}; the prompt's "
                    f"<{kind}> placeholders and its {kind}s differ, or the processor cut them otherwise for this model"
                )


def check_log_probs(data: TensorDict, log_probs: list[torch.Tensor]) -> None:
    """Look at what the teacher returned: a finite number for each response token.

    Args:
        log_probs: of each row, (response length,), nats.

    Raises:
        ValueError: another number of them than of response tokens, or one that is not finite; names the row.
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
                f"{scores[wrong[0]].item()}, and {len(wrong)} of {len(scores)} are not finite; a teacher in float16 "
                "overflows where bfloat16 does not, and weights that were not all loaded do so in any dtype"
            )
