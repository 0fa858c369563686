# SPDX-License-Identifier: Apache-2.0
"""Time every preset on one batch, alone and with all metrics, against the released way and verl's grpo.

    python benchmarks/estimator.py [--json OUT] [--rows 512] [--length 4096] [--threads 1 2] [--rounds 15]

Targets, on one thread with a warm heap: `gndpo` at least 5x faster than the released way, every other preset at least
as fast (v_opd's KL divergence is computed elsewhere), and `gndpo` with all metrics in at most the released way's time.

Threads matter (Ray gives the driver one), and so does the heap: where a call finds no free memory mapped, the kernel
faults in each page that it writes. `fresh` returns free memory to the system before every call, as for a process that
comes back from a training step. `warm` calls in a tight loop, where the allocator decides how much is kept. With
several threads and a core that is busy otherwise, every parallel operation waits for the scheduler.
"""

import argparse
import ctypes
import ctypes.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _common import machine, medians, print_table, time_in_turns, write_json
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.utils.torch_functional import masked_whiten

from verl_gndpo.advantage import Trace, compute_advantages
from verl_gndpo.config import read_signal_config
from verl_gndpo.observe.metrics import (
    Tokens,
    describe_classes,
    describe_positions,
    describe_responses,
    describe_signal,
    describe_sources,
    sum_parts,
)
from verl_gndpo.observe.token_classes import classify_tokens, classify_vocabulary
from verl_gndpo.presets import PRESETS

RESPONSES_PER_PROMPT = 16
PROMPT_LENGTH = 512
VOCABULARY = 151_665


def make_batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Return ragged responses as verl pads them: float32 log-probs in nats and an int64 mask, all (rows, length)."""
    random = torch.Generator().manual_seed(0)
    old = -torch.rand(rows, length, generator=random) * 4
    gap = torch.randn(rows, length, generator=random) * 0.5
    # One token in a thousand is far off, so that the bound has something to do.
    gap[torch.rand(rows, length, generator=random) < 1e-3] = -8.0
    lengths = torch.randint(max(length // 8, 1), length + 1, (rows,), generator=random)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"teacher_log_probs": old + gap, "old_log_probs": old, "response_mask": mask}


def make_rivals(batch: dict[str, torch.Tensor]) -> dict[str, Callable[[], object]]:
    """Return the functions to time: `released`, `grpo`, and each preset by its name and as `<name> with metrics`."""
    teacher, old, mask = batch.values()
    rewards = torch.zeros_like(old)
    rewards[:, 0] = torch.randint(0, 2, (len(old),), generator=torch.Generator().manual_seed(0)).float()
    index = np.array([str(i // RESPONSES_PER_PROMPT) for i in range(len(old))], dtype=object)
    grpo = get_adv_estimator_fn("grpo")
    kl = (teacher - old).abs()

    lengths = mask.sum(1).numpy()
    random = np.random.default_rng(0)
    prompts, responses = (random.integers(0, VOCABULARY, n) for n in (len(old) * PROMPT_LENGTH, lengths.sum()))
    prompt_lengths = np.full(len(old), PROMPT_LENGTH)
    # About as many digits and marks as in worked solutions.
    texts = np.array(["word", "7", "}"])[random.choice(3, VOCABULARY, p=[0.65, 0.15, 0.2])]
    table = classify_vocabulary(texts, special=[0, 1], eos=[0], placeholders=[1])
    sources = [f"source {i % 2}" for i in range(len(old))]

    def describe(trace: Trace) -> dict[str, float]:
        tokens = Tokens(trace)
        parts = sum_parts(tokens, lengths)
        classes = classify_tokens(table, responses, lengths, prompts, prompt_lengths)
        return (
            describe_signal(tokens)
            | describe_positions(parts)
            | describe_sources(tokens, parts, sources)
            | describe_responses(tokens, lengths, classes)
            | describe_classes(tokens, classes)
        )

    def released() -> torch.Tensor:
        return masked_whiten(torch.clamp(teacher - old, -5, 5), mask) * mask

    def verl_grpo() -> object:
        return grpo(token_level_rewards=rewards, response_mask=mask, index=index)

    rivals: dict[str, Callable[[], object]] = {"released": released, "grpo": verl_grpo}
    for name in PRESETS:
        run = partial(compute_advantages, **batch, signal=read_signal_config(None, name).signal, groups=index, kl=kl)
        rivals |= {name: run, f"{name} with metrics": partial(run, on_trace=describe)}
    return rivals


def heaps() -> dict[str, Callable[[], object]]:
    """Return what to do before each call, by the heap's name. `fresh` requires glibc's malloc_trim."""
    trim = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "malloc_trim", None)
    return ({"fresh": lambda: trim(0)} if trim else {}) | {"warm": lambda: None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    batch = make_batch(args.rows, args.length)
    rivals = make_rivals(batch)
    difference = (rivals["gndpo"]() - rivals["released"]()).abs().max().item()
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for heap, before in heaps().items():
            for preset in PRESETS:
                names = ("released", "grpo", preset, f"{preset} with metrics")
                seconds = medians(time_in_turns({name: rivals[name] for name in names}, args.rounds, before))
                ours, with_metrics = seconds[preset], seconds[f"{preset} with metrics"]
                rows.append(
                    {
                        "preset": preset,
                        "heap": heap,
                        "threads": threads,
                        "released_s": seconds["released"],
                        "ours_s": ours,
                        "with_metrics_s": with_metrics,
                        "grpo_s": seconds["grpo"],
                        "released_over_ours": seconds["released"] / ours,
                        "with_metrics_over_released": with_metrics / seconds["released"],
                    }
                )
    figures = {
        "machine": machine(),
        "shape": [args.rows, args.length],
        "tokens": int(batch["response_mask"].sum()),
        "rounds": args.rounds,
        "max_abs_diff": difference,
        "rows": rows,
    }
    write_json(args.json, figures)
    print_table(
        f"estimator, {args.rows} x {args.length}, {figures['tokens']} valid tokens: median ms of {args.rounds}",
        [
            "preset",
            "threads, heap",
            "released",
            "grpo",
            "ours",
            "with metrics",
            "released / ours",
            "with metrics / released",
        ],
        [
            [
                row["preset"],
                f"{row['threads']}, {row['heap']}",
                *(row[f"{name}_s"] * 1e3 for name in ("released", "grpo", "ours", "with_metrics")),
                row["released_over_ours"],
                row["with_metrics_over_released"],
            ]
            for row in rows
        ],
    )
    print("speed-up: released / ours; with metrics: ours with metrics / released")
    print(f"largest difference of an advantage, gndpo against released: {difference:.1e}")


if __name__ == "__main__":
    main()
