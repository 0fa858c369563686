# SPDX-License-Identifier: Apache-2.0
"""Teacher scoring of n responses to one prompt with an image: all logits of a plain Hugging Face forward, as the
released code has them, against this project's worker. Targets, for n8: at least 5x faster, at most a quarter of the
memory; for n1: not slower.

    python benchmarks/teacher_scoring.py [--json OUT] [--shapes n8 n1 n16] [--rounds 3]

The model is a 115M Qwen2.5-VL with random weights, saved once. Each call runs in a process of its own, the methods in
turns: the process imports the same modules whatever the method, loads the model, scores once to warm up and once for
the clock. `peak_gb` is what the weights and the scoring added to the process at the highest point (its peak resident
size less what it held before the model was loaded): what an accelerator's memory would have to hold. Beside it stand
the whole process's peak (`peak_rss_gb`) and the peak above the loaded model (`peak_above_model_gb`).
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
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import verl  # noqa: F401  loads the plugin, without which transformers can't import its image models on the CPU
from _common import machine, print_table, write_json

METHODS = ("full_logits", "ours")
VISION_START, VISION_END, IMAGE, VIDEO = range(-4, 0)  # the last ids of the vocabulary


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of the batch; `name` is what the figures call it."""

    name: str
    vocabulary: int
    hidden: int
    layers: int
    responses: int
    response_tokens: int
    prompt_tokens: int
    """Text tokens before, and again after, the image."""
    grid: tuple[int, int]
    """Image patches; four of them make a token."""

    def token(self, special: int) -> int:
        return self.vocabulary + special


SHAPES = {
    "n8": Shape("115M, n=8, 320 image + 128 response tokens", 151936, 512, 8, 8, 128, 30, (32, 40)),
    "n1": Shape("115M, n=1, 320 image + 128 response tokens", 151936, 512, 8, 1, 128, 30, (32, 40)),
    # All its logits at once take 18 GB.
    "n16": Shape("115M, n=16, 320 image + 512 response tokens", 151936, 512, 8, 16, 512, 30, (32, 40)),
    "small": Shape("small, n=4, 16 image + 16 response tokens", 4096, 256, 2, 4, 16, 6, (8, 8)),
}


