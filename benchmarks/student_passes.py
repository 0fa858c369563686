# SPDX-License-Identifier: Apache-2.0
"""The student's two passes over the responses to one prompt with an image: verl's FSDP engine, and the same with
`student.share_prompts=True`.

    python benchmarks/student_passes.py [--json OUT] [--shapes n8 n1 skewed] [--rounds 3]

`old_log_prob` is `infer_batch` with entropies, as verl's trainers ask for it. `update` is the forward and the backward
pass of verl's policy loss, without the optimizer's step. The vision tower is frozen and there is no gradient
checkpointing, in float32. The model is a 115M Qwen2.5-VL with random weights; the image is drawn and went through
Qwen's image processor. Each pass of each engine runs in a process of its own, with the same number of threads, and the
engines take turns. A process loads the model, runs another batch of the same sizes first, and then the one that is
timed.

`processor_s` is the processor time of the timed pass on all cores, which is more reliable than seconds when other
programs compete for them. `peak_gb` is the peak of the resident memory above the loaded model. The log-probs and the
norm of the gradient of both engines are compared in each run.

`floor` is the share of verl's arithmetic that remains: matrix products of the language model, the projection and the
tower, counted from the shapes, where the update computes the logits twice, and without the padding of verl's
micro-batches. It is the least ratio of seconds for engines that run at the same rate.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import teacher_scoring
import torch
import verl  # noqa: F401  loads the plugin
from _common import machine, print_table, resident, write_json
from teacher_scoring import Shape

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("verl", "shared")
PASSES = ("old_log_prob", "update")
TARGETS = {
    "n8": {"old_log_prob": (1 / 4, 0.1), "update": (1 / 2.5, 0.2)},
    "n1": {"old_log_prob": (1.0, 1.0), "update": (1.0, 1.0)},
    "skewed": {"old_log_prob": (1 / 1.5, 1.0), "update": (1 / 1.5, 1.0)},
}
"""By shape and pass, the ratios of seconds and of memory to reach."""


@dataclass(frozen=True)
class Batch:
    """A shape of `teacher_scoring`, and the lengths of its responses."""

    shape: Shape
    lengths: tuple[int, ...]
    max_tokens: int = 1 << 20
    """Tokens of a micro-batch."""


def uniform(shape: Shape) -> Batch:
    return Batch(shape, (shape.response_tokens,) * shape.responses)


SHAPES = {name: uniform(teacher_scoring.SHAPES[name]) for name in ("n8", "n1", "small")}
# Fifteen short responses and one that is 16 times longer. All logits of all rows at once would take 20 GB.
_LONG = replace(
    teacher_scoring.SHAPES["n8"], name="115M, n=16, 320 image + 15 x 8 and 128 response tokens", responses=16
)
SHAPES["skewed"] = Batch(_LONG, (8,) * 15 + (128,), max_tokens=4096)


def gigaflops(batch: Batch, what: str, shared: bool) -> float:
    """Return the arithmetic of a pass in matrix products, attention left out, in units of 10^9 operations."""
    shape, count = batch.shape, len(batch.lengths)
    heads = shape.hidden // 64
    layer = 2 * shape.hidden**2 + 2 * shape.hidden * 128 + 3 * shape.hidden * 3 * shape.hidden
    tower_layer = 4 * (40 * heads) ** 2 + 3 * 40 * heads * 120 * heads
    prompt, responses = shape.length - shape.response_tokens, sum(batch.lengths)
    tokens = prompt * (1 if shared else count) + responses
    logits = responses if shared else tokens
    patches = shape.grid[0] * shape.grid[1] * (1 if shared else count)
    times, projections = (1, 1) if what == "old_log_prob" else (3, 4 if shared else 3)
    work = times * tokens * layer * shape.layers + projections * logits * shape.hidden * shape.vocabulary
    return 2 * (work + patches * tower_layer * shape.layers) / 1e9


def data_of(batch: Batch, number: int, folder: Path):
    """Return a batch as verl's trainer sends it to the actor."""
    from tensordict import TensorDict
    from tensordict.tensorclass import NonTensorStack
    from verl.utils import tensordict_utils as tu
    from verl.utils.tensordict_utils import nested_tensor_from_tensor_list as nested

    stored = torch.load(folder / "batches.pt")[number]
    generator = torch.Generator().manual_seed(number)
    ids, prompt = stored["ids"], stored["ids"].shape[1] - batch.shape.response_tokens
    rows = [row[: prompt + length] for row, length in zip(ids, batch.lengths, strict=True)]
    text = torch.arange(ids.shape[1])[None]
    positions = [
        torch.cat([text, axes])[:, : len(row)] for axes, row in zip(stored["positions"].unbind(1), rows, strict=True)
    ]
    random = [torch.randn(length, generator=generator) for length in batch.lengths]
    mask = nested([torch.ones(length, dtype=torch.int64) for length in batch.lengths])
    # verl gives each row its own copy of the image.
    images = [{"pixel_values": stored["patches"].clone(), "image_grid_thw": stored["grid"]} for _ in rows]
    data = TensorDict(
        {
            "input_ids": nested(rows),
            "position_ids": nested(positions, ragged_idx=2),
            "response_mask": mask,
            "loss_mask": mask,
            "prompts": nested([row[:prompt] for row in rows]),
            "responses": nested([row[prompt:] for row in rows]),
            "advantages": nested(random),
            "old_log_probs": nested([-12 + 0.01 * value for value in random]),
            "multi_modal_inputs": NonTensorStack(*images),
        },
        batch_size=len(rows),
    )
    tu.assign_non_tensor(
        data,
        temperature=1.0,
        global_batch_size=len(rows),
        use_dynamic_bsz=True,
        max_token_len_per_gpu=batch.max_tokens,
        use_remove_padding=False,
    )
    return data


