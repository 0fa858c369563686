# SPDX-License-Identifier: Apache-2.0
"""The trial on 200 random configs: what it accepts is scored exactly with other weights, and what it refuses fails."""

import random
from collections import Counter

import pytest
import torch
import transformers as hf

from tests.zoo import DEEPSEEK, EXPERTS, LINEAR, ROPE, TEXT
from verl_gndpo.families import UNDECLARED
from verl_gndpo.teacher.architecture import build_as_verl, stock_classes, try_teacher
from verl_gndpo.teacher.packing import PromptGroup, plan
from verl_gndpo.teacher.scorer import Rows, Scorer
from verl_gndpo.teacher.trial import TrialError

CONFIGS = 200
VOCABULARY = 97
RUN = {"device": "cpu", "dtype": torch.float32}
FURTHER = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Llama": {},
    "Mistral": {"head_dim": 32},
    "Qwen3Moe": {**EXPERTS, "head_dim": 32},
    "Gemma2": {"head_dim": 32},
    "Granite": {},
    "Cohere2": {},
    "GptOss": {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Next": {**LINEAR, **EXPERTS, "head_dim": 32, "partial_rotary_factor": 0.5},
    "Lfm2": {},
    "DeepseekV3": DEEPSEEK,
    "Olmo3": {},
}
"""By the prefix of transformers' classes, what their configs have besides `TEXT`."""


def draw_config(number: int):
    """Return a random config of one of the architectures."""
    rng = random.Random(number)
    prefix = list(FURTHER)[number % len(FURTHER)]
    shared = rng.choice([1, 2])
    settings = TEXT | FURTHER[prefix]
    settings |= {
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_size": rng.choice([32, 64, 96]) if "head_dim" in settings else 64,
        "intermediate_size": rng.choice([32, 80]),
        "num_hidden_layers": rng.choice([1, 2, 4]),
        "num_key_value_heads": shared if prefix != "DeepseekV3" else 4,
        "tie_word_embeddings": rng.random() < 0.5,
        "rope_parameters": {**ROPE, "rope_theta": rng.choice([1e3, 1e4])},
        "initializer_range": rng.choice([0.05, 0.2]),
    }
    layers = settings["num_hidden_layers"]
    if prefix in ("Qwen2", "Qwen3", "Mistral", "Gemma2", "Cohere2", "GptOss", "Olmo3"):
        settings["sliding_window"] = rng.choice([3, 6, 50])
    if prefix in ("Gemma2", "Cohere2", "GptOss", "Olmo3"):
        settings["layer_types"] = [rng.choice(["sliding_attention", "full_attention"]) for _ in range(layers)]
    if prefix == "Lfm2":
        settings["layer_types"] = [rng.choice(["conv", "full_attention"]) for _ in range(layers)]
    if prefix == "Qwen3Next":
        settings["layer_types"] = [rng.choice(["linear_attention", "full_attention"]) for _ in range(layers)]
    if prefix == "Granite":
        settings["logits_scaling"] = rng.choice([0.5, 1.0, 6.0])
    if prefix == "Cohere2":
        settings["logit_scale"] = rng.choice([0.0625, 1.0])
    if prefix == "Gemma2":
        settings["final_logit_softcapping"] = rng.choice([None, 5.0, 30.0])
        settings["attn_logit_softcapping"] = rng.choice([None, 50.0])
    config = getattr(hf, f"{prefix}Config")(**settings)
    config.architectures = [f"{prefix}ForCausalLM"]
    config._attn_implementation = rng.choice(["sdpa", "eager", "flash_attention_2"])
    return prefix, config


def rows_and_groups(rng: random.Random):
    """Return responses of random lengths to random prompts."""
    ids, lengths, groups = [], [], []
    for _ in range(rng.choice([1, 3])):
        prompt = torch.tensor([rng.randrange(3, VOCABULARY) for _ in range(rng.choice([1, 2, 9, 66]))])
        responses = [rng.choice([1, 4, 5, 17]) for _ in range(rng.choice([1, 2, 4]))]
        groups.append(PromptGroup(tuple(range(len(ids), len(ids) + len(responses))), len(prompt), tuple(responses)))
        for length in responses:
            ids.append(torch.cat([prompt, torch.tensor([rng.randrange(3, VOCABULARY) for _ in range(length)])]))
            lengths.append(length)
    positions = [torch.arange(len(row)) for row in ids]
    sampled = [torch.zeros_like(row, dtype=torch.bool) for row in ids]
    return Rows(ids, positions, lengths, [{}] * len(ids), sampled), groups


def build(config, attention: str, seed: int):
    torch.manual_seed(seed)
    return build_as_verl(config, attention).eval()


def largest_difference(config, sharing, change, side_by_side, attention: str, seed: int) -> float:
    """Return by how much a scorer with other weights than the trial's differs from plain forward passes."""
    rows, groups = rows_and_groups(random.Random(seed))
    model = build(config, attention, seed)
    scorer = Scorer(model, chunk_tokens=7, temperature=0.7, sharing=sharing, change=change)
    limit = random.Random(seed).choice([100, 10_000]) if side_by_side else 1
    scored = {}
    for step in plan(groups, sharing, limit):
        values = scorer.score(model, step, rows, **RUN)[:, 0]
        scored |= dict(zip(step.rows, values.split([rows.lengths[row] for row in step.rows]), strict=True))
    oracle = build(config, "eager", seed)
    largest = 0.0
    for row, length in enumerate(rows.lengths):
        with torch.no_grad():
            logits = oracle(input_ids=rows.ids[row][None], use_cache=False).logits[0].double() / 0.7
        expected = logits[:-1].log_softmax(-1).gather(-1, rows.ids[row][1:, None])[-length:, 0]
        largest = max(largest, float((scored[row] - expected).abs().max()))
    return largest


@pytest.fixture(scope="module", autouse=True)
def restored_classes():
    with stock_classes(UNDECLARED):
        yield


def test_the_trial_is_never_wrong(capsys):
    outcomes = Counter()
    for number in range(CONFIGS):
        prefix, config = draw_config(number)
        attention = config._attn_implementation
        real = "sdpa" if attention == "sdpa" else "eager"
        where = f"config {number}: {prefix} with {attention}"
        try:
            verdict = try_teacher(config, "", sharing="auto", trust_remote_code=False)
        except TrialError as refusal:
            outcomes[prefix, "refused"] += 1
            # The refusal is right: with the attention that was asked for, transformers itself differs or fails.
            rows, _ = rows_and_groups(random.Random(number))
            try:
                given, eager = (build(config, name, number)(input_ids=rows.ids[0][None]) for name in (real, "eager"))
            except (ValueError, ImportError):
                continue
            assert (given.logits - eager.logits).abs().max() > 1e-5, f"{where}: {refusal}"
            continue
        outcomes[prefix, verdict.sharing] += 1
        difference = largest_difference(config, verdict.sharing, verdict.change, verdict.side_by_side, real, number)
        assert difference < 1e-4, f"{where}: {verdict}"
    with capsys.disabled():
        print(f"\n{dict(outcomes)}")
    assert {sharing for _, sharing in outcomes} == {"attention", "cache", "none", "refused"}