def build(shape: Shape, folder: Path) -> None:
    """Write `model/` (a checkpoint) and `batch.pt` (ids, image, positions) into `folder`."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    heads = shape.hidden // 64
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": 3 * shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "type": "default",
                "mrope_section": [8, 12, 12],
                "rope_theta": 1e4,
            },
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": shape.layers,
            "hidden_size": 40 * heads,
            "intermediate_size": 120 * heads,
            "num_heads": heads,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "out_hidden_size": shape.hidden,
            "fullatt_block_indexes": [shape.layers // 2 - 1, shape.layers - 1],
        },
        image_token_id=shape.token(IMAGE),
        video_token_id=shape.token(VIDEO),
        vision_start_token_id=shape.token(VISION_START),
        vision_end_token_id=shape.token(VISION_END),
        tie_word_embeddings=True,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )
    model = Qwen2_5_VLForConditionalGeneration._from_config(config)
    model.save_pretrained(folder / "model")

    height, width = shape.grid
    prompt = torch.cat(
        [
            torch.randint(0, 1000, (shape.prompt_tokens,)),
            torch.tensor([shape.token(VISION_START)]),
            torch.full((height * width // 4,), shape.token(IMAGE)),
            torch.tensor([shape.token(VISION_END)]),
            torch.randint(0, 1000, (shape.prompt_tokens,)),
        ]
    )
    responses = torch.randint(0, 1000, (shape.responses, shape.response_tokens))
    ids = torch.cat([prompt.repeat(shape.responses, 1), responses], 1)
    grid = torch.tensor([[1, height, width]])
    positions, _ = model.model.get_rope_index(
        ids, mm_token_type_ids=(ids == shape.token(IMAGE)).int(), image_grid_thw=grid.repeat(shape.responses, 1)
    )
    batch = {"ids": ids, "positions": positions, "response_tokens": shape.response_tokens}
    batch |= {"patches": torch.randn(height * width, 3 * 2 * 14 * 14), "grid": grid}
    torch.save(batch, folder / "batch.pt")


def full_logits(folder: Path):
    """Hugging Face's forward over whole sequences, log_softmax of all logits, gather."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    batch = torch.load(folder / "batch.pt")
    ids = batch["ids"]

    @torch.no_grad()
    def score() -> torch.Tensor:
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=batch["positions"],
            pixel_values=batch["patches"].repeat(len(ids), 1),
            image_grid_thw=batch["grid"].repeat(len(ids), 1),
            use_cache=False,
        ).logits
        log_probs = torch.log_softmax(logits.float(), -1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        return log_probs[:, -batch["response_tokens"] :]

    return score


def ours(folder: Path):
    """The worker that a run uses, on one gloo rank in this process; one micro-batch, as in `full_logits`."""
    from tensordict import TensorDict
    from tensordict.tensorclass import NonTensorStack
    from verl.utils.tensordict_utils import nested_tensor_from_tensor_list

    from verl_gndpo.config import TeacherConfig, TeacherModelConfig
    from verl_gndpo.teacher.worker import TeacherWorker

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", RAY_LOCAL_WORLD_SIZE="1")
    batch = torch.load(folder / "batch.pt")
    ids = batch["ids"]
    model = TeacherModelConfig(path=str(folder / "model"), override_config={"attn_implementation": "sdpa"})
    worker = TeacherWorker(TeacherConfig(model=model, temperature=1.0, max_token_len_per_gpu=ids.numel()))
    worker.reset()

    def nested(rows, ragged_idx: int = 1) -> torch.Tensor:
        return nested_tensor_from_tensor_list(list(rows), ragged_idx=ragged_idx)

    ones = [torch.ones(batch["response_tokens"], dtype=torch.int64)] * len(ids)
    text_positions = torch.arange(ids.shape[1])[None]
    data = TensorDict(
        {
            "input_ids": nested(ids),
            "position_ids": nested((torch.cat([text_positions, p]) for p in batch["positions"].unbind(1)), 2),
            "response_mask": nested(ones),
            "multi_modal_inputs": NonTensorStack(
                *({"pixel_values": batch["patches"], "image_grid_thw": batch["grid"]} for _ in ids)
            ),
        },
        batch_size=len(ids),
    )

    def score() -> torch.Tensor:
        return worker.compute_teacher_log_prob(data.clone())["teacher_log_probs"].to_padded_tensor(0.0)

    return score


def measure(method: str, folder: Path, threads: int) -> None:
    """In a process of its own: print one JSON line and leave the log-probs in `folder`."""
    # Both: a process that scores for verl has these loaded, whatever it scores with.
    import transformers  # noqa: F401

    import verl_gndpo.teacher.worker  # noqa: F401

    torch.set_num_threads(threads)
    imported = _resident("VmRSS")
    score = {"full_logits": full_logits, "ours": ours}[method](folder)
    loaded = _resident("VmRSS")
    # From here on the kernel's high-water mark is that of scoring, not of loading.
    Path("/proc/self/clear_refs").write_text("5")
    score()
    start = time.perf_counter()
    log_probs = score()
    seconds = time.perf_counter() - start
    peak = _resident("VmHWM")
    torch.save(log_probs, folder / f"{method}.pt")
    figures = {"peak_gb": peak - imported, "peak_rss_gb": peak, "peak_above_model_gb": peak - loaded}
    print(json.dumps({"seconds": seconds} | figures))


def _resident(field: str) -> float:
    """A size of this process from /proc, in GB (10^9 bytes)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e9
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def compare(shape: Shape, rounds: int, threads: int) -> list[dict]:
    """One row a method: medians over `rounds`, and the ratios to `full_logits`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(shape, folder)
        samples = {method: [] for method in METHODS}
        for _ in range(rounds):
            for method in METHODS:
                command = [sys.executable, __file__, "--measure", method, str(folder), "--threads", str(threads)]
                child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                samples[method].append(json.loads(child.stdout.splitlines()[-1]))
        log_probs = {method: torch.load(folder / f"{method}.pt") for method in METHODS}
    rows = []
    for method in METHODS:
        figures = {key: statistics.median(s[key] for s in samples[method]) for key in samples[method][0]}
        figures["seconds_min"] = min(s["seconds"] for s in samples[method])
        difference = (log_probs[method].double() - log_probs["full_logits"].double()).abs().max().item()
        rows.append({"shape": shape.name, "method": method} | figures | {"max_abs_diff": difference})
    reference = rows[0]
    for row in rows:
        row["tokens_per_s"] = shape.responses * shape.response_tokens / row["seconds"]
        row["speedup_vs_full_logits"] = reference["seconds"] / row["seconds"]
        row["speedup_of_minima"] = reference["seconds_min"] / row["seconds_min"]
        row["memory_vs_full_logits"] = row["peak_gb"] / reference["peak_gb"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["n8", "n1", "n16"], help="small: a tiny model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], Path(args.measure[1]), args.threads)
        return

    shapes = [SHAPES[name] for name in args.shapes]
    rows = [row for shape in shapes for row in compare(shape, args.rounds, args.threads)]
    sizes = [asdict(shape) for shape in shapes]
    write_json(
        args.json,
        {"machine": machine(), "threads": args.threads, "rounds": args.rounds, "sizes": sizes, "rows": rows},
    )
    columns = {
        "shape": "shape",
        "method": "method",
        "tokens_per_s": "tokens/s",
        "seconds": "seconds",
        "peak_gb": "GB",
        "peak_rss_gb": "RSS GB",
        "peak_above_model_gb": "above model",
        "max_abs_diff": "diff, nats",
        "speedup_vs_full_logits": "speedup",
        "speedup_of_minima": "of minima",
        "memory_vs_full_logits": "memory",
    }
    title = f"teacher scoring: medians of {args.rounds}, tokens/s of responses"
    print_table(title, list(columns.values()), [[row[key] for key in columns] for row in rows])
    print("targets against full_logits: n8 speedup >= 5 and memory <= 0.25, n1 speedup >= 1")


if __name__ == "__main__":
    main()
