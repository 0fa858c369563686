# SPDX-License-Identifier: Apache-2.0
"""The teacher worker, under Ray and FSDP2 with one and two gloo ranks, against a plain Hugging Face forward."""

from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from PIL import Image
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

from verl_gndpo.config import TeacherConfig, TeacherModelConfig
from verl_gndpo.signal import log_ratio_advantages
from verl_gndpo.teacher.worker import TeacherWorker

TEMPERATURE = 0.7
IMAGES_PER_PROMPT = [1, 0, 2, 1, 0, 1, 3, 1]
RESPONSE_LENGTHS = [[5, 2, 11], [9], [1, 1], [12], [3, 6, 3, 8], [7], [4, 10], [12, 1]]


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory):
    from examples.quickstart.tiny_vlm import build_tiny_vlm

    path = tmp_path_factory.mktemp("teacher")
    build_tiny_vlm(path, seed=3)
    return path


@pytest.fixture(scope="module")
def rows(teacher_path):
    """One to four responses to prompts with no, one and several images of different sizes, in mixed order; each row
    {ids, inputs, response}."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(teacher_path)
    rng = np.random.default_rng(0)
    rows = []
    for n_images, response_lengths in zip(IMAGES_PER_PROMPT, RESPONSE_LENGTHS, strict=True):
        images = [
            Image.fromarray(rng.integers(0, 255, (28 * rng.integers(1, 4), 28 * rng.integers(1, 4), 3), np.uint8))
            for _ in range(n_images)
        ]
        content = [{"type": "image"}] * n_images + [{"type": "text", "text": "how many? " * int(rng.integers(1, 6))}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = dict(processor(text=[text], images=images or None, return_tensors="pt"))
        prompt = inputs.pop("input_ids")[0]
        inputs.pop("attention_mask")
        for response_length in response_lengths:
            # Ordinary text tokens: the special ones stand at the end of the vocabulary.
            response = torch.from_numpy(rng.integers(0, 200, response_length))
            # Each row brings a copy of the images, as verl's rows do.
            copies = {name: value.clone() for name, value in inputs.items()}
            rows.append({"ids": torch.cat([prompt, response]), "inputs": copies, "response": response})
    return [rows[i] for i in rng.permutation(len(rows))]


@pytest.fixture(scope="module")
def expected(teacher_path, rows):
    """Log-probs of the response tokens: each row alone, through Hugging Face's own forward, with all its logits."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(teacher_path, attn_implementation="eager").eval()
    log_probs = []
    for row in rows:
        inputs = {k: v for k, v in row["inputs"].items() if k != "mm_token_type_ids"}
        ids = row["ids"][None]
        kinds = (ids == model.config.image_token_id).int()
        positions, _ = model.model.get_rope_index(
            ids, mm_token_type_ids=kinds, image_grid_thw=inputs.get("image_grid_thw")
        )
        row["positions"] = torch.cat([torch.arange(ids.shape[1])[None], positions[:, 0]])
        with torch.no_grad():
            logits = model(input_ids=ids, mm_token_type_ids=kinds, **inputs).logits[0].double() / TEMPERATURE
        scores = logits[:-1].log_softmax(-1).gather(-1, row["ids"][1:, None])[:, 0]
        log_probs.append(scores[-len(row["response"]) :])
    return log_probs


def nested(tensors, ragged_idx=1):
    if ragged_idx == 1:
        return torch.nested.as_nested_tensor(list(tensors), layout=torch.jagged)
    from verl.utils.tensordict_utils import nested_tensor_from_tensor_list

    return nested_tensor_from_tensor_list(list(tensors), ragged_idx=ragged_idx)


def as_batch(rows):
    ones = [torch.ones_like(row["response"]) for row in rows]
    return TensorDict(
        {
            "input_ids": nested(row["ids"] for row in rows),
            "position_ids": nested((row["positions"] for row in rows), ragged_idx=2),
            "response_mask": nested(ones),
            "multi_modal_inputs": NonTensorStack(*[row["inputs"] for row in rows]),
        },
        batch_size=len(rows),
    )


