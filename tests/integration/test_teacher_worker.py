# SPDX-License-Identifier: Apache-2.0
"""The teacher worker, under Ray and FSDP2 with one and two gloo ranks, against a plain Hugging Face forward."""

import pytest
import ray
import torch
from tensordict import TensorDict
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

from examples.quickstart.tiny_vlm import build_tiny_vlm
from tests.integration.helpers import (
    as_batch,
    assert_equal_to,
    hugging_face_log_probs,
    make_rows,
    nested,
    one_rank,
    start_teacher,
    teacher_config,
)
from verl_gndpo.advantage import compute_advantages
from verl_gndpo.config import read_signal_config
from verl_gndpo.teacher import worker as worker_module
from verl_gndpo.teacher.worker import TeacherWorker

TEMPERATURE = 0.7
IMAGES_PER_PROMPT = [1, 0, 2, 1, 0, 1, 3, 1]
RESPONSE_LENGTHS = [[5, 2, 11], [9], [1, 1], [12], [3, 6, 3, 8], [7], [4, 10], [12, 1]]


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory):
    return build_tiny_vlm(tmp_path_factory.mktemp("teacher"), seed=3)


@pytest.fixture(scope="module")
def rows(teacher_path):
    """Make one to four responses to prompts with no, one and several images."""
    return make_rows(teacher_path, IMAGES_PER_PROMPT, RESPONSE_LENGTHS)


@pytest.fixture(scope="module")
def expected(teacher_path, rows):
    return hugging_face_log_probs(teacher_path, rows, TEMPERATURE)


@pytest.fixture(scope="module")
def start(teacher_path):
    """Return a function that starts a group of teacher workers: (ranks, settings) -> worker group."""
    ray.init(num_cpus=32, num_gpus=3, include_dashboard=False, object_store_memory=200_000_000)

    def start_group(ranks, **settings):
        config = teacher_config(teacher_path, temperature=TEMPERATURE, **settings)
        group = RayWorkerGroup(
            resource_pool=RayResourcePool([ranks], use_gpu=True, max_colocate_count=4),
            ray_cls_with_init=RayClassWithInitArgs(cls=ray.remote(TeacherWorker), config=config),
            device_name="cpu",
        )
        group.reset()
        return group

    yield start_group
    ray.shutdown()


def test_two_ranks_small_micro_batches_equal_one_rank_and_hugging_face(start, rows, expected):
    """Chunks and micro-batches may be small or large, prompts split between them and between ranks or not, and the
    attention sdpa or flex: the result is the same."""
    batch = as_batch(rows)
    small = {"logits_chunk_tokens": 3, "max_token_len_per_gpu": 80, "attention": "flex"}
    split = start(2, **small).compute_teacher_log_prob(batch.clone()).get()
    group = start(1)
    whole = group.compute_teacher_log_prob(batch.clone()).get()
    assert_equal_to(expected, split)
    assert_equal_to(expected, whole)

    # Therefore advantages do not depend on ranks and micro-batches either.
    mask = nested([torch.ones_like(row["response"]) for row in rows]).to_padded_tensor(0)
    old = -torch.rand(mask.shape, generator=torch.Generator().manual_seed(0))
    signal = read_signal_config(None, "gndpo").signal
    one, two = (
        compute_advantages(x["teacher_log_probs"].to_padded_tensor(0.0), old, mask, signal) for x in (whole, split)
    )
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)

    # Stock verl repacks mRoPE positions wrongly if all rows have one length.
    same = [rows[3]] * 2
    assert_equal_to([expected[3]] * 2, group.compute_teacher_log_prob(as_batch(same)).get())

    # A row with fewer images than placeholders is named with both numbers, and nothing is scored.
    broken = [dict(row) for row in rows[:2]]
    broken[0]["inputs"] = {}
    with pytest.raises(Exception, match=r"row 0: \d+ image tokens in its ids but images for 0"):
        group.compute_teacher_log_prob(as_batch(broken)).get()


