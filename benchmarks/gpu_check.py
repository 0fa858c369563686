# SPDX-License-Identifier: Apache-2.0
"""Run the teacher's scoring and the student's update on one GPU of a bare machine: errors, seconds and memory.

    python benchmarks/gpu_check.py [PART ...] [--json OUT]     # torch and transformers suffice: no verl, Ray or weights

The model has the sizes of Qwen2.5-VL-7B and random weights; without a GPU it is tiny. Every measurement is one line of
JSON. A part that fails prints its error, and the next one runs. All parts take about four minutes on an H100.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from verl_gndpo.student.projection import Request, ResponseHead
from verl_gndpo.teacher.attention import SharedPromptAttention, attend_by_prompt
from verl_gndpo.teacher.distinct_images import encode_distinct_images
from verl_gndpo.teacher.packing import Layout, PackedPass, PromptGroup, concatenate
from verl_gndpo.teacher.scorer import Rows, Scorer, concatenate_inputs

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
GIB = 2**30
GRID = (1, 36, 28) if CUDA else (1, 4, 4)
"""Patches of the image of a prompt: time, height, width. Four patches make a token."""

# Prompts with the lengths of their responses, in tokens.
LAYOUTS: dict[str, list[tuple[int, list[int]]]] = {
    "16 x 1400": [(600, [1400] * 16)],
    "lognormal": [
        (600, [900, 400, 700, 2500, 1200, 300, 5200, 800, 1500, 650, 2000, 1100, 450, 980, 3100, 600]),
    ],
    "15 x 500 and 16384": [(600, [500] * 15 + [16384])],
    "6 prompts x 16 x 200": [(400, [200] * 16)] * 6,
    "8192 and 16384": [(8192, [16384])],
}
if not CUDA:
    LAYOUTS = {
        name: [(max(prompt // 10, 40), [max(n // 40, 1) for n in lengths]) for prompt, lengths in prompts]
        for name, prompts in LAYOUTS.items()
    }

OUT: list[dict[str, Any]] = []


def say(part: str, **figures: Any) -> None:
    """Print one measurement, and keep it for --json."""
    OUT.append({"part": part, **figures})
    print(json.dumps(OUT[-1]), flush=True)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Measure seconds, and the peak of memory above what was allocated before, in GiB (0 without a GPU)."""
    figures: dict[str, float] = {}
    before = 0
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    synchronize()
    start = time.perf_counter()
    yield figures
    synchronize()
    figures["seconds"] = round(time.perf_counter() - start, 4)
    figures["peak_gib"] = round((torch.cuda.max_memory_allocated() - before) / GIB, 3) if CUDA else 0.0


def fastest(call: Callable[[], Any], rounds: int = 3) -> tuple[dict[str, float], Any]:
    """Return the figures of the fastest of some calls after a first one, and the last result."""
    result = call()
    found = []
    for _ in range(rounds):
        with measured() as figures:
            result = call()
        found.append(figures)
    return min(found, key=lambda figures: figures["seconds"]), result


