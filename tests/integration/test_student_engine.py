# SPDX-License-Identifier: Apache-2.0
"""The student's engine against verl's own, in float32: log-probs, entropies, losses, and gradients of all parameters.

Both run verl's loss on the same rows in the same process.
"""

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss

from tests.helpers import verl_config
from tests.integration.helpers import as_batch, make_rows, nested, one_rank, start_actor
from tests.tiny_models import build_tiny
from verl_gndpo.kl import IDS, LOG_PROBS, REQUEST

TEMPERATURE = 0.7
# Of each prompt its images and its responses' lengths: one is many times longer, one alone, two prompts without images.
PROMPTS = {"images_per_prompt": [1, 0, 2, 1], "response_lengths": [[3, 40, 2, 5], [6, 6], [4, 1, 7], [9]]}


def training_batch(rows: list[dict], seed: int = 0) -> TensorDict:
    """Return rows as verl's trainer sends them to the actor, with random advantages, some of them masked."""
    generator = torch.Generator().manual_seed(seed)
    data = as_batch(rows)
    lengths = [len(row["response"]) for row in rows]
    masks = [torch.ones(length, dtype=torch.long) for length in lengths]
    # The last is a padding row of verl's, which counts for nothing.
    masks[-1].zero_()
    data["response_mask"] = data["loss_mask"] = nested(masks)
    data["prompts"] = nested(row["ids"][: len(row["ids"]) - len(row["response"])] for row in rows)
    data["responses"] = nested(row["response"] for row in rows)
    data["old_log_probs"] = nested(-6 + 0.1 * torch.randn(length, generator=generator) for length in lengths)
    data["advantages"] = nested(torch.randn(length, generator=generator) for length in lengths)
    tu.assign_non_tensor(
        data, temperature=TEMPERATURE, global_batch_size=len(rows), calculate_entropy=True, return_model_output=True
    )
    return data


def losses(entropy_coeff: float = 0.1):
    """Return verl's policy loss with an entropy bonus."""
    overrides = ["use_dynamic_bsz=True", "ppo_max_token_len_per_gpu=4096", f"entropy_coeff={entropy_coeff}"]
    config = verl_config(*(f"actor_rollout_ref.actor.{override}" for override in overrides))
    return partial(ppo_loss, config=omega_conf_to_dataclass(config.actor_rollout_ref.actor))


def run(worker, data: TensorDict, max_tokens: int = 4096, **settings):
    """Run an update without its optimizer step.

    Returns:
        Log-probs and entropies of the response tokens of each row, the loss, and the gradients by name.
    """
    engine = worker.engine
    data = data.clone()
    limits = {"use_dynamic_bsz": True, "max_token_len_per_gpu": max_tokens, "use_remove_padding": False} | settings
    tu.assign_non_tensor(data, **limits)
    with engine.train_mode(zero_grad_on_exit=True):
        output = engine.forward_backward_batch(data, losses(), forward_only=False)
        gradients = {
            name: parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad.clone()
            for name, parameter in engine.module.named_parameters()
            if parameter.grad is not None
        }
    return responses(output, data, "log_probs"), responses(output, data, "entropy"), sum(output["loss"]), gradients


def responses(output: dict, data: TensorDict, name: str) -> list[torch.Tensor]:
    lengths = data["response_mask"].offsets().diff().tolist()
    rows = output["model_output"][name].unbind()
    return [row[len(row) - 1 - length : len(row) - 1] for row, length in zip(rows, lengths, strict=True)]


def assert_same(ours, stock) -> None:
    """Log-probs and entropies to 1e-4 nats, and the gradient of each parameter to 1e-5 of its norm."""
    for name, one, other in zip(("log-probs", "entropies"), ours[:2], stock[:2], strict=True):
        for row, (a, b) in enumerate(zip(one, other, strict=True)):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0, msg=lambda m, at=f"{name} of row {row}": f"{at}: {m}")
    assert ours[2] == pytest.approx(stock[2], rel=1e-5, abs=1e-5)
    assert ours[3].keys() == stock[3].keys()
    whole = torch.stack([gradient.norm() for gradient in stock[3].values()]).norm()
    for name, expected in stock[3].items():
        # A key's bias has no gradient but rounding.
        scale = expected.norm() if expected.norm() > 1e-5 * whole else whole
        difference = (ours[3][name] - expected).norm() / scale
        assert difference < 1e-5, f"gradient of {name}: {difference:.1e}"


class Engines:
    """verl's engine and ours with the same weights, and rows."""

    def __init__(self, path, **model):
        self.rows = make_rows(path, **PROMPTS)
        self.data = training_batch(self.rows)
        self.stock = start_actor(path, packed=False, **model)
        self.ours = start_actor(path, packed=False, sharing={}, **model)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    path = build_tiny("qwen2_5_vl", tmp_path_factory.mktemp("student"), seed=3)
    with one_rank():
        yield Engines(path)


@pytest.mark.parametrize(
    "limits",
    [{}, {"max_tokens": 60}, {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 3}],
    ids=["one micro-batch", "a group is split by tokens", "rows per micro-batch"],
)
def test_an_update_equals_verls_own(engines, limits):
    assert_same(run(engines.ours, engines.data, **limits), run(engines.stock, engines.data))


def test_rows_may_have_their_own_temperatures(engines):
    data = engines.data.clone()
    data["temperature"] = torch.linspace(0.5, 1.5, len(data))
    assert_same(run(engines.ours, data), run(engines.stock, data))


def test_a_log_prob_pass_returns_what_verls_does(engines):
    """With entropies, sums of squared probabilities, and the most likely tokens of baseline=kl."""
    data = engines.data.clone()
    tu.assign_non_tensor(data, max_token_len_per_gpu=4096, use_remove_padding=False, calculate_sum_pi_squared=True)
    ours, stock = (
        worker.engine.infer_batch(data.clone(), loss_function=None) for worker in (engines.ours, engines.stock)
    )
    for name in ("log_probs", "entropy", "sum_pi_squared"):
        for one, other in zip(responses(ours, data, name), responses(stock, data, name), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    tu.assign_non_tensor(data, **{REQUEST: 5})
    output = engines.ours.engine.infer_batch(data, loss_function=None)["model_output"]
    lengths = data["response_mask"].offsets().diff().tolist()
    assert [tuple(row.shape) for row in output[IDS].unbind()] == [(length, 5) for length in lengths]
    expected = responses(stock, data, "sum_pi_squared")
    for row, squares in zip(output[LOG_PROBS].unbind(), expected, strict=True):
        # What the most likely tokens and the rest, taken as one token, leave open.
        known = row[:, :-1].exp().square().sum(-1)
        assert ((known <= squares + 1e-6) & (squares <= known + row[:, -1].exp().square() + 1e-6)).all()
