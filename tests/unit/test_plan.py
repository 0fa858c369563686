# SPDX-License-Identifier: Apache-2.0
"""A plan: activations against counts of all tensors, weights and host memory against measurements, choices."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import verl  # noqa: F401  # makes torchvision importable
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from tests.tensor_count import TensorCount
from verl_gndpo import plan
from verl_gndpo.cli import app
from verl_gndpo.plan import GB, Choice, Machine, Run, make_plan, measure, pinned_bytes, place
from verl_gndpo.student import projection
from verl_gndpo.teacher import attention
from verl_gndpo.teacher.attention import SharedPromptAttention
from verl_gndpo.teacher.packing import Layout, PackedPass, PromptGroup, causal_pairs
from verl_gndpo.teacher.scorer import Rows, Scorer

PAGE = Path(__file__).parents[2] / "docs" / "teacher.md"


def load_make_memory():
    path = PAGE.with_name("make_memory.py")
    spec = importlib.util.spec_from_file_location("make_memory", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


memory = load_make_memory()


@pytest.fixture(scope="module")
def models():
    return {size: measure(memory.config(size), size) for size in memory.SIZES}


# --- activations ------------------------------------------------------------------------------------------------------


class Kernel(torch.autograd.Function):
    """Stands in for FlashAttention: it allocates what the kernel does, its result and one number per query."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class CrossEntropy(torch.autograd.Function):
    """Stands in for flash-attn's cross-entropy, whose gradient overwrites the logits."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.new_empty(len(logits), dtype=torch.float32)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.saved_tensors[0].mul_(1)


def build(size: str, layers: int, kernel: str, vocabulary: int | None = None):
    """Build the decoder of a released size, with fewer layers, on tensors without storage.

    As a text model: verl's changes of multimodal classes, which other tests in this process apply, need real tensors.
    """
    config = memory.config(size)
    text = config.text_config
    text.num_hidden_layers = layers
    text.vocab_size = vocabulary or text.vocab_size
    text.layer_types = text.layer_types[:layers]
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    plain = Qwen2Config(
        **{name: getattr(text, name) for name in (*shared, "vocab_size", "tie_word_embeddings")},
        attn_implementation=kernel,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Qwen2ForCausalLM(plain), measure(config, size)
    finally:
        torch.set_default_dtype(torch.float32)


def per_token(model, tokens: int, run) -> float:
    """Return the peak of all tensors of a call per token, without those of the weights."""
    count = TensorCount([*model.parameters(), *model.buffers()])
    with count:
        run()
    return count.peak / tokens


class ScoringCount:
    """The real scorer, which plans on real numbers and runs a model on tensors without storage."""

    def __init__(self, size: str, layers: int, vocabulary: int | None = None):
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self._fake:
            self._model, self.sizes = build(size, layers, "sdpa", vocabulary)
            self._scorer = Scorer(self._model, chunk_tokens=256, temperature=1.0)

    def of(self, prompts) -> tuple[int, int, int]:
        """Return tokens of a pass, its peak in bytes, and the pairs of query and key that each layer computes.

        Args:
            prompts: lengths of prompts, each with those of its responses.
        """
        groups, lengths, found = [], [], []
        for prompt, responses in prompts:
            rows = range(len(lengths), len(lengths) + len(responses))
            groups.append(PromptGroup(tuple(rows), prompt, tuple(responses)))
            lengths += [(prompt + response, response) for response in responses]
        rows = Rows(
            ids=[torch.zeros(length, dtype=torch.long) for length, _ in lengths],
            positions=[torch.arange(length) for length, _ in lengths],
            lengths=[response for _, response in lengths],
            images=[{}] * len(lengths),
            sampled=[torch.zeros(length, dtype=torch.bool) for length, _ in lengths],
        )
        pairs = [0]

        def attend(query, key, value, **_):
            batch, length, reach = len(query), query.shape[2], key.shape[2]
            pairs[0] += batch * causal_pairs(length, reach - length)
            return Kernel.apply(query, key, value)

        def without_storage(**inputs):
            moved = {name: self._fake.from_tensor(x) if torch.is_tensor(x) else x for name, x in inputs.items()}
            outputs: list = []
            with self._fake:
                found.append(per_token(self._model, 1, lambda: outputs.append(self._model(**moved))))
            return outputs.pop()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "scaled_dot_product_attention", attend)
            # A mask in name only, which can't be made on tensors without storage.
            patch.setattr(attention, "causal_lower_right", lambda *_: None)
            self._scorer.score(without_storage, PackedPass(tuple(groups)), rows, device="cpu", dtype=torch.bfloat16)
        (peak,) = found
        return sum(group.tokens for group in groups), peak, pairs[0] // self._model.config.num_hidden_layers


LAYOUTS = {
    "equal": [(600, [1400] * 16)],
    "one long response": [(600, [500] * 15 + [16384])],
    "single": [(8192, [16384])],
    "several prompts": [(400, [200] * 16)] * 6,
}


@pytest.mark.parametrize(
    ("size", "layout"), [*(("7B", layout) for layout in LAYOUTS), ("3B", "equal"), ("72B", "single")]
)
def test_the_peak_of_scoring_is_that_of_all_tensors(size, layout):
    counted = ScoringCount(size, layers=2)
    tokens, peak, _ = counted.of(LAYOUTS[layout])
    assert peak / tokens == pytest.approx(plan.scoring_bytes_per_token(counted.sizes), rel=0.15)


@pytest.fixture(scope="module")
def one_layer():
    # With few logits: their peak is the same for all lengths, and their blocks take long to count.
    return ScoringCount("7B", layers=1, vocabulary=512)


def within(prompts, tokens=32_768):
    """Leave out responses that do not fit into a micro-batch, as far as a prompt keeps one."""
    kept = []
    for prompt, lengths in prompts:
        while len(lengths) > 1 and prompt + sum(lengths) > tokens // len(prompts):
            lengths = lengths[:-1]
        kept.append((prompt, lengths))
    return kept


# A truncated answer, or one of a few words, is in every real batch.
MIXTURES = st.lists(
    st.tuples(
        st.sampled_from([20, 600, 3000, 8192]),
        st.lists(st.one_of(st.integers(1, 40), st.integers(1, 3000), st.integers(1, 16384)), min_size=1, max_size=16),
    ),
    min_size=1,
    max_size=4,
).map(within)


@given(MIXTURES)
@settings(max_examples=10, deadline=None)
@example([(600, [500] * 15 + [16368])])
@example([(600, [900, 400, 700, 2500, 1200, 300, 5200, 800, 1500, 650, 2000, 1100, 450, 980, 3100, 600])])
@example([(8192, [1] * 15 + [16369])])
def test_no_mixture_of_lengths_costs_much_more_than_equal_ones(one_layer, prompts):
    """At most 1.15 times the attention that is needed, and 1.3 times the peak of the same tokens in equal responses.

    An image makes a prompt longer, and its tower runs before the decoder, whatever the lengths of the responses.
    """
    needed = sum(causal_pairs(p, 0) + sum(causal_pairs(n, p) for n in lengths) for p, lengths in prompts)
    _, peak, pairs = one_layer.of(prompts)
    assert needed <= pairs <= 1.15 * needed
    equal = [(p, [len(part) for part in np.array_split(range(sum(ns)), len(ns))]) for p, ns in prompts]
    tokens, of_equal, _ = one_layer.of(equal)
    assert tokens == sum(p + sum(ns) for p, ns in prompts)
    assert peak <= 1.3 * of_equal


def update_peak(size: str, layers: int, tokens: int, log_probs) -> tuple[float, plan.ModelSize]:
    """Return the peak per token of a training step with gradient checkpointing, and the sizes of the model.

    Args:
        log_probs: (logits, (tokens, vocabulary)) -> (tokens,).
    """
    AttentionInterface.register("counted", lambda _, q, k, v, __, **___: (Kernel.apply(q, k, v).transpose(1, 2), None))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, sizes = build(size, layers, "counted")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        for parameter in model.parameters():
            # Of weights; they have a line of their own in a plan.
            parameter.requires_grad_(parameter.dim() == 1)
        model.enable_input_require_grads()

        def step() -> None:
            def forward():
                inputs = {"input_ids": torch.zeros(1, tokens, dtype=torch.long), "use_cache": False}
                inputs["position_ids"] = torch.zeros(1, tokens, dtype=torch.long)
                with torch.autocast("cpu", torch.bfloat16):
                    return log_probs(model(**inputs).logits)

            # Nobody holds the logits during the backward pass but the graph.
            forward().mean().backward()

        return per_token(model, tokens, step), sizes


@pytest.mark.parametrize(("size", "layers"), [("3B", 36), ("7B", 28), ("32B", 4)])
def test_the_peak_of_the_update_is_that_of_all_tensors(size, layers):
    """With the fewest layers the peak is in a layer, and with all of them at the logits."""
    counted, sizes = update_peak(size, layers, 8192, lambda logits: CrossEntropy.apply(logits.squeeze(0)))
    assert counted == pytest.approx(plan.update_bytes_per_token(sizes), rel=0.15)


def test_without_flash_attn_the_logits_exist_three_times():
    """As verl computes log-probs of a batch with padding."""
    from verl.utils.torch_functional import logprobs_from_logits_v2

    tokens = 256

    def log_probs(logits):
        # A batch of two with padding, from which it is removed.
        packed = torch.cat([row[: tokens // 2] for row in logits.view(2, tokens // 2, -1)])
        return logprobs_from_logits_v2(packed, torch.zeros(tokens, dtype=torch.long))

    counted, sizes = update_peak("3B", 2, tokens, log_probs)
    assert counted == pytest.approx(plan.update_bytes_per_token(sizes, 3), rel=0.15)


class EveryTokenHasAGradient(TorchDispatchMode):
    """Answers the one question to values in the backward pass of the head."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.nonzero.default:
            return torch.arange(len(args[0])).unsqueeze(1)
        return function(*args, **(kwargs or {}))


