# SPDX-License-Identifier: Apache-2.0
"""The teacher on the architectures of tests/zoo.py, against plain forward passes of transformers' own classes."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata
from verl.utils import tensordict_utils as tu

from docs.make_models import OUTPUT, render
from tests import zoo
from tests.integration.helpers import as_batch, one_rank, start_actor, start_teacher, teacher_config
from tests.integration.test_teacher_engine import Ranks

TEMPERATURE = 0.7
RESPONSE_LENGTHS = [[3, 9, 1], [7], [5, 2]]
FAILS_IN_VERL = {
    "gemma3": "verl's actor attends causally within images",
    "gemma4": "verl's actor shards the embedding by itself, and the model reads a row of it from outside",
    "glm_moe_dsa": "transformers mixes the rows of a batch",
    "mistral3": "verl can't concatenate the images of different rows",
    "nemotron_h": "transformers mixes the rows of a batch",
    "qwen2_5_omni_thinker": "FSDP2 of verl's actor fails in the vision tower",
    "smolvlm": "verl can't concatenate the images of different rows",
}
"""Members that verl's own actor can't run, or not as they are: there is no student of their family to compare with."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Return a function that builds a member once."""
    built = {}

    def get(name):
        if name not in built:
            built[name] = zoo.build(name, tmp_path_factory.mktemp(name))
        return built[name]

    return get


def rows_of(name, path):
    """Return responses to three prompts, of which two have images if the model sees images."""
    return zoo.rows_of(path, [2, 0, 1] if name in zoo.IMAGE_FAMILIES else [0, 0, 0], RESPONSE_LENGTHS)


def score(name, path, rows, **settings):
    """Return the log-probs of a teacher worker on this process's rank, and the way in which it scores."""
    config = teacher_config(path, zoo.attention_of(name), temperature=TEMPERATURE, **settings)
    worker = start_teacher(config)
    scored = worker.compute_teacher_log_prob(as_batch(rows))["teacher_log_probs"].unbind()
    (model,) = worker.models.values()
    return [x.double() for x in scored], model.engine._scorer.sharing


def assert_close(scored, expected):
    for row, (ours, oracle) in enumerate(zip(scored, expected, strict=True)):
        assert (ours - oracle).abs().max() < 1e-4, f"row {row}"


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_teacher_scores_as_transformers_does(name, checkpoint):
    """Also with micro-batches so small that groups are cut, and with a row of padding that verl adds to a batch."""
    path = checkpoint(name)
    rows = rows_of(name, path)
    expected = zoo.plain_log_probs(path, rows, TEMPERATURE)
    # The oracle must depend on what it scores.
    assert torch.cat(expected).std() > 0.1
    with one_rank():
        scored, sharing = score(name, path, rows)
        assert_close(scored, expected)
        cut, _ = score(
            name, path, rows, sharing=sharing, max_token_len_per_gpu=max(len(row["ids"]) for row in rows) + 8
        )
        assert_close(cut, expected)


