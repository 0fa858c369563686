# SPDX-License-Identifier: Apache-2.0
"""Compare ways to share a prompt (`teacher.sharing`) under a model whose layers are mostly linear attention.

    python benchmarks/prompt_sharing.py [--json OUT] [--rounds 3] [--shape tiny|vocabulary|small]

- `none`: each response runs with its own prompt, one by one;
- `side_by_side`: the same, with responses of similar length beside each other;
- `cache`: the prompt runs once, and the responses continue from copies of its cache.

Targets for `cache` against `none`: twice as fast, with at most 1.3 times its memory. The model is a Qwen3.5 with random
weights. Each call runs in its own process, and scores one batch to warm
up before another one of the same sizes. `peak_gb` is the memory that the timed call adds to the process at the highest
point.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import verl  # noqa: F401  loads the plugin, without which transformers can't import its image models on the CPU
from _common import machine, print_table, resident, write_json

METHODS = {"none": ("none", 1), "side_by_side": ("none", 10**6), "cache": ("cache", 10**6)}
"""By method, `teacher.sharing` and the tokens of a pass."""


BATCH = {"responses": 8, "prompt": 350, "length": 128}
SHAPES = {
    "tiny": {"vocabulary": 384, "hidden": 128, "layers": 4, **BATCH},
    "vocabulary": {"vocabulary": 248320, "hidden": 512, "layers": 8, **BATCH},
    "small": {"vocabulary": 384, "hidden": 128, "layers": 4, "responses": 4, "prompt": 70, "length": 16},
}
"""Sizes by name: the tests' tiny model; one with the vocabulary of the released models, whose projection no way of
sharing saves; and one that only shows that everything runs."""


def measure(method: str, sizes: dict[str, int]) -> dict:
    """Return seconds, memory and log-probs of one method, measured in this process."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    from verl_gndpo.teacher.packing import PromptGroup, plan
    from verl_gndpo.teacher.scorer import Rows, Scorer

    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["hidden"],
        intermediate_size=3 * sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["hidden"] // 64,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
    )
    model = Qwen3_5ForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    sharing, max_tokens = METHODS[method]
    scorer = Scorer(model, chunk_tokens=256, temperature=1.0, sharing=sharing)
    responses, prompt, length = (sizes[name] for name in ("responses", "prompt", "length"))
    group = PromptGroup(tuple(range(responses)), prompt, (length,) * responses)

    def score(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        question = torch.randint(0, sizes["vocabulary"], (prompt,), generator=generator)
        ids = [
            torch.cat([question, torch.randint(0, sizes["vocabulary"], (length,), generator=generator)])
            for _ in range(responses)
        ]
        none = [torch.zeros_like(row, dtype=torch.bool) for row in ids]
        rows = Rows(ids, [torch.arange(len(row)) for row in ids], [length] * responses, [{}] * responses, none)
        scored = [torch.empty(0)] * responses
        for step in plan([group], sharing, max_tokens):
            values = scorer.score(model, step, rows, device="cpu", dtype=torch.float32)[:, 0]
            for row, of_row in zip(step.rows, values.split([length] * len(step.rows)), strict=True):
                scored[row] = of_row
        scorer.forget()
        return torch.cat(scored)

    score(0)
    before = resident("VmRSS")
    Path(f"/proc/{os.getpid()}/clear_refs").write_text("5")
    start = time.perf_counter()
    scored = score(1)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_gb": resident("VmHWM") - before, "log_probs": scored.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = SHAPES[arguments.shape]
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, sizes)))
        return
    found: dict[str, list[dict]] = {method: [] for method in METHODS}
    for _ in range(arguments.rounds):
        for method in METHODS:
            command = [sys.executable, __file__, "--measure", method, "--shape", arguments.shape]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[method].append(json.loads(done.stdout.splitlines()[-1]))
    expected = torch.tensor(found["none"][0]["log_probs"])
    rows: list[dict] = []
    for method, calls in found.items():
        figures = {name: statistics.median(call[name] for call in calls) for name in ("seconds", "peak_gb")}
        difference = float((torch.tensor(calls[0]["log_probs"]) - expected).abs().max())
        rows.append({"method": method, **figures, "largest_difference": difference})
    for row in rows:
        row["speedup_vs_none"] = rows[0]["seconds"] / row["seconds"]
        row["memory_vs_none"] = row["peak_gb"] / rows[0]["peak_gb"]
    print_table("Responses to one prompt, hybrid model", list(rows[0]), [list(row.values()) for row in rows])
    if arguments.json:
        write_json(arguments.json, {"machine": machine(), "sizes": sizes, "rows": rows})


if __name__ == "__main__":
    main()
