# SPDX-License-Identifier: Apache-2.0
"""Compare three ways to score n responses to one prompt with an image.

    python benchmarks/teacher_scoring.py [--json OUT] [--shapes n8 n1 n16] [--rounds 3] [--methods ...]

- `full_logits`: a plain Hugging Face forward with all logits, as in the released code;
- `verl_server`: verl's own teacher, a vLLM server that is asked for the log-probs of its prompt;
- `ours`: this project's worker;
- `padded`: the same, with the attention of all responses padded to the longest, for the shape `skewed` only.

Targets for n8: 5x faster than `full_logits` with a quarter of its memory, and 7x faster than `verl_server`. Target for
n1: not slower than `full_logits`. Target for skewed: 2.5x faster than `padded`.

The model is a 115M Qwen2.5-VL with random weights. The image is a drawing that went through Qwen's image processor.
Each call runs in its own process, with the same number of threads; the methods take turns. The process loads the model,
scores one batch to warm up, and then another batch of the same sizes for the clock, so that nothing cached from the
first batch helps with the second. `processor_s` is the processor time of the timed call on all cores, which is more
reliable than `seconds` when other programs compete for them.

`verl_server` is verl's server class (`vLLMHttpServer`) with verl's settings. verl's teacher manager sends one request
per response, all at once, each with the image; only Ray's hop between the two is skipped. Requests for prompt log-probs
never read vLLM's prefix cache (`SamplingParams.skip_reading_prefix_cache`), so the server runs the prompt of every
response. It encodes the image once. As in a run, verl masks the logits of the two vision placeholders, which raises
every other log-prob by 1.3e-5 nats in the larger shapes and by 5e-4 in `small`.

`peak_gb` is the memory that the weights and the scoring add to the processes at the highest point: the sum of their
peak resident sizes minus the memory of their imports. An accelerator would have to hold that much. vLLM has three
processes: the server, the engine and the worker. For the two that it starts itself, the imports are measured in a
process that only imports the same modules. `peak_rss_gb` is the whole peak, and `peak_above_model_gb` the peak above
the loaded model.
"""

import argparse
import asyncio
import atexit
import importlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
import verl  # noqa: F401  loads the plugin, without which transformers can't import its image models on the CPU
from _common import gigabytes, machine, print_table, resident, write_json
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLProcessor

ROOT = Path(__file__).resolve().parents[1]
KV_CACHE_BYTES = 2**28
RIVALS = ("full_logits", "verl_server", "padded")
# Modules that a process which scores for verl has loaded with any method.
WORKER_IMPORTS = ("transformers", "verl_gndpo.teacher.worker")
IMPORTS = {
    "full_logits": WORKER_IMPORTS,
    "verl_server": ("transformers", "ray", "verl.workers.rollout.vllm_rollout.vllm_async_server"),
    "padded": WORKER_IMPORTS,
    "ours": WORKER_IMPORTS,
}
ENGINE_IMPORTS = (
    "verl.workers.rollout.vllm_rollout.utils",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen2_5_vl",
)


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of the batch, and the name that stands in the figures."""

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

    longest: int = 0
    """Tokens of the first response, if it is longer than the others."""

    @property
    def lengths(self) -> list[int]:
        """Return the number of tokens of each response."""
        return [self.longest or self.response_tokens, *[self.response_tokens] * (self.responses - 1)]

    @property
    def length(self) -> int:
        """Return the number of tokens of a sequence: prompt, image, the two marks around it, response."""
        return 2 * self.prompt_tokens + self.grid[0] * self.grid[1] // 4 + 2 + self.response_tokens


SHAPES = {
    "n8": Shape("115M, n=8, 320 image + 128 response tokens", 151936, 512, 8, 8, 128, 30, (32, 40)),
    "n1": Shape("115M, n=1, 320 image + 128 response tokens", 151936, 512, 8, 1, 128, 30, (32, 40)),
    # All its logits at once take 18 GB.
    "n16": Shape("115M, n=16, 320 image + 512 response tokens", 151936, 512, 8, 16, 512, 30, (32, 40)),
    "skewed": Shape("115M, 15 x 384 and 1 x 6144 response tokens", 151936, 512, 8, 16, 384, 30, (32, 40), 6144),
    "small": Shape("small, n=4, 16 image + 16 response tokens", 4096, 256, 2, 4, 16, 6, (8, 8)),
}


def build(shape: Shape, folder: Path, seed: int = 0) -> None:
    """Write `model/` (a checkpoint with tokenizer and processor), and `batches.pt` and `images/` (two batches)."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    processor = build_processor(shape)
    token = processor.tokenizer.convert_tokens_to_ids
    start, image, end = (token(f"<|{name}|>") for name in ("vision_start", "image_pad", "vision_end"))
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
        image_token_id=image,
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=True,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )
    model = Qwen2_5_VLForConditionalGeneration._from_config(config)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")

    (folder / "images").mkdir()
    height, width = shape.grid
    batches = []
    for number in range(2):
        picture = draw(14 * width, 14 * height)
        picture.save(folder / "images" / f"{number}.png")
        pixels = processor.image_processor(picture, return_tensors="pt")
        if pixels["image_grid_thw"].tolist() != [[1, height, width]]:
            raise ValueError(f"the image processor made {pixels['image_grid_thw'].tolist()} of a grid of {shape.grid}")
        text = torch.randint(0, 256, (2, shape.prompt_tokens))
        marked = torch.tensor([start, *[image] * (height * width // 4), end])
        prompt = torch.cat([text[0], marked, text[1]])
        responses = torch.randint(0, 256, (shape.responses, max(shape.lengths)))
        ids = torch.cat([prompt.repeat(shape.responses, 1), responses], 1)
        positions, _ = model.model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == image).int(),
            image_grid_thw=pixels["image_grid_thw"].repeat(shape.responses, 1),
        )
        batch = {"ids": ids, "positions": positions, "response_tokens": max(shape.lengths), "lengths": shape.lengths}
        batches.append(batch | {"patches": pixels["pixel_values"], "grid": pixels["image_grid_thw"]})
    torch.save(batches, folder / "batches.pt")


def build_processor(shape: Shape) -> "Qwen2_5_VLProcessor":
    """Build Qwen's processor with a tokenizer of exactly `shape.vocabulary` tokens; verl's server masks other logits.

    The ids below 256 are ordinary text, and the special tokens stand at the end.
    """
    from examples.quickstart import tiny_vlm

    small = tiny_vlm.build_tokenizer(vocab=256)
    model = json.loads(small.backend_tokenizer.to_str())["model"]
    fillers = range(len(model["vocab"]), shape.vocabulary - (len(small) - len(model["vocab"])))
    tokenizer = type(small)(
        vocab=model["vocab"] | {f"filler {number}": number for number in fillers},
        merges=[tuple(merge) for merge in model["merges"]],
        unk_token=small.unk_token,
        eos_token=small.eos_token,
        pad_token=small.pad_token,
        additional_special_tokens=[token for token in small.get_added_vocab() if token != small.unk_token],
    )
    if len(tokenizer) != shape.vocabulary:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens instead of {shape.vocabulary}")
    return tiny_vlm.build_processor(tokenizer, max_pixels=14 * 14 * shape.grid[0] * shape.grid[1])


def draw(width: int, height: int) -> Image.Image:
    """Draw triangles in different colours; each call draws others (torch's random state)."""
    picture = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(picture)
    for corners in (torch.rand(12, 3, 2) * torch.tensor([width, height])).tolist():
        colour = tuple(torch.randint(0, 256, (3,)).tolist())
        canvas.polygon([tuple(corner) for corner in corners], outline=colour, width=3)
    return picture


def full_logits(folder: Path, batches: list[dict], threads: int) -> tuple[Callable[[int], torch.Tensor], dict]:
    """Load Hugging Face's model, which scores by a forward pass over whole sequences with all logits."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    ).eval()

    @torch.no_grad()
    def score(number: int) -> torch.Tensor:
        batch = batches[number]
        ids = batch["ids"]
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

    return score, {}


def verl_server(folder: Path, batches: list[dict], threads: int) -> tuple[Callable[[int], torch.Tensor], dict]:
    """Start verl's vLLM server in this process; it starts processes for its engine and its worker."""
    # vLLM would otherwise take one thread for each physical core; the worker is where the model runs.
    cores = sorted(os.sched_getaffinity(0))[:threads]
    os.environ.update(VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)))
    os.environ.update(TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    import ray
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf
    from verl.experimental.teacher_loop.teacher_manager import AsyncTeacherLLMServerManager
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.rollout.replica import RolloutMode
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

    # The server asks Ray only for its address and its job.
    ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
    others = {process.pid for process in psutil.Process().children(recursive=True)}
    imported = imports_of_engine()

    length, response = batches[0]["ids"].shape[1], batches[0]["response_tokens"]
    teacher = "distillation.teacher_models.teacher_model"
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            overrides=[
                "actor_rollout_ref.rollout.name=vllm",
                "actor_rollout_ref.rollout.dtype=float32",
                f"data.max_prompt_length={length - response}",
                f"data.max_response_length={response}",
                "distillation.enabled=True",
                "distillation.distillation_loss.loss_mode=k1",
                "distillation.distillation_loss.use_policy_gradient=True",
                "distillation.n_gpus_per_node=1",
                "distillation.nnodes=1",
                f"{teacher}.model_path={folder / 'model'}",
                f"{teacher}.inference.tensor_model_parallel_size=1",
                f"{teacher}.inference.max_model_len={length + 1}",
                # Room for the batch; otherwise it is a share of the machine.
                f"+{teacher}.inference.engine_kwargs.vllm.kv_cache_memory_bytes={KV_CACHE_BYTES}",
                # vLLM has no sleep mode on the CPU.
                f"{teacher}.inference.free_cache_engine=False",
                f"+{teacher}.inference.enable_sleep_mode=False",
            ],
        )

    class Client:
        """Answers for verl's client, which would reach the server through Ray."""

        async def generate(self, mm_processor_output=None, **request):
            return await server.generate(**request)

    settings = omega_conf_to_dataclass(config.distillation).teacher_models["default"]
    manager = AsyncTeacherLLMServerManager(config, {"default": Client()})
    server = vLLMHttpServer(
        config=settings.inference,
        model_config=OmegaConf.create({"_target_": "verl.workers.config.HFModelConfig", "path": settings.model_path}),
        rollout_mode=RolloutMode.COLOCATED,
        workers=[],
        replica_rank=0,
        node_rank=0,
        gpus_per_node=1,
        nnodes=1,
        cuda_visible_devices="",
    )
    loop = asyncio.new_event_loop()
    loop.run_until_complete(server.launch_server())
    atexit.register(server.engine.shutdown)
    pictures = [Image.open(folder / "images" / f"{number}.png").convert("RGB") for number in range(len(batches))]

    def score(number: int) -> torch.Tensor:
        async def ask():
            return await asyncio.gather(
                *(
                    manager.compute_teacher_logprobs_single(ids, multi_modal_data={"images": [pictures[number]]})
                    for ids in batches[number]["ids"].tolist()
                )
            )

        # At place i it has the log-prob of token i + 1, and a filler at the last.
        log_probs = torch.stack([answer[1].squeeze(-1) for answer in loop.run_until_complete(ask())])
        return log_probs[:, -response - 1 : -1]

    started = [process.pid for process in psutil.Process().children(recursive=True) if process.pid not in others]
    # Python's resource tracker is one of them, and holds less.
    return score, {pid: min(imported, resident("VmRSS", pid)) for pid in started}