def shared_update_peak(size: str, layers: int, prompts) -> tuple[float, plan.ModelSize, int, int]:
    """Return the peak of an update with shared prompts, the sizes of the model, all tokens, and those of responses.

    Layout, attention and head are those of a run.
    """
    groups, count = [], 0
    for prompt, responses in prompts:
        groups.append(PromptGroup(tuple(range(count, count + len(responses))), prompt, tuple(responses)))
        count += len(responses)
    layout = Layout(groups, "cpu")
    tokens, answered = layout.tokens, len(layout.predicting)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model, sizes = build(size, layers, "sdpa")
        shared = SharedPromptAttention(model)
        head = projection.ResponseHead(model.get_output_embeddings(), 256)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() == 1)
        model.enable_input_require_grads()
        request = projection.Request(fake.from_tensor(layout.predicting), torch.zeros(answered, dtype=torch.long), 1.0)

        def step() -> None:
            inputs = {name: torch.zeros(1, tokens, dtype=torch.long) for name in ("input_ids", "position_ids")}

            def forward():
                with torch.autocast("cpu", torch.bfloat16):
                    return model(**inputs, use_cache=False).logits

            with shared.attending(layout), head.answering(request), EveryTokenHasAGradient():
                forward().mean().backward()

        return per_token(model, 1, step), sizes, tokens, answered