def test_the_ranks_wait_as_long_as_they_are_told(teacher_path):
    """verl's own worker takes torch's default, half an hour for gloo, whatever `nccl_timeout` says."""
    for given, seconds in (({}, 600), ({"nccl_timeout": 77}, 77)):
        with one_rank():
            start_teacher(teacher_config(teacher_path, **given))
            group = torch.distributed.distributed_c10d._get_default_group()
            assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == seconds


@pytest.mark.parametrize(
    ("section", "frees"),
    [
        ({"fsdp": {"param_offload": False}}, True),
        # The offload does.
        ({}, False),
        # Nothing else is on its GPUs, and it is faster with its cache.
        ({"placement": "dedicated", "n_gpus_per_node": 1}, False),
    ],
)
def test_the_cache_of_scoring_is_freed_before_the_rollout_engine_wakes_up(
    teacher_path, rows, monkeypatch, section, frees
):
    """Once per call, after the last pass and when the scores have left the GPU."""
    events = []

    class Device:
        """The module of an accelerator."""

        @staticmethod
        def empty_cache() -> None:
            events.append("freed")

    monkeypatch.setattr(worker_module, "get_torch_device", lambda: Device)
    with one_rank():
        worker = start_teacher(teacher_config(teacher_path, self_check=False, **section))
        engine = next(iter(worker.models.values())).engine
        engine.module.register_forward_hook(lambda *_: events.append("pass"))
        move = TensorDict.cpu
        monkeypatch.setattr(TensorDict, "cpu", lambda self: events.append("moved") or move(self))
        scored = worker.compute_teacher_log_prob(as_batch(rows[:3]))
    assert len(scored) == 3
    passes = events.count("pass")
    assert passes and events == ["pass"] * passes + ["moved"] + ["freed"] * frees


def test_the_worker_holds_no_optimizer_and_encodes_an_image_once(teacher_path, rows, expected):
    """On one rank in this process, where the worker's modules can be watched."""
    with one_rank():
        # The self-check would be one more forward pass.
        worker = start_teacher(teacher_config(teacher_path, temperature=TEMPERATURE, self_check=False))
        engine = next(iter(worker.models.values())).engine
        assert engine.optimizer is None and engine.lr_scheduler is None
        assert not any(p.requires_grad for p in engine.module.parameters())
        assert not engine.module.training

        # Each prompt and each image runs once for all responses, each response runs once, and there is no padding.
        patches, tokens = [], []
        model = engine.module.model
        model.visual.patch_embed.register_forward_pre_hook(lambda module, inputs: patches.append(len(inputs[0])))
        model.language_model.layers[0].mlp.register_forward_pre_hook(
            lambda module, inputs: tokens.append(inputs[0].shape[:-1].numel())
        )
        assert_equal_to(expected, worker.compute_teacher_log_prob(as_batch(rows)))
        prompts = {}
        for row in rows:
            picture = row["inputs"].get("pixel_values", torch.zeros(0)).numpy().tobytes()
            prompts[tuple(row["ids"][: -len(row["response"])].tolist()), picture] = row
        assert len(prompts) < len(rows)
        assert sum(tokens) == sum(len(ids) for ids, _ in prompts) + sum(map(sum, RESPONSE_LENGTHS))
        grids = [row["inputs"]["image_grid_thw"] for row in prompts.values() if "image_grid_thw" in row["inputs"]]
        assert sum(patches) == sum(int(grid.prod(-1).sum()) for grid in grids)

        # The same words about another picture are another prompt, with which nothing is shared.
        one = next(row for row in rows if len(row["inputs"].get("image_grid_thw", ())) == 1)
        darker = one | {"inputs": one["inputs"] | {"pixel_values": one["inputs"]["pixel_values"] - 1}}
        scored = worker.compute_teacher_log_prob(as_batch([one, darker]))["teacher_log_probs"].unbind()
        alone = worker.compute_teacher_log_prob(as_batch([darker]))["teacher_log_probs"].unbind()
        torch.testing.assert_close(scored[1], alone[0], atol=1e-4, rtol=0)
        assert (scored[0] - scored[1]).abs().max() > 1e-3
