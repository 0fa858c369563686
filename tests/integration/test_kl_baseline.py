# SPDX-License-Identifier: Apache-2.0
"""algorithm.gndpo.baseline=kl: verl's actor returns its most likely tokens, and the teacher worker compares; on one
gloo rank in this process, against the whole distributions of plain Hugging Face models."""

import pytest
import torch
from tensordict.tensorclass import NonTensorStack
from verl.utils import tensordict_utils as tu

# Changes verl's engines in this process, for batches that ask for it.
import verl_gndpo.verl_patches.student_top_k  # noqa: F401
from tests import settings
from tests.integration.helpers import (
    as_batch,
    assert_equal_to,
    hugging_face_distributions,
    hugging_face_log_probs,
    make_rows,
    one_rank,
    start_actor,
    start_teacher,
    teacher_config,
)
from tests.tiny_models import build_tiny
from verl_gndpo.kl import IDS, LOG_PROBS, REQUEST

TEMPERATURE, TEACHER_TEMPERATURE = 0.7, 0.9
LENGTHS = [[5, 2, 11], [9], [1, 1], [12], [3, 6, 8]]


class Pair:
    """A student and a teacher of a family, rows of their prompts, and what Hugging Face says of them."""

    def __init__(self, family, folder):
        self.student = build_tiny(family, folder / "student", seed=0)
        self.teacher = build_tiny(family, folder / "teacher", seed=1, layers=3)
        self.rows = make_rows(self.student, [1, 0, 2, 1, 0] if family == "qwen2_5_vl" else [0] * 5, LENGTHS)
        student = hugging_face_distributions(self.student, self.rows, TEMPERATURE)
        teacher = hugging_face_distributions(self.teacher, self.rows, TEACHER_TEMPERATURE)
        self.kl = [(p.exp() * (p - q)).sum(-1) for p, q in zip(student, teacher, strict=True)]
        self.log_probs = hugging_face_log_probs(self.teacher, self.rows, TEACHER_TEMPERATURE)
        self.vocabulary = student[0].shape[-1]

    def student_pass(self, actor, k):
        """The rows with what the actor stores beside its log-probs."""
        batch = as_batch(self.rows)
        batch["loss_mask"] = batch["response_mask"]
        asked = {REQUEST: k, "temperature": TEMPERATURE, "calculate_entropy": True, "compute_loss": False}
        tu.assign_non_tensor(batch, **asked)
        stored = actor.infer_batch(batch)
        batch = as_batch(self.rows)
        batch[IDS], batch[LOG_PROBS] = stored[IDS], stored[LOG_PROBS]
        return batch


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3"])
def pair(request, tmp_path_factory):
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


def test_the_divergence_is_that_of_the_whole_distributions(pair):
    """Exact with the whole vocabulary; below it and close with few tokens, closer with more."""
    # verl's own attention for packed Qwen2.5-VL is flash-attention's, which needs a GPU.
    packings = [False] if pair.rows[0]["positions"].dim() == 2 else [False, True]
    exact = torch.cat(pair.kl)
    # Measured 3.5 nats.
    assert exact.min() > 0.1, "two random models differ everywhere"
    with one_rank():
        worker = start_teacher(teacher_config(pair.teacher, temperature=TEACHER_TEMPERATURE))
        for packed in packings:
            actor = start_actor(pair.student, packed, max_tokens=100)
            # More than there are.
            batch = pair.student_pass(actor, 10 * pair.vocabulary)
            assert batch[IDS].values().shape[-1] == pair.vocabulary
            scored = worker.compute_teacher_log_prob(batch)
            assert_equal_to(pair.log_probs, scored)
            for ours, expected in zip(scored["teacher_kl"].unbind(), pair.kl, strict=True):
                torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=0)

        below = torch.zeros_like(exact)
        for k in (1, 8, 64, 200):
            values = worker.compute_teacher_log_prob(pair.student_pass(actor, k))["teacher_kl"].values().double()
            assert (values >= below - 1e-5).all() and (values <= exact + 1e-5).all()
            below = values
        # Measured 0.003.
        assert ((exact - below) / exact).max() < 0.05

        settings = {"temperature": TEACHER_TEMPERATURE, "logits_chunk_tokens": 3, "max_token_len_per_gpu": 80}
        small = start_teacher(teacher_config(pair.teacher, **settings))
        again = small.compute_teacher_log_prob(pair.student_pass(actor, 200))["teacher_kl"].values()
        torch.testing.assert_close(again.double(), below, atol=1e-4, rtol=0)


def test_several_teachers_have_the_mean_of_their_divergences(pair):
    """As of their log-probs: so their baseline is the mean of what the log-ratio will be."""
    models = {
        name: {"path": str(path), "override_config": {"attn_implementation": "sdpa"}, "keys": ["*"], "weight": weight}
        for name, path, weight in (("other", pair.teacher, 1.0), ("self", pair.student, 3.0))
    }
    with one_rank():
        batch = pair.student_pass(start_actor(pair.student, packed=False), pair.vocabulary)
        batch["data_source"] = NonTensorStack(*["any"] * len(pair.rows))
        config = settings.teacher_config(models=models, temperature=TEMPERATURE)
        worker = start_teacher(config)
        scored = worker.compute_teacher_log_prob(batch)["teacher_kl"].values().double()
    student, other = (hugging_face_distributions(p, pair.rows, TEMPERATURE) for p in (pair.student, pair.teacher))
    expected = torch.cat([(p.exp() * (p - q)).sum(-1) / 4 for p, q in zip(student, other, strict=True)])
    torch.testing.assert_close(scored, expected, atol=1e-4, rtol=0)