def build_model(layers: int = 28, vision_layers: int = 32) -> Any:
    """Return a Qwen2.5-VL of the 7B's sizes with random weights on the device; a tiny one without a GPU."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    hidden, inner, heads, shared, vocabulary, vision, vision_inner = 3584, 18944, 28, 4, 152064, 1280, 3420
    sections = [16, 24, 24]
    if not CUDA:
        hidden, inner, heads, shared, vocabulary, vision, vision_inner = 256, 512, 4, 2, 1024, 64, 128
        sections, layers, vision_layers = [8, 12, 12], 2, 2
    config = Qwen2_5_VLConfig(
        tie_word_embeddings=False,
        image_token_id=10,
        video_token_id=11,
        vision_start_token_id=12,
        text_config={
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": shared,
            "vocab_size": vocabulary,
            "max_position_embeddings": 32768,
            "rope_scaling": {"rope_type": "default", "type": "mrope", "mrope_section": sections, "rope_theta": 1e6},
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": vision,
            "intermediate_size": vision_inner,
            "num_heads": 16 if CUDA else 4,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [vision_layers - 1],
        },
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPE)
    try:
        with DEVICE:
            return Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)


def make_rows(prompts: list[tuple[int, list[int]]], images: bool = True) -> tuple[list[PromptGroup], Rows]:
    """Return random rows: prompts, with an image where it fits, and responses of these lengths."""
    generator = torch.Generator().manual_seed(1)
    image_tokens = GRID[1] * GRID[2] // 4
    ids: list[torch.Tensor] = []
    inputs: list[dict[str, Any]] = []
    groups = []
    for prompt, lengths in prompts:
        start = torch.randint(100, 1000, (prompt,), generator=generator)
        image: dict[str, Any] = {}
        if images and prompt > image_tokens + 8:
            start[4 : 4 + image_tokens] = 10
            pixels = torch.randn(GRID[1] * GRID[2], 1176, generator=generator).to(DTYPE)
            image = {"pixel_values": pixels, "image_grid_thw": torch.tensor([GRID])}
        groups.append(PromptGroup(tuple(range(len(ids), len(ids) + len(lengths))), prompt, tuple(lengths)))
        for length in lengths:
            ids.append(torch.cat([start, torch.randint(100, 1000, (length,), generator=generator)]))
            inputs.append(image)
    rows = Rows(
        ids=ids,
        positions=[torch.arange(len(x)) for x in ids],
        lengths=[length for _, lengths in prompts for length in lengths],
        images=inputs,
        sampled=[torch.zeros(len(x), dtype=torch.bool) for x in ids],
    )
    return groups, rows


def score(model: Any, scorer: Scorer, groups: list[PromptGroup], rows: Rows) -> torch.Tensor:
    """Return the log-probs of one micro-batch, (response tokens,)."""
    return scorer.score(model, PackedPass(tuple(groups)), rows, device=DEVICE, dtype=DTYPE)[:, 0]


# --- parts ------------------------------------------------------------------------------------------------------------

RACE = """
import sys, time
from contextlib import nullcontext
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
cuda = torch.cuda.is_available()
device = "cuda" if cuda else "cpu"
dist.init_process_group("fake", store=FakeStore(), rank=7, world_size=8)
# The vision MLP of Qwen2.5-VL-7B: 3,420 rows over 8 ranks are uneven.
sizes = (1280, 3420, 32) if cuda else (32, 60, 4)
layers = [torch.nn.Linear(*sizes[:2], device=device, dtype=torch.bfloat16) for _ in range(sizes[2])]
model = torch.nn.Sequential(*layers)
mesh = init_device_mesh(device, (8,))
for layer in model:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
sys.path.insert(0, sys.argv[1])
from verl_gndpo.verl_patches.offload import waiting_for_copies
for way in ("asynchronous", "waiting", "blocking"):
    for busy in (False, True):
        for parameter in model.parameters():
            parameter._local_tensor.fill_(1.0)
        if cuda:
            torch.cuda.synchronize()
            if busy:
                torch.cuda._sleep(int(2e9))
        start = time.perf_counter()
        with waiting_for_copies(lambda: cuda and torch.cuda.synchronize()) if way == "waiting" else nullcontext():
            model.to("cpu", non_blocking=way != "blocking")
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        wrong = sum(int((p._local_tensor != 1).sum()) for p in model.parameters())
        total = sum(p._local_tensor.numel() for p in model.parameters())
        print(f"{way} {int(busy)} {wrong} {total} {seconds:.3f}", flush=True)
        model.to(0 if cuda else "cpu")