def imports_of_engine() -> float:
    """Return the memory that the imports of one of vLLM's own processes hold, in GB."""
    modules = "; ".join(f"import {name}" for name in ("verl", *ENGINE_IMPORTS))
    show = "print(next(line for line in open('/proc/self/status') if line.startswith('VmRSS')))"
    done = subprocess.run([sys.executable, "-c", f"{modules}; {show}"], stdout=subprocess.PIPE, text=True, check=True)
    return gigabytes(done.stdout.strip().splitlines()[-1])


def ours(folder: Path, batches: list[dict], threads: int) -> tuple[Callable[[int], torch.Tensor], dict]:
    """Start the worker of a run on one gloo rank in this process; one micro-batch, as in `full_logits`."""
    from omegaconf import OmegaConf
    from tensordict import TensorDict
    from tensordict.tensorclass import NonTensorStack
    from verl.utils.tensordict_utils import nested_tensor_from_tensor_list

    from verl_gndpo.config import read_teacher_config
    from verl_gndpo.teacher.worker import TeacherWorker

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", RAY_LOCAL_WORLD_SIZE="1")
    section = {
        "model": {"path": str(folder / "model"), "override_config": {"attn_implementation": "sdpa"}},
        "temperature": 1.0,
        "max_token_len_per_gpu": batches[0]["ids"].numel(),
    }
    student = {"rollout": {}, "model": {}}
    worker = TeacherWorker(read_teacher_config(OmegaConf.create({"teacher": section, "actor_rollout_ref": student})))
    worker.reset()

    def nested(rows: Iterable[torch.Tensor], ragged_idx: int = 1) -> torch.Tensor:
        return nested_tensor_from_tensor_list(list(rows), ragged_idx=ragged_idx)

    def as_verl_has_it(batch: dict) -> TensorDict:
        ids, lengths = batch["ids"], batch["lengths"]
        ends = [ids.shape[1] - batch["response_tokens"] + length for length in lengths]
        text_positions = torch.arange(ids.shape[1])[None]
        images = ({"pixel_values": batch["patches"], "image_grid_thw": batch["grid"]} for _ in ids)
        return TensorDict(
            {
                "input_ids": nested(row[:end] for row, end in zip(ids, ends, strict=True)),
                "position_ids": nested(
                    (
                        torch.cat([text_positions, p])[:, :end]
                        for p, end in zip(batch["positions"].unbind(1), ends, strict=True)
                    ),
                    2,
                ),
                "response_mask": nested(torch.ones(length, dtype=torch.int64) for length in lengths),
                "multi_modal_inputs": NonTensorStack(*images),
            },
            batch_size=len(ids),
        )

    data = [as_verl_has_it(batch) for batch in batches]

    def score(number: int) -> torch.Tensor:
        return worker.compute_teacher_log_prob(data[number].clone())["teacher_log_probs"].to_padded_tensor(0.0)

    return score, {}


