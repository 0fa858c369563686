# SPDX-License-Identifier: Apache-2.0
"""The estimator on one batch: released way, ours, ours with every metric, verl's grpo. Targets: at least 5x faster than
the released way alone, at most 1.0x of its time with the metrics.

    python benchmarks/estimator.py [--json OUT] [--rows 512] [--length 4096] [--threads 1 2] [--rounds 30]

Threads matter (Ray gives the driver one), and so does the heap: where a call finds no free memory mapped, the kernel
faults in each page that it writes. `fresh` returns free memory to the system before every call, as for a process that
comes back from a training step; `warm` calls in a tight loop, where it is up to the allocator how much is kept. With
several threads and a core that is busy otherwise, every parallel operation waits for the scheduler: trust the minima.
"""

import argparse
import ctypes
import ctypes.util
from pathlib import Path

import numpy as np
import torch
from _common import machine, medians, print_table, time_in_turns, write_json
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.utils.torch_functional import masked_whiten

from verl_gndpo.advantage import compute_advantages
from verl_gndpo.config import read_signal_config
from verl_gndpo.observe.metrics import (
    describe_classes,
    describe_positions,
    describe_responses,
    describe_signal,
    describe_sources,
    pack,
    sum_parts,
)
from verl_gndpo.observe.token_classes import classify_tokens, classify_vocabulary

RESPONSES_A_PROMPT = 16
PROMPT_LENGTH = 512
VOCABULARY = 151_665


def make_batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Ragged responses as verl pads them: float32 log-probs in nats and an int64 mask, all (rows, length)."""
    random = torch.Generator().manual_seed(0)
    old = -torch.rand(rows, length, generator=random) * 4
    gap = torch.randn(rows, length, generator=random) * 0.5
    # One token in a thousand is far off, so that the bound has something to do.
    gap[torch.rand(rows, length, generator=random) < 1e-3] = -8.0
    lengths = torch.randint(max(length // 8, 1), length + 1, (rows,), generator=random)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"teacher_log_probs": old + gap, "old_log_probs": old, "response_mask": mask}


def make_rivals(batch: dict[str, torch.Tensor]) -> dict:
    """By name, the functions to time; each takes nothing."""
    teacher, old, mask = batch.values()
    signal = read_signal_config(None, "gndpo").signal
    rewards = torch.zeros_like(old)
    rewards[:, 0] = torch.randint(0, 2, (len(old),), generator=torch.Generator().manual_seed(0)).float()
    index = np.array([str(i // RESPONSES_A_PROMPT) for i in range(len(old))], dtype=object)
    grpo = get_adv_estimator_fn("grpo")

    def released():
        return masked_whiten(torch.clamp(teacher - old, -5, 5), mask) * mask

    def ours():
        return compute_advantages(**batch, signal=signal)

    lengths = mask.sum(1).numpy()
    random = np.random.default_rng(0)
    prompts, responses = (random.integers(0, VOCABULARY, n) for n in (len(old) * PROMPT_LENGTH, lengths.sum()))
    prompt_lengths = np.full(len(old), PROMPT_LENGTH)
    # About as many digits and marks as in worked solutions.
    texts = np.array(["word", "7", "}"])[random.choice(3, VOCABULARY, p=[0.65, 0.15, 0.2])]
    table = classify_vocabulary(texts, special=[0, 1], eos=[0], placeholders=[1])
    sources = [f"source {i % 2}" for i in range(len(old))]

    def describe(advantages):
        tokens = pack(**batch, advantages=advantages, signal=signal)
        parts = sum_parts(tokens, lengths)
        classes = classify_tokens(table, responses, lengths, prompts, prompt_lengths)
        return (
            describe_signal(tokens, signal)
            | describe_positions(parts)
            | describe_sources(tokens, parts, sources)
            | describe_responses(tokens, lengths, classes)
            | describe_classes(tokens, classes)
        )

    def ours_with_metrics():
        return describe(ours())

    def verl_grpo():
        return grpo(token_level_rewards=rewards, response_mask=mask, index=index)

    return {"released": released, "ours": ours, "ours_with_metrics": ours_with_metrics, "verl_grpo": verl_grpo}


def heaps() -> dict:
    """By name, what to do before each call; `fresh` only where the C library has malloc_trim (glibc)."""
    trim = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "malloc_trim", None)
    return ({"fresh": lambda: trim(0)} if trim else {}) | {"warm": lambda: None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()

    batch = make_batch(args.rows, args.length)
    rivals = make_rivals(batch)
    difference = (rivals["ours"]() - rivals["released"]()).abs().max().item()
    results = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for heap, before in heaps().items():
            samples = time_in_turns(rivals, args.rounds, before)
            seconds = medians(samples)
            least = {name: min(values) for name, values in samples.items()}
            results.append(
                {
                    "threads": threads,
                    "heap": heap,
                    "seconds": seconds,
                    "seconds_min": least,
                    "speedup_vs_released": seconds["released"] / seconds["ours"],
                    "with_metrics_vs_released": seconds["ours_with_metrics"] / seconds["released"],
                    "speedup_vs_released_of_minima": least["released"] / least["ours"],
                    "with_metrics_vs_released_of_minima": least["ours_with_metrics"] / least["released"],
                    "grpo_vs_released": seconds["verl_grpo"] / seconds["released"],
                    "metrics_s": seconds["ours_with_metrics"] - seconds["ours"],
                }
            )
    figures = {
        "machine": machine(),
        "shape": [args.rows, args.length],
        "tokens": int(batch["response_mask"].sum()),
        "rounds": args.rounds,
        "max_abs_diff": difference,
        "results": results,
    }
    write_json(args.json, figures)
    print_table(
        f"estimator, {args.rows} x {args.length}, {figures['tokens']} valid tokens: median ms of {args.rounds}",
        ["threads, heap", *rivals, "speedup", "of minima", "with metrics", "of minima"],
        [
            [
                f"{r['threads']}, {r['heap']}",
                *(value * 1e3 for value in r["seconds"].values()),
                r["speedup_vs_released"],
                r["speedup_vs_released_of_minima"],
                r["with_metrics_vs_released"],
                r["with_metrics_vs_released_of_minima"],
            ]
            for r in results
        ],
    )
    print("speedup: released / ours (target >= 5); with metrics: ours_with_metrics / released (target <= 1.0)")
    print(f"largest difference of an advantage, ours against released: {difference:.1e}")


if __name__ == "__main__":
    main()