def start(name: str, folder: Path):
    """Start an engine on one gloo rank in this process, and return it with verl's policy loss."""
    from hydra import compose, initialize_config_module
    from verl.trainer.config import CheckpointConfig
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    from verl_gndpo.student.engine import StudentEngineConfig
    from verl_gndpo.student.run import MODEL_TYPE

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", RAY_LOCAL_WORLD_SIZE="1")
    shared = name == "shared"
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type=MODEL_TYPE if shared else "language_model",
            model_config=HFModelConfig(
                path=str(folder / "model"),
                use_remove_padding=False,
                load_tokenizer=False,
                enable_gradient_checkpointing=False,
                override_config={"attn_implementation": "sdpa"},
            ),
            engine_config=(StudentEngineConfig if shared else FSDPEngineConfig)(
                strategy="fsdp2",
                model_dtype="float32",
                mixed_precision={"param_dtype": "float32", "reduce_dtype": "float32", "buffer_dtype": "float32"},
                use_torch_compile=False,
            ),
            optimizer_config=FSDPOptimizerConfig(lr=1e-6, total_training_steps=1),
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    worker.engine.module.model.visual.requires_grad_(False)
    actor = "actor_rollout_ref.actor"
    with initialize_config_module("verl.trainer.config", version_base=None):
        overrides = [f"{actor}.use_dynamic_bsz=True", f"{actor}.ppo_max_token_len_per_gpu=8192"]
        config = compose("ppo_trainer", overrides=["actor_rollout_ref.rollout.name=vllm", *overrides])
    return worker.engine, partial(ppo_loss, config=omega_conf_to_dataclass(config.actor_rollout_ref.actor))


def measure(name: str, what: str, batch: Batch, folder: Path, threads: int) -> None:
    """Measure one pass of one engine in this process, and write figures and log-probs into `folder`."""
    from verl.utils import tensordict_utils as tu

    torch.set_num_threads(threads)
    engine, loss = start(name, folder)

    def run(data) -> tuple[torch.Tensor, float]:
        update = what == "update"
        tu.assign_non_tensor(data, calculate_entropy=not update, return_model_output=True)
        with engine.train_mode() if update else engine.eval_mode():
            if update:
                output = engine.forward_backward_batch(data, loss, forward_only=False)
            else:
                output = engine.infer_batch(data, loss_function=None)
            gradients = [p.grad.double().square().sum() for p in engine.module.parameters() if p.grad is not None]
            norm = float(sum(getattr(g, "_local_tensor", g) for g in gradients)) ** 0.5
        rows = output["model_output"]["log_probs"].unbind()
        return torch.cat([x[-n - 1 : -1] for x, n in zip(rows, batch.lengths, strict=True)]), norm

    batches = [data_of(batch, number, folder) for number in (0, 1)]
    loaded = resident("VmRSS")
    # This resets the kernel's high-water mark, so that it excludes the loading of the model.
    Path("/proc/self/clear_refs").write_text("5")
    run(batches[0])
    began, busy = time.perf_counter(), time.process_time()
    log_probs, norm = run(batches[1])
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    torch.save(log_probs, folder / f"{name}_{what}.pt")
    figures = {"seconds": seconds, "processor_s": busy, "peak_gb": resident("VmHWM") - loaded, "gradient_norm": norm}
    write_json(folder / f"{name}_{what}.json", figures)


