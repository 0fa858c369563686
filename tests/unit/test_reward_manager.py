# SPDX-License-Identifier: Apache-2.0
"""verl's own reward loop on rows with and without answers, as the agent loop sends them."""

import asyncio

import numpy as np
import pytest
import torch
from verl import DataProto
from verl.trainer.ppo.reward import get_custom_reward_fn, resolve_reward_manager_cls

from examples.quickstart.tiny_vlm import build_tokenizer
from tests.helpers import verl_config
from verl_gndpo.rewards import compute_score
from verl_gndpo.rewards.manager import RewardManager, use_reward_manager


def reward_of(response="\\boxed{5}", prompt=None, overrides=(), **columns):
    """Return the reward of a response in a row with these columns."""
    config = verl_config(*overrides)
    use_reward_manager(config)
    tokenizer = build_tokenizer()
    ids = torch.tensor([tokenizer(response, add_special_tokens=False)["input_ids"]])
    manager_class = resolve_reward_manager_cls(config)
    reward = get_custom_reward_fn(config) if overrides else compute_score
    manager = manager_class(config, tokenizer, reward)
    tensors = {"responses": ids, "attention_mask": torch.ones_like(ids)}
    if prompt is not None:
        tensors["prompts"] = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    others = {name: np.array([value], dtype=object) for name, value in columns.items()}
    data = DataProto.from_dict(tensors=tensors, non_tensors=others)

    async def run():
        manager.loop = asyncio.get_running_loop()
        return await manager.run_single(data)

    return asyncio.run(run())


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"data_source": "mine"},
        {"data_source": "mine", "reward_model": None},
        {"data_source": "mine", "reward_model": {"style": "rule"}},
        {"data_source": "hiyouga/geometry3k", "reward_model": {"ground_truth": None}, "extra_info": {}},
        {"data_source": "hiyouga/geometry3k", "reward_model": {"ground_truth": ""}, "extra_info": {}},
    ],
)
def test_a_row_without_an_answer_gets_no_accuracy(columns):
    assert reward_of(**columns) == {"reward_score": 0.0, "reward_extra_info": {}}


def test_a_row_with_an_answer_is_graded_as_before():
    row = {"data_source": "hiyouga/geometry3k", "reward_model": {"ground_truth": "5"}, "extra_info": {}}
    expected = compute_score("hiyouga/geometry3k", "\\boxed{5}", "5")
    found = reward_of(**row)
    assert found["reward_score"] == expected["score"]
    assert found["reward_extra_info"] == expected
    # A row names its answer type instead of a data source.
    named = row | {"extra_info": {"answer_type": "number"}}
    del named["data_source"]
    assert reward_of(**named)["reward_extra_info"]["acc"] == 1.0


@pytest.mark.parametrize(
    ("prompt", "response", "form", "accuracy"),
    [
        ("Question?<think>", "a</think>\\boxed{5}", 1.0, 1.0),
        ("Question?<think>\n\n", "a</think>\\boxed{5}", 1.0, 1.0),
        ("Question?<think>\n", "\n<think>a</think>\\boxed{5}", 1.0, 1.0),
        ("Question?", "a</think>\\boxed{5}", 0.0, 1.0),
        ("<think>a</think> Question?", "a</think>\\boxed{5}", 0.0, 1.0),
        ("Question?", "\n<think>a</think>\\boxed{5}", 1.0, 1.0),
        # It never stops thinking.
        ("Question?<think>\n", "a \\boxed{5}", 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("extra_info", [{}, {"extra_info": {"index": 3}}])
def test_the_format_is_that_of_prompt_and_response(prompt, response, form, accuracy, extra_info):
    row = {"data_source": "hiyouga/geometry3k", "reward_model": {"ground_truth": "5"}}
    found = reward_of(response, prompt, **row, **extra_info)["reward_extra_info"]
    assert (found["format"], found["acc"]) == (form, accuracy)


@pytest.mark.parametrize("prefix", ["", "<think>"])
def test_a_setting_names_the_prompts_tag_under_another_manager_of_verls(prefix):
    function = "reward.custom_reward_function"
    overrides = [
        "reward.reward_manager.name=dapo",
        f"{function}.path=pkg://verl_gndpo.rewards",
        f"{function}.name=compute_score",
        *([f"+{function}.reward_kwargs.response_prefix='{prefix}'"] if prefix else []),
    ]
    row = {"data_source": "hiyouga/geometry3k", "reward_model": {"ground_truth": "5"}, "extra_info": {}}
    found = reward_of("a</think>\\boxed{5}", overrides=overrides, **row)["reward_extra_info"]
    assert (found["format"], found["acc"]) == (float(bool(prefix)), 1.0)


def test_only_verls_default_manager_is_replaced():
    config = verl_config()
    use_reward_manager(config)
    assert issubclass(resolve_reward_manager_cls(config), RewardManager)
    other = verl_config("reward.reward_manager.name=dapo")
    use_reward_manager(other)
    assert (other.reward.reward_manager.source, other.reward.reward_manager.name) == ("register", "dapo")