@pytest.fixture(scope="module")
def start(teacher_path):
    """A function that starts a group of teacher workers: (ranks, settings) -> worker group."""
    ray.init(num_cpus=32, num_gpus=3, include_dashboard=False, object_store_memory=200_000_000)
    base = TeacherConfig(
        model=TeacherModelConfig(path=str(teacher_path), override_config={"attn_implementation": "sdpa"}),
        temperature=TEMPERATURE,
        max_token_len_per_gpu=4096,
    )

    def start_group(ranks, **settings):
        group = RayWorkerGroup(
            resource_pool=RayResourcePool([ranks], use_gpu=True, max_colocate_count=4),
            ray_cls_with_init=RayClassWithInitArgs(cls=ray.remote(TeacherWorker), config=replace(base, **settings)),
            device_name="cpu",
        )
        group.reset()
        return group

    yield start_group
    ray.shutdown()


def assert_equal_to(expected, scored):
    scored = scored["teacher_log_probs"]
    assert scored.values().dtype == torch.float32
    for row, (ours, reference) in enumerate(zip(scored.unbind(), expected, strict=True)):
        torch.testing.assert_close(
            ours.double(), reference, atol=1e-4, rtol=0, msg=lambda m, row=row: f"row {row}: {m}"
        )


def test_two_ranks_small_micro_batches_equal_one_rank_and_hugging_face(start, rows, expected):
    """Chunks and micro-batches small and large, prompts split between them and between ranks or not: one result."""
    batch = as_batch(rows)
    split = start(2, logits_chunk_tokens=3, max_token_len_per_gpu=80).compute_teacher_log_prob(batch.clone())
    group = start(1)
    whole = group.compute_teacher_log_prob(batch.clone())
    assert_equal_to(expected, split)
    assert_equal_to(expected, whole)

    # So the statistics of the signal are global: the same advantages whatever the ranks and micro-batches.
    mask = nested([torch.ones_like(row["response"]) for row in rows]).to_padded_tensor(0)
    old = -torch.rand(mask.shape, generator=torch.Generator().manual_seed(0))
    one, two = (
        log_ratio_advantages(x["teacher_log_probs"].to_padded_tensor(0.0), old, mask)[0] for x in (whole, split)
    )
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)

    # All rows of one length, where stock verl repacks mRoPE positions wrongly.
    same = [rows[3]] * 2
    assert_equal_to([expected[3]] * 2, group.compute_teacher_log_prob(as_batch(same)))

    # One image too few for its placeholders names the row and both numbers, and nothing is scored.
    broken = [dict(row) for row in rows[:2]]
    broken[0]["inputs"] = {}
    with pytest.raises(Exception, match=r"row 0: \d+ image tokens in its ids but images for 0"):
        group.compute_teacher_log_prob(as_batch(broken))


@pytest.fixture
def stock_forwards(monkeypatch):
    """verl replaces the forward of these classes in a worker's process; here that is the process of all tests."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    for module, prefix in ((modeling_qwen2_5_vl, "Qwen2_5_VL"), (modeling_qwen2_vl, "Qwen2VL")):
        for name in ("Model", "ForConditionalGeneration"):
            model = getattr(module, prefix + name)
            monkeypatch.setattr(model, "forward", model.forward)


def test_the_worker_holds_no_optimizer_and_encodes_an_image_once(teacher_path, rows, expected, stock_forwards):
    """In this process, on one rank: what is inside the worker, and what runs."""
    import os
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "RAY_LOCAL_WORLD_SIZE": "1"}
    before = dict(os.environ)
    os.environ.update(env)
    try:
        worker = TeacherWorker(
            TeacherConfig(
                model=TeacherModelConfig(path=str(teacher_path), override_config={"attn_implementation": "sdpa"}),
                temperature=TEMPERATURE,
                max_token_len_per_gpu=4096,
            )
        )
        worker.reset()
        assert worker.engine.optimizer is None and worker.engine.lr_scheduler is None
        assert not any(p.requires_grad for p in worker.engine.module.parameters())
        assert not worker.engine.module.training

        # Each prompt and each image once for all responses, each response once, and no padding.
        patches, tokens = [], []
        model = worker.engine.module.model
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

        # The same words about another picture are another prompt: nothing is shared, and nothing mixed up.
        one = next(row for row in rows if len(row["inputs"].get("image_grid_thw", ())) == 1)
        darker = one | {"inputs": one["inputs"] | {"pixel_values": one["inputs"]["pixel_values"] - 1}}
        scored = worker.compute_teacher_log_prob(as_batch([one, darker]))["teacher_log_probs"].unbind()
        alone = worker.compute_teacher_log_prob(as_batch([darker]))["teacher_log_probs"].unbind()
        torch.testing.assert_close(scored[1], alone[0], atol=1e-5, rtol=0)
        assert (scored[0] - scored[1]).abs().max() > 1e-3
    finally:
        torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)