"""


def part_race(*_: Any) -> None:
    """Offload unevenly sharded FSDP2 parameters from a busy GPU, and count the values that are wrong on the host."""
    done = subprocess.run([sys.executable, "-c", RACE, sys.path[0]], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    for line in done.stdout.splitlines():
        way, busy, wrong, total, seconds = line.split()
        say("race", way=way, busy=bool(int(busy)), wrong=int(wrong), values=int(total), seconds=float(seconds))


def needed_attention(groups: list[PromptGroup]) -> int:
    """Return the number of pairs of query and key that the attention of these groups needs."""
    return sum(
        group.prompt * (group.prompt + 1) // 2
        + sum(length * group.prompt + length * (length + 1) // 2 for length in group.responses)
        for group in groups
    )


def part_score(model: Any, scorer: Scorer) -> None:
    """Score each layout, and compare the first tokens of some rows with a plain forward pass."""
    for name, prompts in LAYOUTS.items():
        groups, rows = make_rows(prompts)
        figures, scored = fastest(lambda: score(model, scorer, groups, rows))  # noqa: B023
        tokens = sum(group.tokens for group in groups)
        starts = torch.tensor([0, *rows.lengths]).cumsum(0)
        differences = []
        for row in range(min(4, len(rows.ids))):
            count = min(64, rows.lengths[row])
            plain = scorer.score_plainly(model, row, rows, count, whole=False, device=DEVICE, dtype=DTYPE)
            differences.append((scored[starts[row] : starts[row] + count] - plain).abs())
        difference = torch.cat(differences)
        say(
            "score",
            layout=name,
            tokens=tokens,
            response_tokens=len(scored),
            **figures,
            tokens_per_second=round(tokens / figures["seconds"]),
            attention_pairs=needed_attention(groups),
            mean_diff=round(difference.mean().item(), 6),
            max_diff=round(difference.max().item(), 6),
            finite=bool(scored.isfinite().all()),
        )


def part_precision(model: Any, scorer: Scorer) -> None:
    """Compare log-probs from logits in bfloat16 and in float32 with those of float64, for the 7B's projection."""
    hidden_size, vocabulary = (3584, 152064) if CUDA else (256, 1024)
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight = (torch.randn(vocabulary, hidden_size, generator=generator, device=DEVICE) * hidden_size**-0.5).bfloat16()
    # Logits with a spread of 4, as trained models have.
    hidden = (torch.randn(256, hidden_size, generator=generator, device=DEVICE) * 4).bfloat16()
    ids = torch.randint(0, vocabulary, (256,), generator=generator, device=DEVICE)

    def log_probs(logits: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]

    exact = log_probs(torch.cat([hidden.double() @ part.double().T for part in weight.split(16384)], 1))
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "bfloat16 logits": lambda: (hidden @ weight.T).float(),
        "float32 operands": lambda: hidden.float() @ weight.float().T,
        "float32 logits of bfloat16 operands": lambda: torch.mm(hidden, weight.T, out_dtype=torch.float32),
    }
    for name, logits in ways.items():
        try:
            figures, result = fastest(logits)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            say("precision", way=name, error=str(error).splitlines()[0])
            continue
        difference = (log_probs(result).double() - exact).abs()
        say("precision", way=name, **figures, mean_diff=difference.mean().item(), max_diff=difference.max().item())