@pytest.mark.parametrize(
    ("size", "layers", "layout"),
    [
        ("3B", 36, "equal"),
        ("3B", 2, "one long response"),
        ("7B", 4, "several prompts"),
    ],
)
def test_the_peak_of_a_shared_update_is_that_of_all_tensors(size, layers, layout, monkeypatch):
    monkeypatch.setattr(attention, "scaled_dot_product_attention", lambda q, k, v, **_: Kernel.apply(q, k, v))
    monkeypatch.setattr(attention, "causal_lower_right", lambda *_: None)
    # Blocks as on an accelerator.
    for name in ("CPU_LOGITS", "CPU_TOKENS"):
        monkeypatch.setattr(projection, name, 1 << 60)
    counted, sizes, tokens, answered = shared_update_peak(size, layers, LAYOUTS[layout])
    sizes = dataclasses.replace(sizes, layers=layers)
    assert counted == pytest.approx(plan.shared_update_bytes(sizes, tokens, answered, 256), rel=0.15)


def test_shared_prompts_take_the_logits_out_of_the_update(models):
    """Of a 3B, whose logits are wider than its layers; of a 7B the layers decide either way."""
    for size, least in (("3B", 0.25), ("7B", 0.0)):
        plain, shared = (planned(models, size, "7B", 8, share_prompts=share).placements[0] for share in (False, True))
        before, after = (p.phases["update"]["activations and logits"] for p in (plain, shared))
        assert after <= (1 - least) * before
        assert shared.settings["+student.share_prompts"] == "True"
        assert not any("share_prompts" in key for key in plain.settings)
        assert plain.phases["score"] == shared.phases["score"]
    # Padding matters no longer.
    assert (
        planned(models, "3B", "7B", 8, share_prompts=True, padding_removed=False).placements[0].phases["update"]
        == planned(models, "3B", "7B", 8, share_prompts=True).placements[0].phases["update"]
    )


def test_scoring_takes_what_an_h200_took(models):
    """Of 15.5 GiB of weights on one GPU; docs/benchmarks.md, "Teacher on a GPU"."""
    for tokens, gib in ((23_000, 3.1), (24_484, 3.3), (21_600, 2.9), (24_576, 3.3)):
        assert tokens * plan.scoring_bytes_per_token(models["7B"]) / 2**30 == pytest.approx(gib, rel=0.07)
    assert 2 * models["7B"].parameters / 2**30 == pytest.approx(15.5, rel=0.01)


