# SPDX-License-Identifier: Apache-2.0
"""The real loop with an InternVL3.5 student and teacher, on prompts with no image, with one, and with two."""

import io
import multiprocessing
import socket
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoProcessor, InternVLProcessor
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils import hf_processor, hf_tokenizer
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.fsdp_utils import apply_fsdp2
from verl.utils.model import extract_multi_modal_inputs
from verl.workers.rollout.utils import qwen2_5_vl_dedup_image_tokens

from tests.end_to_end.harness import Run, overrides, settings
from tests.end_to_end.test_training import assert_healthy, assert_moved, reference_log_probs
from tests.integration.helpers import load, stock_transformers
from tests.tiny_internvl import build_tiny_internvl


@pytest.fixture(scope="module")
def internvl(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("internvl")
    build_tiny_internvl(path / "student", seed=0)
    build_tiny_internvl(path / "teacher", seed=1, layers=3)
    return path


@pytest.fixture(scope="module")
def mixed(dice, tmp_path_factory) -> Path:
    """The quickstart's problems; of three one without its image, one with it, one with a stretched copy before it."""
    path = tmp_path_factory.mktemp("mixed")
    for name in ("train", "test"):
        rows = pd.read_parquet(dice / f"{name}.parquet").head(96)
        for i, row in rows.iterrows():
            text = row["prompt"][0]["content"]
            if i % 3 == 0:
                rows.at[i, "images"] = []
                text = text.removeprefix("<image>")
            elif i % 3 == 1:
                # Three tiles and a thumbnail if nothing bounds them.
                rows.at[i, "images"] = [stretched(row["images"][0]), *row["images"]]
                text = "<image>" + text
            rows.at[i, "prompt"] = [{"role": "user", "content": text}]
        rows.to_parquet(path / f"{name}.parquet")
    return path


def stretched(image: dict) -> dict:
    wide = Image.open(io.BytesIO(image["bytes"])).resize((168, 56))
    sink = io.BytesIO()
    wide.save(sink, "PNG")
    return {"bytes": sink.getvalue(), "path": None}


@pytest.fixture(scope="module")
def run(internvl, mixed, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    # Micro-batches of one or two rows, so that some of them are without an image.
    small = {"BATCH": "8", "N": "2", "TOKENS_PER_GPU": "160"}
    arguments = overrides(2, out / "checkpoints", "trainer.save_freq=2", "trainer.resume_mode=disable")
    # All parts of a run must cut the stretched image in the same way: into two tiles and the thumbnail.
    arguments.append("+data.mm_processor_kwargs.max_patches=2")
    return Run(out / "run", settings(internvl, mixed, **small), arguments, "run_internvl3_5_gndpo.sh").finish()


def tiles(row: dict) -> int:
    return len(row["multi_modal_inputs"].get("pixel_values", ()))


def test_every_step_is_healthy(run):
    assert_healthy(run, [1, 2])


def test_rows_hold_the_tiles_that_their_prompts_speak_of(run, internvl):
    processor = AutoProcessor.from_pretrained(internvl / "student")
    for step in (1, 2):
        rows = run.captured(step)
        assert {tiles(row) for row in rows} == {0, 1, 4}
        for row in rows:
            is_image = row["input_ids"] == processor.image_token_id
            assert is_image.sum() == tiles(row) * processor.image_seq_length
            assert not is_image[-len(row["response_mask"]) :].any()
            assert torch.equal(row["position_ids"], torch.arange(len(row["input_ids"])))


def test_teacher_and_student_log_probs_are_those_of_hugging_face(run, internvl):
    rows = run.captured(1)
    for row in (next(row for row in rows if tiles(row) == count) for count in (0, 1, 4)):
        for key, name in (("teacher_log_probs", "teacher"), ("old_log_probs", "student")):
            np.testing.assert_allclose(row[key].numpy(), reference_log_probs(internvl / name, row), atol=1e-4, rtol=0)
    # By then the student has moved, and its second answers were sampled by what vLLM has been sent.
    assert_moved([row for row in run.captured(2) if tiles(row) == 4], internvl / "student")


def test_rollouts_differ_from_the_actor_by_the_ban_of_placeholders_only(run, internvl):
    """verl bans `<IMG_CONTEXT>` and `<video>` while vLLM samples; all other tokens gain what these would have had."""
    model, processor = load(internvl / "student"), AutoProcessor.from_pretrained(internvl / "student")
    banned = processor.tokenizer.convert_tokens_to_ids([processor.image_token, processor.video_token])
    gains = []
    for row in run.captured(1):
        inputs = {key: row["multi_modal_inputs"][key] for key in ("pixel_values",) if tiles(row)}
        with torch.no_grad():
            probs = model(input_ids=row["input_ids"][None], **inputs).logits[0].double().softmax(-1)
        share = probs[:-1][-len(row["response_mask"]) :, banned].sum(-1)
        gains.append(-torch.log1p(-share)[row["response_mask"] != 0])
    # A banned token alone accounts for 2e-4; rounding for 2e-8, measured.
    assert run.steps[0]["rollout_corr/kl"] == pytest.approx(torch.cat(gains).mean().item(), abs=5e-6)


def test_the_vision_tower_is_frozen_and_the_rest_is_not(run, internvl):
    before = load(internvl / "student").state_dict()
    after = run.weights(2)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in changed if "vision_tower" in name]
    assert {name.split(".")[1] for name in changed} == {"language_model", "multi_modal_projector", "weight"}


def test_the_checkpoint_keeps_the_processor(run):
    saved = run.out.parent / "checkpoints" / "global_step_2" / "actor" / "huggingface"
    assert isinstance(AutoProcessor.from_pretrained(saved), InternVLProcessor)


def test_prompts_are_measured_with_their_tiles(internvl, mixed, tmp_path):
    tokenizer, processor = hf_tokenizer(str(internvl / "student")), hf_processor(str(internvl / "student"))
    lengths = []
    for _, row in pd.read_parquet(mixed / "test.parquet").iterrows():
        chat = [{"role": "user", "content": row["prompt"][0]["content"].replace("<image>", "\n")}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        cut = [0, 1, 1 + 4][len(row["images"])]
        frames = 2 * len(row["images"])
        lengths.append(len(tokenizer(text)["input_ids"]) + cut * processor.image_seq_length + frames)
    limit = int(np.median(lengths))
    config = {"max_prompt_length": limit, "filter_overlong_prompts": True, "filter_overlong_prompts_workers": None}
    config = OmegaConf.create(config | {"cache_dir": str(tmp_path)})
    kept = RLHFDataset(str(mixed / "test.parquet"), tokenizer, config, processor=processor)
    assert len(kept) == sum(length <= limit for length in lengths) < len(lengths)


@pytest.mark.parametrize("options", [{}, {"max_patches": 2}], ids=["stock", "bounded"])
@pytest.mark.parametrize("widths", [[56], [168], [56, 168], [168, 168]])
def test_vllm_expands_what_it_is_sent_to_the_ids_and_tiles_of_the_actor(internvl, widths, options):
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY

    path = str(internvl / "student")
    ours = hf_processor(path)
    theirs = MULTIMODAL_REGISTRY.create_processor(ModelConfig(model=path, dtype="float32", max_model_len=512))
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (56, width, 3), np.uint8)) for width in widths]
    expected = ours(text=["<IMG_CONTEXT>\n" * len(images) + "?"], images=images, return_tensors="pt", **options)
    ids = expected["input_ids"][0].tolist()

    sent = qwen2_5_vl_dedup_image_tokens(ids, ours)
    assert sent.count(ours.image_token_id) == len(images)
    items = theirs.info.parse_mm_data({"image": images})
    seen = theirs(sent, mm_items=items, hf_processor_mm_kwargs=options)
    assert seen["prompt_token_ids"] == ids
    assert torch.equal(seen["mm_kwargs"].get_data()["pixel_values"], expected["pixel_values"])