def part_grouped_query(*_: Any) -> None:
    """Attend with keys and values repeated for each query head, and with the kernels' own grouped queries."""
    heads, shared, batch, queries, keys = (28, 4, 16, 1400, 2000) if CUDA else (4, 2, 2, 20, 30)
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = (batch, heads, queries, 128), (batch, shared, keys, 128), (batch, shared, keys, 128)
    query, key, value = (torch.randn(shape, generator=generator, device=DEVICE).to(DTYPE) for shape in shapes)
    mask = causal_lower_right(queries, keys)

    def repeated() -> torch.Tensor:
        full = (x.repeat_interleave(heads // shared, 1) for x in (key, value))
        return scaled_dot_product_attention(query, *full, attn_mask=mask)

    def grouped() -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

    expected = None
    for name, attend in {"repeated": repeated, "grouped": grouped}.items():
        try:
            figures, out = fastest(attend)
        except (RuntimeError, ValueError) as error:
            say("grouped_query", way=name, error=str(error).splitlines()[0])
            continue
        expected = out if expected is None else expected
        say("grouped_query", way=name, **figures, max_diff=(out - expected).abs().max().item())


def part_varlen(*_: Any) -> None:
    """Attend to one long response among short ones: one call each, padded to the longest, grouped, and packed."""
    heads, shared, prompt = (28, 4, 600) if CUDA else (4, 2, 40)
    lengths = [500] * 15 + [16384] if CUDA else [12] * 15 + [400]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, 128, generator=generator, device=DEVICE).to(DTYPE)

    query, key, value = random(heads, sum(lengths)), random(shared, sum(lengths)), random(shared, sum(lengths))
    before = random(shared, prompt), random(shared, prompt)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    parts = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]

    def with_prompt(part: slice) -> tuple[torch.Tensor, ...]:
        return tuple(torch.cat([b, x[:, :, part]], 2) for b, x in zip(before, (key, value), strict=True))

    def padded() -> torch.Tensor:
        longest = max(lengths)
        pad = torch.nn.functional.pad
        q = torch.cat([pad(query[:, :, p], (0, 0, 0, longest - (p.stop - p.start))) for p in parts])
        k, v = (
            torch.cat([pad(x, (0, 0, 0, longest + prompt - x.shape[2])) for x in xs])
            for xs in zip(*(with_prompt(p) for p in parts), strict=True)
        )
        k, v = (x.repeat_interleave(heads // shared, 1) for x in (k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(longest, longest + prompt))
        return torch.cat([out[i : i + 1, :, :length] for i, length in enumerate(lengths)], 2)

    def one_by_one() -> torch.Tensor:
        out = []
        for part in parts:
            length = part.stop - part.start
            mask = causal_lower_right(length, length + prompt)
            attended = scaled_dot_product_attention(
                query[:, :, part], *with_prompt(part), attn_mask=mask, enable_gqa=True
            )
            out.append(attended)
        return torch.cat(out, 2)

    # As a run attends: responses of similar length as one batch, behind their prompt, which attends to itself.
    layout = Layout([PromptGroup(tuple(range(len(lengths))), prompt, tuple(lengths))], DEVICE)
    row = (
        torch.cat([random(heads, prompt), query], 2),
        *(torch.cat([b, x], 2) for b, x in zip(before, (key, value), strict=True)),
    )

    def grouped() -> torch.Tensor:
        return attend_by_prompt(layout, *row, None, None)[:, :, prompt:]

    def packed() -> torch.Tensor:
        from inspect import signature

        from torch.nn.attention.varlen import varlen_attn

        k, v = (torch.cat(xs, 2)[0].transpose(0, 1) for xs in zip(*(with_prompt(p) for p in parts), strict=True))
        sizes = torch.tensor(lengths, device=DEVICE, dtype=torch.int32)
        starts_q, starts_k = (
            torch.nn.functional.pad(x.cumsum(0, dtype=torch.int32), (1, 0)) for x in (sizes, sizes + prompt)
        )
        known = signature(varlen_attn).parameters
        options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(heads // shared, 1) for x in (k, v))
        q = query[0].transpose(0, 1).contiguous()
        longest = max(lengths)
        out = varlen_attn(q, k.contiguous(), v.contiguous(), starts_q, starts_k, longest, longest + prompt, **options)
        return out.transpose(0, 1)[None]

    expected = None
    for name, attend in {"one by one": one_by_one, "padded": padded, "grouped": grouped, "packed": packed}.items():
        try:
            figures, out = fastest(attend)
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            say("varlen", way=name, error=str(error).splitlines()[0])
            continue
        expected = out if expected is None else expected
        say("varlen", way=name, **figures, max_diff=(out - expected).abs().max().item())


def part_kernels(model: Any, scorer: Scorer) -> None:
    """Name the kernels that take the most time."""
    groups, rows = make_rows(LAYOUTS["lognormal"])
    activities = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if CUDA else [])
    with torch.profiler.profile(activities=activities) as profile:
        score(model, scorer, groups, rows)
        synchronize()
    key = "self_device_time_total" if CUDA else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    for event in events[:12]:
        own = getattr(event, key)
        say("kernels", name=event.key[:80], calls=event.count, ms=round(own / 1e3, 2), share=round(own / total, 3))


def part_chunks(model: Any, scorer: Scorer) -> None:
    """Vary the number of response tokens whose logits exist at the same time."""
    groups, rows = make_rows(LAYOUTS["16 x 1400"], images=False)
    before = scorer.head._chunk_tokens
    for chunk in (128, 256, 512, 1024, 4096):
        scorer.head._chunk_tokens = chunk
        figures, _ = fastest(lambda: score(model, scorer, groups, rows), rounds=2)
        say("chunks", chunk=chunk, **figures)
    scorer.head._chunk_tokens = before


def part_full_logits(model: Any, scorer: Scorer) -> None:
    """Score row by row with logits of all tokens and a float32 log-softmax, as the released code does."""
    groups, rows = make_rows([(600, [1400] * 4)] if CUDA else [(60, [35] * 4)])

    def row_by_row() -> torch.Tensor:
        parts = []
        for row, ids in enumerate(rows.ids):
            inputs = {name: value.to(DEVICE) for name, value in rows.images[row].items()}
            inputs["position_ids"] = rows.positions[row].to(DEVICE).expand(4, 1, -1)
            autocast = torch.autocast("cuda", dtype=DTYPE) if CUDA else nullcontext()
            with torch.no_grad(), autocast, scorer.attention.plainly():
                logits = model(input_ids=ids[None].to(DEVICE), **inputs, use_cache=False).logits[0]
            log_probs = logits.float().log_softmax(-1)
            length = rows.lengths[row]
            targets = ids[-length:].to(DEVICE)
            parts.append(log_probs[-length - 1 : -1].gather(-1, targets[:, None])[:, 0])
        return torch.cat(parts)

    reference, expected = fastest(row_by_row, rounds=2)
    figures, scored = fastest(lambda: score(model, scorer, groups, rows), rounds=2)
    say("full_logits", way="row by row, all logits", **reference)
    difference = (scored - expected).abs()
    say(
        "full_logits",
        way="ours",
        **figures,
        speedup=round(reference["seconds"] / figures["seconds"], 2),
        mean_diff=difference.mean().item(),
        max_diff=difference.max().item(),
    )


def part_student(*_: Any) -> None:
    """Run an update of a student with few layers: row by row with all logits, and with shared prompts."""
    model = build_model(layers=4, vision_layers=4).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    groups, rows = make_rows([(600, [1400] * 4)] if CUDA else [(60, [35] * 4)])
    advantages = torch.randn(sum(rows.lengths), generator=torch.Generator().manual_seed(2)).to(DEVICE) / len(rows.ids)
    targets = torch.cat([ids[len(ids) - n :] for ids, n in zip(rows.ids, rows.lengths, strict=True)]).to(DEVICE)

    def inputs(ids: torch.Tensor, positions: torch.Tensor, images: list[dict[str, Any]]) -> dict[str, Any]:
        found = {"input_ids": ids[None], "position_ids": positions.expand(4, 1, -1)} | concatenate_inputs(images)
        return {name: value.to(DEVICE) for name, value in found.items()} | {"use_cache": False}

    def row_by_row() -> torch.Tensor:
        model.zero_grad()
        parts = []
        each = zip(rows.ids, rows.positions, rows.images, rows.lengths, strict=True)
        weights = advantages.split(rows.lengths)
        for (ids, positions, images, length), weight in zip(each, weights, strict=True):
            logits = model(**inputs(ids, positions, [images])).logits[0]
            log_probs = logits[:-1].float().log_softmax(-1).gather(-1, ids[1:, None].to(DEVICE))[-length:, 0]
            (log_probs * weight).sum().backward()
            parts.append(log_probs.detach())
        return torch.cat(parts)

    reference, expected = fastest(row_by_row, rounds=2)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    head = ResponseHead(model.get_output_embeddings(), 256)
    shared = SharedPromptAttention(model)
    encode_distinct_images(model)

    def update() -> torch.Tensor:
        model.zero_grad()
        layout = Layout(groups, DEVICE)
        images = [rows.images[group.rows[0]] for group in groups]
        packed = inputs(concatenate(groups, rows.ids), concatenate(groups, rows.positions), images)
        with shared.attending(layout), head.answering(Request(layout.predicting, targets, 1.0)):
            log_probs = model(**packed).logits[:, 0]
            (log_probs * advantages).sum().backward()
        return log_probs.detach()

    figures, scored = fastest(update, rounds=2)
    say("student", way="row by row, all logits", **reference)
    ours = [p.grad for p in model.parameters() if p.grad is not None]
    apart = [(one.float() - other.float()).norm() for one, other in zip(ours, gradients, strict=True)]
    whole = torch.stack([gradient.float().norm() for gradient in gradients]).norm()
    difference = (scored - expected).abs()
    say(
        "student",
        way="ours",
        **figures,
        speedup=round(reference["seconds"] / figures["seconds"], 2),
        mean_diff=difference.mean().item(),
        max_diff=difference.max().item(),
        gradient_diff=(torch.stack(apart).norm() / whole).item(),
    )


def part_flex(model: Any, scorer: Scorer) -> None:
    """Score with FlexAttention in place of scaled_dot_product_attention."""
    from torch._dynamo.utils import counters

    for name in ("16 x 1400", "15 x 500 and 16384", "6 prompts x 16 x 200"):
        groups, rows = make_rows(LAYOUTS[name])
        expected = score(model, scorer, groups, rows)
        scorer.attention._flex = True
        try:
            with measured() as first:
                score(model, scorer, groups, rows)
            figures, scored = fastest(lambda: score(model, scorer, groups, rows), rounds=2)  # noqa: B023
        finally:
            scorer.attention._flex = False
        say(
            "flex",
            layout=name,
            first_seconds=first["seconds"],
            **figures,
            mean_diff=(scored - expected).abs().mean().item(),
            graphs=counters["stats"].get("unique_graphs", 0),
        )


def part_offload(model: Any, scorer: Scorer) -> None:
    """Shard the model with FSDP2 on one rank, and time its way to the host and back. Last, because it stays sharded."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo")
    groups, rows = make_rows(LAYOUTS["6 prompts x 16 x 200"])
    expected = score(model, scorer, groups, rows)
    policy = MixedPrecisionPolicy(param_dtype=DTYPE, reduce_dtype=torch.float32, cast_forward_inputs=True)
    options: dict[str, Any] = {"mesh": init_device_mesh(DEVICE.type, (1,)), "mp_policy": policy}
    layers = ("Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock")
    for module in list(model.modules()):
        if type(module).__name__ in layers or isinstance(module, torch.nn.Embedding):
            fully_shard(module, **options)
    fully_shard(model, **options)
    for number in range(3):
        for blocking in (False, True):
            with measured() as down:
                model.to("cpu", non_blocking=not blocking)
                if CUDA:
                    torch.cuda.empty_cache()
            left = torch.cuda.memory_reserved() / GIB if CUDA else 0.0
            with measured() as up:
                model.to(DEVICE, non_blocking=not blocking)
            with measured() as scoring:
                scored = score(model, scorer, groups, rows)
            host = torch.cuda.host_memory_stats() if CUDA else {}
            say(
                "offload",
                round=number,
                blocking=blocking,
                down_seconds=down["seconds"],
                up_seconds=up["seconds"],
                score_seconds=scoring["seconds"],
                reserved_after_gib=round(left, 2),
                pinned_peak_gib=round(host.get("allocated_bytes.peak", 0) / GIB, 2),
                max_diff=(scored - expected).abs().max().item(),
            )
    dist.destroy_process_group()


PARTS: dict[str, Callable[..., None]] = {
    "race": part_race,
    "grouped_query": part_grouped_query,
    "varlen": part_varlen,
    "precision": part_precision,
    "student": part_student,
    "score": part_score,
    "full_logits": part_full_logits,
    "chunks": part_chunks,
    "kernels": part_kernels,
    "flex": part_flex,
    "offload": part_offload,
}
WITHOUT_MODEL = {"race", "grouped_query", "varlen", "precision", "student"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; all by default")
    parser.add_argument("--json", type=Path, help="write all lines here, too")
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known are {', '.join(PARTS)}")
    warnings.simplefilter("ignore")
    if not CUDA:
        # Beside a CPU build of torch, torchvision from PyPI can't be imported otherwise.
        from verl_gndpo.platforms import torchvision_ops

        torchvision_ops.install()
    import transformers

    name = torch.cuda.get_device_name() if CUDA else "cpu"
    say("machine", device=name, torch=torch.__version__, transformers=transformers.__version__)
    chosen = args.parts or list(PARTS)
    model = scorer = None
    begin = time.perf_counter()
    for part in chosen:
        start = time.perf_counter()
        try:
            if model is None and part not in WITHOUT_MODEL:
                model = build_model()
                scorer = Scorer(model, chunk_tokens=256, temperature=1.0)
                weights = sum(p.numel() * p.element_size() for p in model.parameters())
                say("build", seconds=round(time.perf_counter() - start, 1), weights_gib=round(weights / GIB, 2))
            PARTS[part](model, scorer)
        # Each part has to survive the failure of another.
        except Exception as error:
            say(part, error=f"{type(error).__name__}: {error}"[:600])
            traceback.print_exc(limit=-3)
        say("time", of=part, seconds=round(time.perf_counter() - start, 1))
    say("time", of="all", seconds=round(time.perf_counter() - begin, 1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        partial = args.json.with_name(f"{args.json.name}.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in OUT))
        partial.replace(args.json)


if __name__ == "__main__":
    main()