def padded(folder: Path, batches: list[dict], threads: int) -> tuple[Callable[[int], torch.Tensor], dict]:
    """Start the worker with the attention of all responses to a prompt in one group, padded to the longest."""
    from verl_gndpo.teacher import packing

    packing.alike = lambda lengths, prompt=0: [list(range(len(lengths)))]
    return ours(folder, batches, threads)


METHODS = {"full_logits": full_logits, "verl_server": verl_server, "padded": padded, "ours": ours}


def methods_of(shape: Shape, chosen: Iterable[str]) -> list[str]:
    """Return the methods of a shape, the first of which is what the others are compared with."""
    if shape.longest:
        return ["padded", "ours"]
    return [method for method in METHODS if method != "padded" and method in {"full_logits", *chosen}]


def measure(method: str, folder: Path, threads: int) -> None:
    """Measure one method in this process, and write the figures (JSON) and the log-probs into `folder`."""
    for name in IMPORTS[method]:
        importlib.import_module(name)
    torch.set_num_threads(threads)
    imported = {os.getpid(): resident("VmRSS")}
    score, children = METHODS[method](folder, torch.load(folder / "batches.pt"), threads)
    imported |= children
    processes = [psutil.Process(pid) for pid in imported]
    loaded = sum(resident("VmRSS", pid) for pid in imported)
    # This resets the kernel's high-water marks, so that they exclude the loading of the model.
    for pid in imported:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    score(0)
    busy = processor_time(processes)
    start = time.perf_counter()
    log_probs = score(1)
    seconds = time.perf_counter() - start
    busy = processor_time(processes) - busy
    peak = sum(resident("VmHWM", pid) for pid in imported)
    torch.save(log_probs, folder / f"{method}.pt")
    figures = {"seconds": seconds, "processor_s": busy, "peak_gb": peak - sum(imported.values())}
    figures |= {"peak_rss_gb": peak, "peak_above_model_gb": peak - loaded}
    write_json(folder / f"{method}.json", figures)