def test_packed_rows_are_scored_like_rows_alone(internvl):
    """verl's `use_remove_padding=True`: one row of all tokens, whose positions begin anew with each sequence."""
    processor = AutoProcessor.from_pretrained(internvl / "student")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (56, width, 3), np.uint8)) for width in (168, 56)]
    rows = [
        dict(processor(text=["<IMG_CONTEXT>\nHow many?"], images=images[:1], return_tensors="pt")),
        dict(processor(text=["What is it?"], return_tensors="pt")),
        dict(processor(text=["Count: <IMG_CONTEXT>"], images=images[1:], return_tensors="pt")),
    ]
    model = load(internvl / "student")
    with stock_transformers(), torch.no_grad():
        alone = torch.cat([model(**row).logits[0] for row in rows])
        apply_monkey_patch(model, use_remove_padding=True)
        packed = model(
            input_ids=torch.cat([row["input_ids"][0] for row in rows])[None],
            position_ids=torch.cat([torch.arange(row["input_ids"].shape[1]) for row in rows])[None],
            **extract_multi_modal_inputs([{"pixel_values": row.get("pixel_values")} for row in rows]),
            use_cache=False,
        ).logits[0]
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=0)


def backward_on_rank(rank: int, port: int, path: Path, inputs: list[dict], gradients) -> None:
    """One of `len(inputs)` FSDP2 ranks: send the gradients of the mean over all ranks' losses from rank 0."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    # Ranks that wait for different weights end soon and with an error.
    torch.distributed.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=len(inputs), timeout=timedelta(seconds=60)
    )
    model = load(path)
    apply_monkey_patch(model, use_remove_padding=False)
    apply_fsdp2(model, {"mesh": init_device_mesh("cpu", (len(inputs),))}, {})
    model(**inputs[rank]).logits.square().mean().backward()
    whole = {name: parameter.grad.full_tensor().numpy() for name, parameter in model.named_parameters()}
    if rank == 0:
        gradients.put(whole)
    torch.distributed.destroy_process_group()


def test_a_rank_without_images_runs_the_tower_beside_one_with_images(internvl):
    processor = AutoProcessor.from_pretrained(internvl / "student")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 112, 3), np.uint8))
    inputs = [
        dict(processor(text=["<IMG_CONTEXT>How many?"], images=[image], return_tensors="pt")),
        dict(processor(text=["How many?"], return_tensors="pt")),
    ]
    model = load(internvl / "student")
    torch.stack([model(**row).logits.square().mean() for row in inputs]).mean().backward()

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    gradients = context.Queue()
    arguments = (port, internvl / "student", inputs, gradients)
    ranks = [context.Process(target=backward_on_rank, args=(rank, *arguments), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    sharded = gradients.get(timeout=180)
    for rank in ranks:
        rank.join(timeout=60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert sharded.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(sharded[name], parameter.grad.numpy(), atol=1e-4, rtol=1e-4, err_msg=name)
