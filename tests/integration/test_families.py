# SPDX-License-Identifier: Apache-2.0
"""Teacher and student of every model family, each on one gloo rank in this process, against plain Hugging Face."""

import pytest
import torch
from verl.utils import tensordict_utils as tu

from tests.integration.helpers import (
    as_batch,
    assert_equal_to,
    hugging_face_log_probs,
    make_rows,
    one_rank,
    start_actor,
    start_teacher,
    teacher_config,
)
from tests.tiny_models import FAMILIES, build_tiny

TEMPERATURE = 0.7
RESPONSE_LENGTHS = [[5, 2, 11], [9], [1, 1], [12], [3, 6, 8]]
IMAGES_PER_PROMPT = [1, 0, 2, 1, 0]
TEXT_ONLY = ("qwen2", "qwen3")
FIRST_LAYERS_OF_TOWERS = {
    "qwen2_5_vl": "model.visual.patch_embed",
    "qwen3_vl": "model.visual.patch_embed",
    "internvl": "model.vision_tower.embeddings",
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def path(family, tmp_path_factory):
    return build_tiny(family, tmp_path_factory.mktemp(family), seed=3)


@pytest.fixture(scope="module")
def rows(family, path):
    """Make responses to prompts with no, one and two images, and one to another prompt that shares an image."""
    rows = make_rows(path, [0] * 5 if family in TEXT_ONLY else IMAGES_PER_PROMPT, RESPONSE_LENGTHS)
    one = next(row for row in rows if family in TEXT_ONLY or row["inputs"])
    ids = one["ids"].clone()
    ids[-len(one["response"]) - 1] += 1
    return [*rows, one | {"ids": ids, "inputs": {name: value.clone() for name, value in one["inputs"].items()}}]


@pytest.fixture(scope="module")
def expected(path, rows):
    return hugging_face_log_probs(path, rows, TEMPERATURE)


@pytest.fixture(scope="module")
def scored(family, path, rows):
    """Score all rows together and each row alone, and count the inputs of the vision tower in the first case."""
    seen = []
    with one_rank():
        worker = start_teacher(teacher_config(path, temperature=TEMPERATURE))
        if family not in TEXT_ONLY:
            (model,) = worker.models.values()
            first = model.engine.module.get_submodule(FIRST_LAYERS_OF_TOWERS[family])
            # The first call checks itself with a plain forward pass.
            worker.compute_teacher_log_prob(as_batch(rows[:1]))
            first.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        together = worker.compute_teacher_log_prob(as_batch(rows))
        encoded = sum(seen)
        alone = [worker.compute_teacher_log_prob(as_batch([row]))["teacher_log_probs"].unbind()[0] for row in rows]
    return together, alone, encoded


def test_the_teacher_scores_as_hugging_face(expected, scored):
    """One micro-batch holds prompts with one and with several responses, and rows with and without images."""
    together, alone, _ = scored
    assert_equal_to(expected, together)
    for ours, reference in zip(alone, expected, strict=True):
        torch.testing.assert_close(ours.double(), reference, atol=1e-4, rtol=0)
    # The oracle must depend on models, images and positions.
    assert torch.cat(expected).std() > 1


def test_the_teacher_encodes_each_distinct_image_once(family, rows, scored):
    """All responses to a prompt share it, and so does another prompt with the same image."""
    pixels = [row["inputs"]["pixel_values"] for row in rows if "pixel_values" in row["inputs"]]
    distinct = {values.numpy().tobytes(): len(values) for values in pixels}
    assert scored[2] == sum(distinct.values())
    assert (len(distinct) == 0) if family in TEXT_ONLY else (len(distinct) == 3)


def test_a_student_without_images_counts_positions_on_one_axis(path, rows, expected):
    """The teacher of each family must accept such positions."""
    text = [row for row in rows if not row["inputs"]]
    plain = [row | {"positions": torch.arange(len(row["ids"]))} for row in text]
    with one_rank():
        scored = start_teacher(teacher_config(path, temperature=TEMPERATURE)).compute_teacher_log_prob(as_batch(plain))
    assert_equal_to([scores for row, scores in zip(rows, expected, strict=True) if not row["inputs"]], scored)


def old_log_probs(path, rows: list[dict], packed: bool) -> list[torch.Tensor]:
    """Return the log-probs of verl's own FSDP engine, as the actor that computes `old_log_probs`."""
    with one_rank():
        worker = start_actor(path, packed)
        batch = as_batch(rows)
        batch["loss_mask"] = batch["response_mask"]
        tu.assign_non_tensor(batch, temperature=TEMPERATURE, calculate_entropy=False, compute_loss=False)
        whole = worker.infer_batch(batch)["log_probs"].unbind()
    # Each place has the log-prob of the next token.
    return [scores[-len(row["response"]) - 1 : -1] for scores, row in zip(whole, rows, strict=True)]


def test_a_model_distilled_into_itself_gives_no_signal(family, path, rows, scored):
    # verl runs packed Qwen2.5-VL with flash-attention only, which needs a GPU.
    for packed in [False] if family == "qwen2_5_vl" else [False, True]:
        student = old_log_probs(path, rows, packed)
        teacher = scored[0]["teacher_log_probs"].unbind()
        ratios = torch.cat([t - s for t, s in zip(teacher, student, strict=True)])
        assert ratios.abs().max() < 1e-4, f"packed={packed}"
