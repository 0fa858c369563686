# SPDX-License-Identifier: Apache-2.0
"""Shared by the doctor's tests: files to check, and what is expected of findings."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data_files import picture

CPU_RUN = (
    "algorithm.adv_estimator=gndpo",
    "+gndpo=default",
    "+teacher=worker",
    "actor_rollout_ref.actor.policy_loss.loss_mode=gspo",
    "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean",
    "actor_rollout_ref.actor.use_dynamic_bsz=True",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.n=2",
    "actor_rollout_ref.rollout.load_format=auto",
    "actor_rollout_ref.rollout.free_cache_engine=False",
    "+actor_rollout_ref.rollout.enable_sleep_mode=False",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    "data.train_batch_size=4",
    "trainer.device=cpu",
    "trainer.n_gpus_per_node=1",
    "+ray_kwargs.ray_init.num_gpus=1",
)


IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


PROMPT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def write(path, rows, *, image_type=IMAGES, drop=()):
    """Write a parquet file of (prompt text, number of images)."""
    image = {"bytes": picture(), "path": "a.png"}
    if image_type != IMAGES:
        image = "a.png"
    columns = {
        "prompt": pa.array([[{"role": "user", "content": text}] for text, _ in rows], PROMPT),
        "images": pa.array([[image] * count for _, count in rows], image_type),
    }
    table = pa.table({name: column for name, column in columns.items() if name not in drop})
    # As data_prep writes them; also keeps the pages of a column of bytes findable.
    pq.write_table(table, path, compression="none", use_dictionary=False)
    return path


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def errors(checks):
    return [check for check in checks if check.status == "error"]


def expect(checks, status, *words):
    """Exactly one finding of that status holds all the words, in its detail or remedy."""
    found = [c for c in checks if c.status == status and all(w in f"{c.detail} -> {c.remedy}" for w in words)]
    assert len(found) == 1, "\n".join(f"{c.status} {c.name}: {c.detail} -> {c.remedy}" for c in checks)
    return found[0]


SERVER = ("teacher.backend=server", "teacher.n_gpus_per_node=2", "teacher.temperature=1.0")


def write_sources(path, sources, *, answer="1", **extra_info):
    columns = {"data_source": sources, "reward_model": [{"ground_truth": answer}] * len(sources)}
    columns |= {"extra_info": [extra_info] * len(sources)} if extra_info else {}
    pq.write_table(pa.table(columns), path)


OURS = (
    "reward.custom_reward_function.path=pkg://verl_gndpo.rewards",
    "reward.custom_reward_function.name=compute_score",
)


def length(folder):
    """Number of tokens of a folder's tokenizer."""
    content = json.loads((folder / "tokenizer.json").read_text())
    return max([*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])]) + 1