# --- weights and host -------------------------------------------------------------------------------------------------


def test_models_have_the_sizes_of_the_released_checkpoints(models):
    """As the model cards have them, in 10^9."""
    for size, billions in {"3B": 3.75, "7B": 8.29, "32B": 33.45, "72B": 73.41}.items():
        assert models[size].parameters / GB == pytest.approx(billions, rel=0.002)
        # Everything but the vision tower.
        text = sum(torch.Size(shape).numel() for shape in models[size].trained(True))
        assert 0.6 < (models[size].parameters - text) / GB < 0.75
    assert models["3B"].tied and not models["7B"].tied
    # An untied model gathers its output projection by itself, and a tied one with its root.
    assert models["7B"].projection == 152064 * 3584 and models["7B"].root < 0.1 * models["7B"].projection
    assert models["3B"].projection == 0 and models["3B"].root == pytest.approx(151936 * 2048, rel=0.15)
    assert models["7B"].layer == pytest.approx(3 * 3584 * 18944 + 2 * 3584 * (3584 + 512), rel=0.001)


def test_pinned_memory_is_rounded_up_to_powers_of_two(models):
    """29.2 GiB for the whole 7B were measured on one GPU; 31.4 and 120 GB were reckoned for 8 from the shapes."""
    assert pinned_bytes(((3, 5), (8,), ()), 2, 2) == 32 + 8 + 2
    assert pinned_bytes(models["7B"].shapes, 1, 2) / 2**30 == pytest.approx(29.2, rel=0.01)
    assert 8 * pinned_bytes(models["7B"].shapes, 8, 2) / GB == pytest.approx(31.4, rel=0.01)
    assert 8 * pinned_bytes(models["32B"].shapes, 8, 2) / GB == pytest.approx(120, rel=0.01)


def test_every_rank_builds_a_model_with_tied_embeddings(models):
    machine, run = Machine(8, 1, 80 * GB), Run()
    choice = Choice("colocated", 8, 1, 8, 1, 8, False)
    tied = place(models["3B"], models["3B"], machine, run, choice)
    assert tied.host_start == {"student's weights, whole": 8 * 4 * models["3B"].parameters}
    untied = place(models["7B"], models["7B"], machine, run, choice)
    assert untied.host_start["teacher's weights, whole"] == 2 * models["7B"].parameters


# --- choices ----------------------------------------------------------------------------------------------------------


def planned(models, student: str, teacher: str, gpus: int, nodes: int = 1, memory: float = 80, **run):
    return make_plan(models[student], models[teacher], Machine(gpus, nodes, memory * GB), Run(**run))


def test_the_published_pair_is_colocated_on_eight_gpus(models):
    chosen = planned(models, "3B", "7B", 8).chosen
    assert chosen.fits and chosen.settings["teacher.placement"] == "colocated"
    assert not any("offload" in key for key in chosen.settings)
    # The states alone, without the gradients: 12 bytes per parameter over 8 GPUs.
    held = chosen.phases["score"]
    assert held["student's weights"] + held["optimizer states"] == pytest.approx(12 * models["3B"].parameters / 8)


def test_an_actor_is_offloaded_where_nothing_else_fits(models):
    made = planned(models, "7B", "72B", 4, memory=72)
    assert not made.placements[0].fits
    settings = made.chosen.settings
    assert made.chosen.fits and settings["actor_rollout_ref.actor.fsdp_config.param_offload"] == "True"
    assert {"student's weights", "optimizer states"} <= made.chosen.host.keys()
    assert "student's weights" not in made.chosen.phases["score"]


def test_what_fits_nowhere_says_what_is_missing(models):
    made = planned(models, "7B", "72B", 1)
    assert not made.chosen.fits
    held = made.chosen.phases
    for phase, missing in made.chosen.short.items():
        assert missing == pytest.approx(sum(held[phase].values()) - 80 * GB)
    assert made.chosen.short == min((p.short for p in made.placements), key=lambda short: max(short.values()))


def test_a_phase_never_holds_more_than_the_gpu_where_a_plan_fits(models):
    for gpus, nodes in ((4, 1), (8, 1), (8, 2)):
        for placement in planned(models, "7B", "32B", gpus, nodes).placements:
            totals = [sum(held.values()) for held in placement.phases.values()]
            assert placement.fits == (max(totals) <= 80 * GB)