def call(name: str, what: str, shape: str, folder: Path, threads: int) -> dict:
    """Start the process of `measure` and return its figures."""
    log = folder / f"{name}_{what}.log"
    command = [sys.executable, __file__, "--measure", name, what, shape, str(folder), "--threads", str(threads)]
    with log.open("w") as sink:
        code = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT).returncode
    if code != 0:
        print("\n".join(log.read_text(errors="replace").splitlines()[-60:]))
        sys.exit(f"{what} with {name} failed with exit code {code}")
    return json.loads((folder / f"{name}_{what}.json").read_text())


def compare(name: str, rounds: int, threads: int) -> list[dict]:
    """Return one row per pass: medians over `rounds` of both engines, and their ratios."""
    batch, rows = SHAPES[name], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher_scoring.build(batch.shape, folder)
        for what in PASSES:
            samples = {engine: [] for engine in ENGINES}
            for _ in range(rounds):
                for engine in ENGINES:
                    samples[engine].append(call(engine, what, name, folder, threads))
            median = {
                engine: {
                    key: statistics.median(sample[key] for sample in samples[engine]) for key in samples[engine][0]
                }
                for engine in ENGINES
            }
            ours, theirs = median["shared"], median["verl"]
            log_probs = [torch.load(folder / f"{engine}_{what}.pt") for engine in ENGINES]
            work = [gigaflops(batch, what, shared) for shared in (False, True)]
            rows.append(
                {
                    "shape": batch.shape.name,
                    "pass": what,
                    "verl_s": theirs["seconds"],
                    "shared_s": ours["seconds"],
                    "seconds_ratio": ours["seconds"] / theirs["seconds"],
                    "verl_processor_s": theirs["processor_s"],
                    "shared_processor_s": ours["processor_s"],
                    "processor_ratio": ours["processor_s"] / theirs["processor_s"],
                    "floor": work[1] / work[0],
                    "verl_gb": theirs["peak_gb"],
                    "shared_gb": ours["peak_gb"],
                    "memory_ratio": ours["peak_gb"] / theirs["peak_gb"],
                    "verl_gflops_per_s": work[0] / theirs["seconds"],
                    "shared_gflops_per_s": work[1] / ours["seconds"],
                    "max_abs_diff": float((log_probs[0] - log_probs[1]).abs().max()),
                    "gradient_norm_diff": abs(ours["gradient_norm"] - theirs["gradient_norm"])
                    / max(theirs["gradient_norm"], 1e-30),
                    "targets": TARGETS.get(name, {}).get(what),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["n8", "n1", "skewed"], help="small: tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--measure", nargs=4, metavar=("ENGINE", "PASS", "SHAPE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        engine, what, shape, folder = args.measure
        measure(engine, what, SHAPES[shape], Path(folder), args.threads)
        return
    rows = [row for shape in args.shapes for row in compare(shape, args.rounds, args.threads)]
    write_json(args.json, {"machine": machine(), "threads": args.threads, "rounds": args.rounds, "rows": rows})
    columns = (
        "pass",
        "verl_s",
        "shared_s",
        "seconds_ratio",
        "processor_ratio",
        "floor",
        "verl_gb",
        "shared_gb",
        "memory_ratio",
    )
    checks = ("max_abs_diff", "gradient_norm_diff", "targets")
    for shape in dict.fromkeys(row["shape"] for row in rows):
        table = [[row[key] for key in (*columns, *checks)] for row in rows if row["shape"] == shape]
        print_table(f"{shape}: medians of {args.rounds}", [*columns, *checks], table)


if __name__ == "__main__":
    # For examples.quickstart, which draws no data here but builds tokenizer and processor.
    sys.path.append(str(ROOT))
    main()