@pytest.mark.parametrize("name", sorted(zoo.IMAGE_FAMILIES))
def test_the_oracle_sees_images_and_positions(name, checkpoint):
    """Otherwise it could not notice a wrong one."""
    path = checkpoint(name)
    row = next(row for row in rows_of(name, path) if row["inputs"])
    other = {key: x.flip(-1) if key == "pixel_values" else x for key, x in row["inputs"].items()}
    place = row["positions"].clone()
    place[..., len(place.T) // 2 :] += 5
    (scored,) = zoo.plain_log_probs(path, [row], TEMPERATURE)
    for changed in ({"inputs": other}, {"positions": place}):
        (scored_otherwise,) = zoo.plain_log_probs(path, [row | changed], TEMPERATURE)
        assert (scored - scored_otherwise).abs().max() > 1e-3, changed.keys()


@pytest.mark.parametrize("name", [name for name in zoo.ZOO if name not in FAILS_IN_VERL])
def test_a_model_distilled_into_itself_gives_no_signal(name, checkpoint):
    """verl's own actor is the student."""
    path = checkpoint(name)
    rows = rows_of(name, path)
    with one_rank():
        teacher, _ = score(name, path, rows)
        worker = start_actor(path, packed=False, attention=zoo.attention_of(name))
        batch = as_batch(rows)
        batch["loss_mask"] = batch["response_mask"]
        tu.assign_non_tensor(batch, temperature=TEMPERATURE, calculate_entropy=False, compute_loss=False)
        whole = worker.infer_batch(batch)["log_probs"].unbind()
    # Each place has the log-prob of the next token.
    student = [scores[-len(row["response"]) - 1 : -1].double() for scores, row in zip(whole, rows, strict=True)]
    assert_close(teacher, student)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5", "gemma3", "gpt_oss", "deepseek_v3"])
def test_a_teacher_in_bfloat16_passes_its_self_check(name, checkpoint):
    path = checkpoint(name)
    rows = rows_of(name, path)
    expected = torch.cat(zoo.plain_log_probs(path, rows, TEMPERATURE))
    with one_rank():
        scored, _ = score(name, path, rows, dtype="bfloat16")
    difference = (torch.cat(scored) - expected).abs()
    assert 0 < difference.mean() < 0.25


def rows_with_video(path):
    """Return two responses to a prompt with a video of four frames, and one to a prompt of text."""
    processor = AutoProcessor.from_pretrained(path)
    frames = np.random.default_rng(0).integers(0, 255, (4, 3, 64, 64), np.uint8)
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    metadata = VideoMetadata(total_num_frames=4, fps=2.0, frames_indices=[0, 1, 2, 3])
    inputs = dict(
        processor(text=[text], videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt")
    )
    prompt = inputs.pop("input_ids")[0]
    inputs = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")}
    rows = []
    for response, seen in ((torch.arange(5, 12), inputs), (torch.arange(30, 33), inputs), (torch.arange(9, 14), {})):
        ids = torch.cat([prompt if seen else torch.arange(40, 60), response])
        place = torch.arange(len(ids))
        axes = torch.stack([place, place // 2, place % 7, place])
        rows.append({"ids": ids, "positions": axes, "inputs": dict(seen), "response": response})
    return rows


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_videos_are_scored_as_transformers_does(name, checkpoint):
    path = checkpoint(name)
    rows = rows_with_video(path)
    expected = zoo.plain_log_probs(path, rows, TEMPERATURE)
    black = {k: x * 0 if x.is_floating_point() else x for k, x in rows[0]["inputs"].items()}
    blind = [rows[0] | {"inputs": black}]
    unseen = zoo.plain_log_probs(path, blind, TEMPERATURE)
    assert (expected[0] - unseen[0]).abs().max() > 1e-3
    with one_rank():
        scored, _ = score(name, path, rows)
    assert_close(scored, expected)


def quantize_to_fp8(path, folder):
    """Copy a checkpoint with its projections in float8, as released ones have them; return it and its ordinary twin."""
    shutil.copytree(path, folder / "fp8")
    shutil.copytree(path, folder / "ordinary")
    weights = load_file(path / "model.safetensors")
    quantized, ordinary = {}, {}
    for name, weight in weights.items():
        quantized[name] = ordinary[name] = weight
        if name.endswith("proj.weight"):
            scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            quantized[name] = (weight / scale).to(torch.float8_e4m3fn)
            blocks = [-(-size // 128) for size in weight.shape]
            quantized[name.replace("weight", "weight_scale_inv")] = torch.full(blocks, float(scale))
            ordinary[name] = quantized[name].float() * scale
    for kind, tensors in (("fp8", quantized), ("ordinary", ordinary)):
        save_file(tensors, folder / kind / "model.safetensors", metadata={"format": "pt"})
    set_quantization(folder / "fp8", quant_method="fp8", weight_block_size=[128, 128], activation_scheme="dynamic")
    return folder / "fp8", folder / "ordinary"


def set_quantization(path, **settings):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def test_a_teacher_in_float8_is_loaded_as_an_ordinary_one(checkpoint, tmp_path):
    quantized, ordinary = quantize_to_fp8(checkpoint("qwen2_untied"), tmp_path)
    rows = rows_of("qwen2_untied", ordinary)
    with one_rank():
        scored, _ = score("qwen2_untied", quantized, rows)
    assert_close(scored, zoo.plain_log_probs(ordinary, rows, TEMPERATURE))


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_other_quantized_teachers_are_refused_with_the_reason(method, checkpoint, tmp_path):
    path = shutil.copytree(checkpoint("qwen3"), tmp_path / method)
    set_quantization(path, quant_method=method, bits=4)
    with one_rank(), pytest.raises(ValueError, match=rf"weights are quantized \({method}\).*ordinary weights only"):
        start_teacher(teacher_config(path))


@pytest.fixture(scope="module")
def two_ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3", "llava_next", "gpt_oss", "deepseek_v3", "glm_moe_dsa"])
def test_two_ranks_score_as_one(name, checkpoint, two_ranks):
    """One rank has no images, and the ranks have different numbers of prompts and passes."""
    path = checkpoint(name)
    rows = sorted(rows_of(name, path), key=lambda row: len(row["inputs"]))
    rows = [row | {"mask": torch.ones_like(row["response"]), "names": {}} for row in rows]
    assert len(rows) == 6
    settings = {"temperature": TEMPERATURE, "max_token_len_per_gpu": 4096}
    two_ranks("start", path, settings | {"attention_of_model": zoo.attention_of(name)})
    scored = two_ranks.score(rows)
    assert_close([torch.from_numpy(x).double() for x in scored], zoo.plain_log_probs(path, rows, TEMPERATURE))


def test_the_page_lists_every_member_as_it_is_scored(checkpoint):
    """`python docs/make_models.py` writes the page anew."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    assert OUTPUT.read_text() == render(checkpoint)