def test_the_rollout_gets_what_the_actor_leaves(models):
    plain, offloaded = (p for p in planned(models, "7B", "32B", 8).placements[:2])
    shares = [float(p.settings["actor_rollout_ref.rollout.gpu_memory_utilization"]) for p in (plain, offloaded)]
    assert shares[0] < shares[1] <= 0.9
    resident = plain.phases["generate"]["student's weights"] + plain.phases["generate"]["optimizer states"]
    assert shares[0] * 80 * GB + resident + 3 * plan.CONTEXT <= 80 * GB
    assert plain.cached_tokens >= Run().max_prompt + Run().max_response


def test_vllm_splits_weights_that_leave_no_room(models):
    chosen = planned(models, "32B", "32B", 8, 2).chosen
    assert chosen.settings["actor_rollout_ref.rollout.tensor_model_parallel_size"] in ("2", "4")


def test_the_host_is_checked_where_its_size_is_given(models):
    def short(host: float):
        machine = Machine(8, 1, 80 * GB, host * GB)
        return make_plan(models["7B"], models["32B"], machine, Run()).placements[0].short

    assert short(200) == {}
    assert short(150).keys() == {"host, at the start"}
    assert short(100).keys() == {"host", "host, at the start"}


def test_several_nodes_keep_a_copy_of_the_teacher_each(models):
    first, second = planned(models, "7B", "32B", 8, 2).placements[:2]
    assert first.settings["teacher.fsdp.fsdp_size"] == "8" and "teacher.fsdp.fsdp_size" not in second.settings
    assert first.phases["score"]["teacher's weights"] == 2 * second.phases["score"]["teacher's weights"]


def test_a_frozen_tower_has_no_gradients_and_no_states(models):
    trained, frozen = (planned(models, "7B", "7B", 8, freeze_vision=f).placements[0] for f in (False, True))
    tower = sum(torch.Size(shape).numel() for shape in models["7B"].tower)
    for name, size in (("gradients", 4), ("optimizer states", 8), ("student's weights", 0)):
        assert trained.phases["update"][name] - frozen.phases["update"][name] == pytest.approx(size * tower / 8)
    assert frozen.settings["actor_rollout_ref.actor.freeze_vision_tower"] == "True"


def test_settings_are_keys_of_the_config(models):
    """Each override composes, with the teacher's group."""
    from tests.helpers import verl_config

    for placement in planned(models, "7B", "32B", 8, 2, freeze_vision=True, share_prompts=True).placements:
        overrides = [f"{key}={value}" for key, value in placement.settings.items()]
        config = verl_config("algorithm.adv_estimator=gndpo", "+teacher=worker", *overrides)
        assert config.teacher.placement == placement.settings["teacher.placement"]


# --- the command and the page -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for size in ("3B", "7B"):
        memory.config(size).save_pretrained(folder / size)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_the_command_prints_text_and_json(folders):
    pair = folders / "3B", folders / "7B"
    text = run(*pair, "--gpus", 8, "--memory", 80)
    assert text.exit_code == 0 and "fits: colocated" in text.stdout
    found = json.loads(run(*pair, "--gpus", 8, "--memory", 80, "--json").stdout)
    assert found["fits"] and found["chosen"] == 0
    for key, value in found["placements"][0]["settings"].items():
        assert f"    {key}={value}\n" in text.stdout
    assert f"{sum(found['placements'][0]['phases']['update'].values()) / GB:8.1f}" in text.stdout


def test_the_command_fails_where_nothing_fits(folders):
    result = run(folders / "7B", folders / "7B", "--gpus", 1, "--memory", 24)
    assert result.exit_code == 1 and "nothing fits" in result.stdout and "lora_rank" in result.stdout


def test_the_command_plans_for_shared_prompts(folders):
    pair = folders / "3B", folders / "7B"
    plain, shared = (run(*pair, *options, "--json").stdout for options in ((), ("--share-prompts",)))
    plain, shared = (json.loads(x)["placements"][0]["phases"]["update"] for x in (plain, shared))
    assert shared["activations and logits"] < 0.75 * plain["activations and logits"]
    assert "    +student.share_prompts=True\n" in run(*pair, "--share-prompts").stdout


def test_a_folder_without_a_config_is_an_error(tmp_path):
    result = run(tmp_path, tmp_path)
    assert result.exit_code == 1 and result.stderr.startswith(f"error   {tmp_path}: its config can't be read")
    assert "Traceback" not in result.output


def test_the_page_has_the_tables_of_the_code():
    assert PAGE.read_text() == memory.page(PAGE.read_text()), "run: python docs/make_memory.py"


def test_sizes_are_plain_numbers(models):
    assert all(isinstance(value, bool | int | str | tuple) for value in dataclasses.asdict(models["7B"]).values())
