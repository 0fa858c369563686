# SPDX-License-Identifier: Apache-2.0
"""Packed rows for the tests of packing, attention and sequence parallelism, with an oracle of its own."""

from hypothesis import strategies as st

from verl_gndpo.teacher.packing import PromptGroup

SHAPES = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), min_size=1, max_size=4)), min_size=1, max_size=4
)
"""For each prompt its length and the lengths of its responses."""


def groups_of(shapes) -> list[PromptGroup]:
    """Number the rows of the prompts one after the other."""
    groups, row = [], 0
    for prompt, responses in shapes:
        groups.append(PromptGroup(tuple(range(row, row + len(responses))), prompt, tuple(responses)))
        row += len(responses)
    return groups


def sequences(groups: list[PromptGroup]) -> list[list[int]]:
    """Return the places in the packed row of each sequence's tokens, prompt and response, in order."""
    result, start = [], 0
    for group in groups:
        prompt = list(range(start, start + group.prompt))
        start += group.prompt
        for response in group.responses:
            result.append(prompt + list(range(start, start + response)))
            start += response
    return result


class RanksOfRow:
    """The part of a process group that a layout reads: the ranks that share a row."""

    def __init__(self, size: int, rank: int):
        self.size, self.rank = lambda: size, lambda: rank


def tiny(name: str):
    """Build a random text model of a real architecture."""
    import torch
    import transformers

    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    if name == "Qwen2 with a sliding window":
        sizes |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    config = {
        "Qwen2": transformers.Qwen2Config,
        "Qwen2 with a sliding window": transformers.Qwen2Config,
        "Qwen3": transformers.Qwen3Config,
        "Llama": transformers.LlamaConfig,
    }[name](**sizes)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
