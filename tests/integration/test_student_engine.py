# SPDX-License-Identifier: Apache-2.0
"""The student's engine against verl's own, in float32: log-probs, entropies, losses, and gradients of all parameters.

Both run verl's loss on the same rows in the same process.
"""

import multiprocessing
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig
from verl.workers.utils.losses import ppo_loss

from tests.helpers import verl_config
from tests.integration.helpers import as_batch, free_port, make_rows, nested, one_rank, set_rank, start_actor
from tests.tiny_models import build_tiny
from verl_gndpo.config import ConfigError
from verl_gndpo.kl import IDS, LOG_PROBS, REQUEST
from verl_gndpo.student import engine

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
    module, data = worker.engine.module, data.clone()
    limits = {"use_dynamic_bsz": True, "max_token_len_per_gpu": max_tokens, "use_remove_padding": False} | settings
    tu.assign_non_tensor(data, **limits)
    with worker.engine.train_mode():
        output = worker.engine.forward_backward_batch(data, losses(), forward_only=False)
        gradients = {
            name: parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad.clone()
            for name, parameter in module.named_parameters()
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

    def __init__(self, path, prompts=PROMPTS, **model):
        self.rows = make_rows(path, **prompts)
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


def test_a_frozen_tower_encodes_each_distinct_image_once_and_gets_no_gradient(engines):
    tower = engines.ours.engine.module.model.visual
    encoded = []
    handle = tower.patch_embed.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
    for worker in (engines.ours, engines.stock):
        worker.engine.module.model.visual.requires_grad_(False)
    try:
        ours, stock = run(engines.ours, engines.data), run(engines.stock, engines.data)
    finally:
        handle.remove()
        for worker in (engines.ours, engines.stock):
            worker.engine.module.model.visual.requires_grad_(True)
    assert_same(ours, stock)
    assert not any("visual" in name for name in ours[3])
    distinct = {row["inputs"]["pixel_values"].sum().item(): row["inputs"] for row in engines.rows if row["inputs"]}
    assert encoded == [sum(len(inputs["pixel_values"]) for inputs in distinct.values())]


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "qwen3"])
def test_other_families(tmp_path, family):
    prompts = PROMPTS if family != "qwen3" else PROMPTS | {"images_per_prompt": [0] * 4}
    path = build_tiny(family, tmp_path, seed=3)
    with one_rank():
        engines = Engines(path, prompts, enable_gradient_checkpointing=True)
        assert_same(run(engines.ours, engines.data, 100), run(engines.stock, engines.data))


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_adapters_get_the_gradients_that_verl_gives_them(tmp_path, strategy):
    path = build_tiny("qwen2_5_vl", tmp_path, seed=3)
    lora = {"lora_rank": 4, "target_modules": "all-linear"}
    with one_rank():
        engines = Engines(path, strategy=strategy, **lora)
        for worker in (engines.ours, engines.stock):
            randomize_adapters(worker.engine.module)
        ours, stock = run(engines.ours, engines.data), run(engines.stock, engines.data)
        assert_same(ours, stock)
        assert all("lora" in name or "flat" in name for name in ours[3])


def randomize_adapters(module) -> None:
    """Give every adapter an effect: peft begins with one that has none."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                local = getattr(parameter, "_local_tensor", parameter)
                local.copy_(0.05 * torch.randn(local.shape, generator=generator))


def test_an_adapter_of_the_output_projection_is_refused(tmp_path):
    path = build_tiny("qwen2_5_vl", tmp_path, seed=3)
    with one_rank(), pytest.raises(ConfigError, match="does not support LoRA adapters"):
        start_actor(path, packed=False, sharing={}, lora_rank=4, target_modules=["q_proj", "lm_head"])


def test_an_architecture_that_cannot_share_runs_as_in_verl(tmp_path, capfd, monkeypatch):
    path = build_tiny("qwen3", tmp_path, seed=3)
    monkeypatch.setattr(engine, "why_prompts_are_not_shared", lambda *_, **__: "it mixes tokens otherwise")
    with one_rank():
        engines = Engines(path, PROMPTS | {"images_per_prompt": [0] * 4})
        assert "each response runs with its own prompt: it mixes tokens otherwise" in capfd.readouterr().out
        assert_same(run(engines.ours, engines.data), run(engines.stock, engines.data))


def test_ranks_that_share_a_sequence_are_refused(tmp_path):
    config = engine.StudentEngineConfig(strategy="fsdp2", ulysses_sequence_parallel_size=2)
    with pytest.raises(ConfigError, match="does not support Ulysses sequence parallelism"):
        engine.StudentEngine(HFModelConfig(path=str(build_tiny("qwen3", tmp_path, seed=3))), config, None, None)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_two_ranks(tmp_path, strategy):
    """They have different rows, one of them none with images, and need different numbers of micro-batches."""
    path = build_tiny("qwen2_5_vl", tmp_path, seed=3)
    context, port = multiprocessing.get_context("spawn"), free_port()
    ranks = [context.Process(target=run_rank, args=(rank, port, path, strategy)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]


def run_rank(rank: int, port: int, path, strategy: str) -> None:
    torch.set_num_threads(1)
    set_rank(rank, 2, port)
    prompts = (
        {"images_per_prompt": [1, 2], "response_lengths": [[3, 30, 2], [5]]},
        {"images_per_prompt": [0], "response_lengths": [[1, 2, 3, 4]]},
    )[rank]
    engines = Engines(path, prompts, strategy=strategy)
    assert_same(run(engines.ours, engines.data, 80), run(engines.stock, engines.data, 200))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
