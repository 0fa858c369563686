# SPDX-License-Identifier: Apache-2.0
"""Checks of rows that a teacher can't score, and the rows' names, on batches as verl's agent loop writes them."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import NonTensorData, TensorDict
from tensordict.tensorclass import NonTensorStack
from transformers import InternVLConfig, Qwen2_5_VLConfig, Qwen2Config, Qwen3VLConfig
from verl.trainer.ppo.padding_utils import construct_minimal_padding_template
from verl.utils.tensordict_utils import list_of_dict_to_tensordict, nested_tensor_from_tensor_list

from verl_gndpo.teacher.rows import (
    NAMES,
    check_image_tokens,
    check_log_probs,
    check_number,
    check_positions,
    check_rows,
    check_token_ids,
    explain_lack_of_memory,
    image_inputs,
    name_of,
    rows_with_images_in_response,
    sampled_placeholders,
)

QWEN, QWEN3, INTERNVL = Qwen2_5_VLConfig(), Qwen3VLConfig(), InternVLConfig()


def batch(*rows, mrope=False, **fields):
    """Make a batch, as a worker gets it, of rows (prompt ids, response ids, response mask, inputs)."""
    ids = [torch.tensor([*prompt, *response]) for prompt, response, _, _ in rows]
    masks = [torch.tensor(mask, dtype=torch.long) for _, _, mask, _ in rows]
    positions = [torch.arange(len(x)) for x in ids]
    data = {
        "input_ids": torch.nested.as_nested_tensor(ids, layout=torch.jagged),
        "response_mask": torch.nested.as_nested_tensor(masks, layout=torch.jagged),
        "position_ids": nested_tensor_from_tensor_list([x.expand(4, -1) for x in positions], ragged_idx=2)
        if mrope
        else torch.nested.as_nested_tensor(positions, layout=torch.jagged),
        "multi_modal_inputs": NonTensorStack(*[inputs for *_, inputs in rows]),
    }
    return TensorDict(data | fields, batch_size=len(rows))


def text(count):
    return batch(*[([1, 2], [3], [1], {})] * count)


def test_a_row_is_named_by_the_fields_that_it_has():
    data = text(2)
    assert name_of(data, 1) == "row 1"
    data["uid"] = NonTensorStack("9f", "a0")
    assert name_of(data, 1) == "row 1 (prompt a0)"
    data["session_id"] = torch.tensor([2, 7])
    data["index"] = NonTensorStack(17, None)
    assert name_of(data, 0) == "row 0 (prompt 9f, response 2, sample 17)"
    assert name_of(data, 1) == "row 1 (prompt a0, response 7)"


@pytest.mark.parametrize(
    "values",
    [
        NonTensorStack("5", "6"),
        NonTensorData("6", batch_size=[2]),
        torch.tensor([5, 6]),
        torch.tensor([[5], [6]]),
        torch.nested.as_nested_tensor([torch.tensor([5]), torch.tensor([6])], layout=torch.jagged),
    ],
    ids=lambda values: type(values).__name__,
)
def test_names_come_as_objects_or_tensors(values):
    data = text(2)
    data["index"] = values
    assert name_of(data, 1) == "row 1 (sample 6)"


def test_the_rows_that_verl_adds_as_padding_have_names_and_can_be_scored():
    """They have the same fields with other types, so that the batch holds lists of objects."""
    grid = torch.tensor([[1, 2, 2]])
    real = {
        "prompts": torch.tensor([1, QWEN.image_token_id]),
        "responses": torch.tensor([4, 5]),
        "input_ids": torch.tensor([1, QWEN.image_token_id, 4, 5]),
        "position_ids": torch.arange(4).expand(4, -1),
        "response_mask": torch.tensor([1, 1]),
        "multi_modal_inputs": {"image_grid_thw": grid},
        "uid": "9f",
        "session_id": 1,
        "index": 17,
    }
    padding, _ = construct_minimal_padding_template(real, {}, eos_token_id=2)
    assert set(NAMES) <= set(padding)
    data = list_of_dict_to_tensordict([{k: row[k] for k in real} for row in (real, padding)])
    data["position_ids"] = nested_tensor_from_tensor_list([real["position_ids"], padding["position_ids"]], ragged_idx=2)
    assert name_of(data, 1) == "row 1 (prompt 9f, response 1, sample 17)"
    assert image_inputs(data)[1] == {}
    check_rows(data, QWEN)
    assert [len(x) for x in sampled_placeholders(data, QWEN)] == [4, 128]


@pytest.mark.parametrize("token_id", [-1, 10, 2**40])
@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_an_id_outside_of_the_vocabulary_is_named_with_its_place(token_id, where):
    prompt, response = [1, 2, 3], [4]
    whole = [*prompt, *response]
    whole[where] = token_id
    data = batch(([9], [0, 9], [1, 0], {}), (whole[:3], whole[3:], [1], {}))
    place = f"token {where} of the prompt" if where < 3 else "token 0 of the response"
    message = f"row 1: {place} has the id {token_id}, but the teacher's vocabulary has 10 ids"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_token_ids(data, 10)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_rows(data, Qwen2Config(vocab_size=10))


def test_lengths_that_differ_are_named():
    data = text(3)
    data["position_ids"] = torch.nested.as_nested_tensor(
        [torch.arange(3), torch.arange(3), torch.arange(2)], layout=torch.jagged
    )
    with pytest.raises(ValueError, match="row 2: 3 ids but 2 positions"):
        check_positions(data)
    check_positions(text(3))
    check_positions(batch(([1, 2], [3], [1], {}), ([1], [3], [1], {}), mrope=True))
    with pytest.raises(ValueError, match="row 0: 2 response tokens of 2 ids leave no prompt"):
        check_rows(batch(([], [1, 2], [1, 1], {})), Qwen2Config())


def grids(*images):
    return torch.tensor(images)


@pytest.mark.parametrize(
    ("config", "inputs", "features"),
    [
        (QWEN, {"image_grid_thw": grids([1, 4, 6])}, 6),
        (QWEN3, {"image_grid_thw": grids([1, 4, 6])}, 6),
        (INTERNVL, {"pixel_values": torch.zeros(1, 3, 2, 2)}, 256),
    ],
    ids=["qwen2_5_vl", "qwen3_vl", "internvl"],
)
def test_images_and_their_tokens_are_compared_in_the_prompt_and_in_tools_answers(config, inputs, features):
    image, other = config.image_token_id, 5
    prompt, response = [other] + [image] * features, [other] * 3
    check_image_tokens(batch((prompt, response, [1, 1, 1], inputs), (prompt[:1], response, [1, 1, 1], {})), config)
    # Sampled placeholders stand for no image, those of a tool do.
    check_image_tokens(batch((prompt, [image, other, image], [1, 1, 1], inputs)), config)
    check_image_tokens(batch((prompt[:-1], [other, image, image], [1, 0, 1], inputs)), config)
    for row in (
        (prompt[:-1], [image], [1], inputs),
        (prompt, [image], [0], inputs),
        (prompt, response, [1, 1, 1], {}),
    ):
        tokens = row[0].count(image) + (row[2] == [0])
        shown = features if row[3] else 0
        message = f"row 1 (prompt b): {tokens} image tokens in its ids but images for {shown};"
        with pytest.raises(ValueError, match=re.escape(message)):
            check_image_tokens(batch(((other,), (other,), [1], {}), row, uid=NonTensorStack("a", "b")), config)


TOKENS = st.sampled_from([QWEN.image_token_id, QWEN.video_token_id, QWEN.vision_start_token_id, 0, 7])


@given(
    st.lists(
        st.tuples(st.lists(TOKENS, min_size=1, max_size=5), st.lists(st.tuples(TOKENS, st.integers(0, 1)), max_size=5)),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=100, deadline=None)
def test_sampled_placeholders_are_those_of_the_response_with_mask_1(rows):
    data = batch(*[(prompt, [t for t, _ in response], [m for _, m in response], {}) for prompt, response in rows])
    placeholders = {QWEN.image_token_id, QWEN.video_token_id}
    for (prompt, response), found in zip(rows, sampled_placeholders(data, QWEN), strict=True):
        assert found.tolist() == [False] * len(prompt) + [t in placeholders and m == 1 for t, m in response]
    assert rows_with_images_in_response(data, QWEN) == {
        row for row, (_, response) in enumerate(rows) if any(t in placeholders and m == 0 for t, m in response)
    }


def test_log_probs_are_counted_and_must_be_finite():
    data = batch(([1], [2, 3], [1, 1], {}), ([1], [4, 5, 6], [1, 1, 1], {}), uid=NonTensorStack("a", "b"))
    good = [-torch.ones(2), -torch.ones(3)]
    check_log_probs(data, good)
    with pytest.raises(ValueError, match=re.escape("row 1 (prompt b): 2 log-probs of 3 response tokens")):
        check_log_probs(data, [good[0], good[0]])
    with pytest.raises(ValueError, match="scored 1 rows of 2"):
        check_log_probs(data, good[:1])
    for value, shown in ((float("nan"), "nan"), (float("-inf"), "-inf")):
        wrong = torch.tensor([-1.0, value, value])
        message = f"row 1 (prompt b): the teacher's log-prob of token 1 of the response (id 5) is {shown}, and 2 of 3"
        with pytest.raises(ValueError, match=re.escape(message)):
            check_log_probs(data, [good[0], wrong])


@pytest.mark.parametrize("found", [2, 4])
def test_a_pass_returns_a_log_prob_for_each_response_token(found):
    data = batch(([1], [2, 3], [1, 1], {}), ([1], [4], [1], {}), uid=NonTensorStack("a", "b"))
    check_number(data, [0, 1], [2, 1], 3)
    message = f"{found} log-probs of 3 response tokens for 2 rows, from row 0 (prompt a) to row 1 (prompt b)"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_number(data, [0, 1], [2, 1], found)


def test_a_teacher_without_memory_says_what_to_lower():
    data = batch(([1], [2, 3], [1, 1], {}), ([1], [4], [1], {}))
    message = (
        r"2 rows of 5 tokens, the longest of 3\. Lower teacher\.max_token_len_per_gpu \(now 64\).*CUDA out of memory"
    )
    with pytest.raises(torch.OutOfMemoryError, match=message), explain_lack_of_memory(data, 64):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
