# SPDX-License-Identifier: Apache-2.0
"""Which rows of the student run together: on a rank, and in a micro-batch."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta

from tests.helpers import verl_config
from tests.unit.packed import SHAPES, groups_of
from verl_gndpo.config import ConfigError, read_student_config
from verl_gndpo.student.micro_batches import numbered, plan_micro_batches, split_into
from verl_gndpo.student.placement import keep_prompts_together
from verl_gndpo.student.run import share_prompts, why_prompts_cannot_be_shared

ACTOR = "actor_rollout_ref.actor"


def lengths(groups) -> dict[int, tuple[int, int]]:
    """Return by row its prompt's and its response's length."""
    return {row: (g.prompt, n) for g in groups for row, n in zip(g.rows, g.responses, strict=True)}


@given(SHAPES, st.integers(1, 30), st.booleans(), st.data())
@settings(max_examples=100, deadline=None)
def test_micro_batches_hold_every_row_once_within_the_limit(shapes, limit, by_rows, data):
    groups = groups_of(shapes)
    images = [{}] * len(lengths(groups))
    limits = {"max_rows" if by_rows else "max_tokens": limit}
    batches = plan_micro_batches(groups, images, **limits)
    for batch in batches:
        rows = sum(len(group.rows) for group in batch)
        if by_rows:
            assert rows <= limit
        else:
            assert rows == 1 or sum(group.tokens for group in batch) <= limit
    count = data.draw(st.integers(len(batches), len(images)))
    more = split_into(batches, count)
    assert len(more) == count and all(more)
    for parts in (batches, more):
        found = [group for batch in parts for group in batch]
        assert sorted(row for group in found for row in group.rows) == list(range(len(images)))
        assert lengths(found) == lengths(groups)
    for batch in more:
        rows, own = numbered(batch)
        assert [row for group in own for row in group.rows] == list(range(len(rows)))


def test_a_rank_with_fewer_micro_batches_splits_between_prompts_first():
    groups = groups_of([(5, [1, 1]), (5, [1, 1])])
    assert [len(batch) for batch in split_into([groups], 2)] == [1, 1]
    halves = split_into([groups], 3)
    assert sorted(len(group.rows) for batch in halves for group in batch) == [1, 1, 2]


def batch_of(prompts: list[tuple[int, list[int]]]) -> KVBatchMeta:
    """Return the rows of prompts with these lengths of prompt and responses, response by response."""
    rows = [
        (f"p{p}_{r}_0", prompt, responses[r])
        for r in range(max(len(responses) for _, responses in prompts))
        for p, (prompt, responses) in enumerate(prompts)
        if r < len(responses)
    ]
    tags = [{"prompt_len": prompt, "response_len": n, "seq_len": prompt + n} for _, prompt, n in rows]
    return KVBatchMeta(keys=[key for key, *_ in rows], tags=tags, partition_id="train", fields=[], extra_info={})


def ranks_of(batch: KVBatchMeta, ranks: int) -> list[set[str]]:
    size = len(batch.keys) // ranks
    return [{key.split("_")[0] for key in batch.keys[r * size : (r + 1) * size]} for r in range(ranks)]


def test_the_rows_of_a_prompt_are_on_one_rank_and_the_work_is_balanced():
    # By whole sequences, the long prompts would cost most; by what runs, the long responses do.
    batch = batch_of([(1000, [10] * 4), (1000, [10] * 4), (10, [300] * 4), (10, [300] * 4)])
    assert keep_prompts_together(batch, 2) == 0
    one, other = ranks_of(batch, 2)
    assert one | other == {"p0", "p1", "p2", "p3"} and not one & other
    assert len(one & {"p0", "p1"}) == 1
    assert [tag["seq_len"] for tag in batch.tags] == [
        {"p0": 1010, "p1": 1010, "p2": 310, "p3": 310}[key.split("_")[0]] for key in batch.keys
    ]


def test_fewer_prompts_than_ranks_are_split_and_the_log_says_so(caplog):
    batch = batch_of([(9, [1] * 8)])
    with caplog.at_level(logging.WARNING):
        assert keep_prompts_together(batch, 2) == 1
    assert "1 of 1 prompts are on several of the 2 ranks" in caplog.text


def test_without_the_setting_the_config_stays_as_it_is():
    config = verl_config("algorithm.adv_estimator=grpo")
    before = OmegaConf.to_yaml(config)
    assert not share_prompts(config)
    assert OmegaConf.to_yaml(config) == before


def test_the_engine_comes_in_by_verls_own_settings():
    config = verl_config("algorithm.adv_estimator=grpo", "+student.share_prompts=True", "+student.attention=flex")
    assert share_prompts(config)
    section = config.actor_rollout_ref
    assert section.model.model_type == "gndpo_student"
    for engine in (section.actor.fsdp_config, section.ref.fsdp_config):
        assert engine._target_ == "verl_gndpo.student.engine.StudentEngineConfig"
        assert (engine.logits_chunk_tokens, engine.attention) == (256, "flex")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        (f"{ACTOR}.strategy=megatron", "has no engine that shares prompts"),
        (f"{ACTOR}.ulysses_sequence_parallel_size=2", "spreads a sequence over ranks"),
        ("actor_rollout_ref.model.use_fused_kernels=True", "replaces the output projection"),
        (f"{ACTOR}.pad_to_length=True", "pads micro-batches"),
        ("trainer.use_v1=False", "verl's old trainer"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_its_key(override, reason):
    config = verl_config("+student.share_prompts=True")
    OmegaConf.set_struct(config, False)
    key, _, value = override.partition("=")
    OmegaConf.update(config, key, OmegaConf.from_dotlist([f"x={value}"]).x)
    (problem,) = why_prompts_cannot_be_shared(config)
    assert key in str(problem) and reason in str(problem) and problem.remedy.startswith(f"{key}=")
    with pytest.raises(ConfigError):
        share_prompts(config)


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown key student\.share_prompt; did you mean student\.share_prompts"):
        read_student_config(verl_config("+student.share_prompt=True"))