def processor_time(processes: list[psutil.Process]) -> float:
    """Return the processor seconds that processes have used on all cores."""
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def call(method: str, folder: Path, threads: int) -> dict:
    """Start the process of `measure` and return its figures."""
    log = folder / f"{method}.log"
    command = [sys.executable, __file__, "--measure", method, str(folder), "--threads", str(threads)]
    with log.open("w") as sink:
        code = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT).returncode
    if code != 0:
        print("\n".join(log.read_text(errors="replace").splitlines()[-60:]))
        sys.exit(f"{method} failed with exit code {code}")
    return json.loads((folder / f"{method}.json").read_text())


def compare(shape: Shape, methods: list[str], rounds: int, threads: int) -> list[dict]:
    """Return one row per method: medians over `rounds`, and the ratios to the other methods."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(shape, folder)
        samples: dict[str, list[dict]] = {method: [] for method in methods}
        for _ in range(rounds):
            for method in methods:
                samples[method].append(call(method, folder, threads))
        log_probs = {method: torch.load(folder / f"{method}.pt").double() for method in methods}
    rows = {}
    for method in methods:
        figures = {key: statistics.median(s[key] for s in samples[method]) for key in samples[method][0]}
        figures["seconds_min"] = min(s["seconds"] for s in samples[method])
        difference = (log_probs[method] - log_probs[methods[0]]).abs().max().item()
        rows[method] = {"shape": shape.name, "method": method} | figures | {"max_abs_diff": difference}
    for row in rows.values():
        row["tokens_per_s"] = sum(shape.lengths) / row["seconds"]
        for rival in RIVALS:
            if rival in rows:
                row[f"speedup_vs_{rival}"] = rows[rival]["seconds"] / row["seconds"]
                row[f"speedup_of_minima_vs_{rival}"] = rows[rival]["seconds_min"] / row["seconds_min"]
                row[f"processor_speedup_vs_{rival}"] = rows[rival]["processor_s"] / row["processor_s"]
                row[f"memory_vs_{rival}"] = row["peak_gb"] / rows[rival]["peak_gb"]
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["n8", "n1", "n16"], help="small: a tiny model")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="full_logits always runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], Path(args.measure[1]), args.threads)
        return

    shapes = [SHAPES[name] for name in args.shapes]
    rows = [
        row for shape in shapes for row in compare(shape, methods_of(shape, args.methods), args.rounds, args.threads)
    ]
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
        "processor_s": "processor s",
        "peak_gb": "GB",
        "peak_rss_gb": "RSS GB",
        "max_abs_diff": "diff, nats",
        "speedup_vs_full_logits": "speedup",
        "memory_vs_full_logits": "memory",
        "speedup_vs_verl_server": "vs server",
        "speedup_vs_padded": "vs padded",
    }
    title = f"teacher scoring: medians of {args.rounds}, tokens/s of responses"
    print_table(title, list(columns.values()), [[row.get(key, "") for key in columns] for row in rows])
    print("targets: n8 speedup >= 5 with memory <= 0.25 (full_logits) and >= 7 (verl_server), n1 speedup >= 1")


if __name__ == "__main__":
    # For examples.quickstart, which draws no data here but builds tokenizer and processor.
    sys.path.append(str(ROOT))
    main()
