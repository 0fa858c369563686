# SPDX-License-Identifier: Apache-2.0
"""A run of GNDPO with this project's teacher, one of verl's own on-policy distillation, and one of GRPO without a
teacher: how long they take to start, how long a step takes and where, and the memory of all their processes. Targets
against verl's distillation: start-up at most 0.75x, memory at most 0.8x, a step at most 1.0x.

    python benchmarks/step.py [--json OUT] [--steps 8] [--batch 16] [--n 4] [--arms gndpo verl_opd grpo] [--model 115M]

Runs examples/run_qwen2_5vl_gndpo.sh with PROFILE=cpu on tiny models, once an arm. `verl_opd` is ESTIMATOR=grpo with
`distillation.enabled=True`, the k1 estimate of reverse KL as a reward under a policy loss and no task reward. Models,
data, batch and the actor's one (logical) GPU are the same in all; verl's teacher has a GPU and a vLLM engine of its
own, by its design, ours shares the actor's. verl asks its teacher while it still generates, so its time is part of
`gen`. `gen` also depends on how often the trainer looks for finished rollouts, every 2 s in verl and every 0.2 s with
this project's trainer; hence `step_without_gen`.

`gndpo_shared` and `grpo_shared` are the same runs with `student.share_prompts=True`. Without generation, their steps
are to take at most 0.45x and 0.6x of those without, with `--model 115M`: models and images as in teacher_scoring.py.

Start-up is the time from the start of the trainer's process to that of its first step: when the first line of metrics
appeared, less that step's `timing_s/step`. Memory is the sum over all processes of the run (Ray's own included) of what
each holds alone plus its share of what it has in common with others (PSS), the largest of samples taken every 2 s.
About 4 minutes and up to 12 GB an arm; on a machine that is busy otherwise the ratios say little.
"""

import argparse
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from _common import machine, print_table, proportional, with_children, write_json

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("gen", "old_log_prob", "teacher_log_prob", "adv", "update_actor", "update_weights", "step")
WARM_UP_STEPS = 2
SAMPLE_S = 2.0
WATCH_S = 0.05
PROMPT_TOKENS, RESPONSE_TOKENS = 128, 24
LARGE_IMAGE = (560, 448)
"""Width and height of the images of --model 115M, in pixels: 320 tokens."""
LARGE_TOKENS_PER_GPU = 1536
"""verl's update holds the logits of all tokens of a micro-batch: 13.9 GB for eight rows of 448. Four rows and the two
engines of `verl_opd` do not fit into 24 GB."""
ESTIMATORS = {
    "gndpo": "gndpo",
    "gndpo_shared": "gndpo",
    "grpo": "grpo",
    "grpo_shared": "grpo",
    "verl_opd": "grpo",
}
# Metrics that show that an arm learns from its teacher. An untrained student earns no reward, so that GRPO has
# nothing to learn.
ALIVE = {
    "gndpo": ("gndpo/log_ratio/mean", "gndpo/sigma", "actor/grad_norm"),
    "gndpo_shared": ("gndpo/log_ratio/mean", "gndpo/sigma", "actor/grad_norm"),
    "verl_opd": ("actor/distillation/loss", "actor/distillation/abs_loss", "actor/grad_norm"),
    "grpo": (),
    "grpo_shared": (),
}


class RunFailed(Exception):
    """An arm's run ended early, or taught its student nothing."""


def verl_opd_settings(teacher: str, length: int) -> list[str]:
    """Return the settings of verl's own distillation. Its engine gets those of the rollout's in the CPU profile."""
    inference = "distillation.teacher_models.teacher_model.inference"
    return [
        "distillation.enabled=True",
        "distillation.n_gpus_per_node=1",
        "distillation.nnodes=1",
        "ray_kwargs.ray_init.num_gpus=2",
        "distillation.distillation_loss.loss_mode=k1",
        "distillation.distillation_loss.use_policy_gradient=True",
        "distillation.distillation_loss.use_task_rewards=False",
        f"distillation.teacher_models.teacher_model.model_path={teacher}",
        f"{inference}.tensor_model_parallel_size=1",
        f"{inference}.max_model_len={length + 1}",
        f"{inference}.max_num_batched_tokens=4096",
        f"{inference}.max_num_seqs=64",
        f"{inference}.free_cache_engine=False",
        f"+{inference}.enable_sleep_mode=False",
    ]


def run(arm: str, folder: Path, steps: int, environment: dict[str, str], more: list[str]) -> dict:
    """Train, and watch the processes meanwhile.

    Returns:
        `steps`: the metrics of each step; `start_up_s`; `peak_gb`; `peak_gb_by_process`: the same by title of process.

    Raises:
        RunFailed: its exit code is not 0; the end of its log has been printed.
    """
    metrics, log = folder / f"{arm}.jsonl", folder / f"{arm}.log"
    command = [
        *("bash", "examples/run_qwen2_5vl_gndpo.sh"),
        f"trainer.total_training_steps={steps}",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
        "trainer.val_before_train=False",
        "trainer.resume_mode=disable",
        "reward.custom_reward_function.path=examples/quickstart/reward.py",
        "reward.custom_reward_function.name=compute_score",
        f"hydra.run.dir={folder / 'hydra'}",
        *more,
    ]
    if arm == "verl_opd":
        length = int(environment["MAX_PROMPT"]) + int(environment["MAX_RESPONSE"])
        command += verl_opd_settings(environment["TEACHER"], length)
    environment = environment | {"ESTIMATOR": ESTIMATORS[arm], "VERL_FILE_LOGGER_PATH": str(metrics)}
    environment["SHARE_PROMPTS"] = str(arm.endswith("_shared"))
    with log.open("w") as sink:
        process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT)
        try:
            watched = watch(process, metrics)
        finally:
            for member in with_children(process):
                member.kill()
    if process.returncode != 0:
        print("\n".join(log.read_text(errors="replace").splitlines()[-40:]))
        raise RunFailed(f"the {arm} run failed with exit code {process.returncode}")
    logged = [json.loads(line)["data"] for line in metrics.read_text().splitlines()]
    logged = [step for step in logged if "timing_s/step" in step]
    started, first_line, peak = watched
    return {
        "steps": logged,
        "start_up_s": first_line - started - logged[0]["timing_s/step"],
        "peak_gb": sum(peak.values()) / 1e9,
        "peak_gb_by_process": {title: size / 1e9 for title, size in peak.most_common()},
    }


def watch(process: psutil.Popen, metrics: Path) -> tuple[float, float, Counter]:
    """Until the run ends: when the trainer's process began, when its first line of metrics was there, and the memory of
    the run at the highest point, in bytes by title of process."""
    started = first_line = math.nan
    peak, next_sample = Counter(), 0.0
    while process.poll() is None:
        now = time.monotonic()
        if math.isnan(started):
            # The script becomes the trainer after it has checked the settings.
            started = now if "main_ppo" in title(process) else math.nan
        elif math.isnan(first_line) and metrics.exists() and b"\n" in metrics.read_bytes():
            first_line = now
        if now >= next_sample:
            sizes = Counter()
            for member in with_children(process):
                sizes[title(member)] += proportional(member)["Pss"]
            peak = max(peak, sizes, key=Counter.total)
            next_sample = now + SAMPLE_S
        time.sleep(WATCH_S)
    return started, first_line, peak


def title(process: psutil.Process) -> str:
    """Return the name that a process gives itself (`ray::...`, `VLLM::...`), or its program and first two arguments."""
    try:
        words = process.cmdline()
    except psutil.Error:  # it has ended
        return ""
    return " ".join(Path(word).name for word in words[:3])[:60]


def median_seconds(steps: list[dict]) -> dict[str, float]:
    """Median of each stage over the steps after the warm-up; 0.0 for a stage that a run does not have."""
    timed = steps[WARM_UP_STEPS:]
    seconds = {stage: statistics.median(step.get(f"timing_s/{stage}", 0.0) for step in timed) for stage in STAGES}
    without = statistics.median(step["timing_s/step"] - step["timing_s/gen"] for step in timed)
    return seconds | {"step_without_gen": without}


def check_alive(arm: str, steps: list[dict]) -> None:
    """Raise RunFailed unless every step of an arm has finite figures, other than 0, of what it learns from."""
    for number, step in enumerate(steps, 1):
        for name in ALIVE[arm]:
            value = step.get(name)
            if value is None or not math.isfinite(value) or value == 0:
                raise RunFailed(f"{arm}, step {number}: {name} is {value}")


def build_large(folder: Path, seed: int) -> str:
    """Write the 115M model of teacher_scoring.py, and return its folder."""
    sys.path.append(str(ROOT))
    import teacher_scoring

    folder.mkdir()
    teacher_scoring.build(teacher_scoring.SHAPES["n8"], folder, seed)
    return str(folder / "model")


def enlarge_images(file: Path) -> None:
    """Scale the images of a parquet file of the quickstart to `LARGE_IMAGE`; keep few rows."""
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(file).slice(0, 64)
    rows = table.to_pylist()
    for row in rows:
        for image in row["images"]:
            sink = io.BytesIO()
            Image.open(io.BytesIO(image["bytes"])).resize(LARGE_IMAGE).save(sink, format="PNG")
            image["bytes"] = sink.getvalue()
    pq.write_table(table.from_pylist(rows, schema=table.schema), file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=8, help=f"{WARM_UP_STEPS} of them are not counted")
    parser.add_argument("--batch", type=int, default=16, help="prompts a step")
    parser.add_argument("--n", type=int, default=4, help="responses a prompt")
    parser.add_argument(
        "--arms", nargs="+", choices=ESTIMATORS, default=["gndpo", "verl_opd", "grpo"], help="gndpo always runs"
    )
    parser.add_argument("--model", choices=("tiny", "115M"), default="tiny")
    parser.add_argument("--response", type=int, default=RESPONSE_TOKENS, help="tokens of a response, at most")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    args = parser.parse_args()
    if args.steps <= WARM_UP_STEPS:
        parser.error(f"--steps must be more than {WARM_UP_STEPS}")

    environment = os.environ | {"PROFILE": "cpu", "PYTHON": sys.executable, "BATCH": str(args.batch), "N": str(args.n)}
    large = args.model == "115M"
    # The largest weight has to fit into one bucket.
    more = ["actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=512"] if large else []
    environment |= {"MAX_PROMPT": str(512 if large else PROMPT_TOKENS), "MAX_RESPONSE": str(args.response)}
    environment |= {"OMP_NUM_THREADS": str(args.threads)}
    if large:
        environment |= {"TOKENS_PER_GPU": str(LARGE_TOKENS_PER_GPU)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = [sys.executable, "-m"]
        for seed, name in enumerate(("student", "teacher")):
            environment[name.upper()] = str(folder / name)
            if large:
                environment[name.upper()] = build_large(folder / name, seed)
                continue
            build = ["examples.quickstart.tiny_vlm", "--out", str(folder / name), "--seed", str(seed)]
            subprocess.run(python + build, cwd=ROOT, env=environment, check=True)
        data = ["examples.quickstart.diagrams", "--out", str(folder / "data")]
        subprocess.run(python + data, cwd=ROOT, env=environment, check=True)
        if large:
            enlarge_images(folder / "data" / "train.parquet")
        environment |= {"DATA_DIR": str(folder / "data"), "OUTPUT_DIR": str(folder / "out")}
        arms, failures = {}, []
        for arm in (arm for arm in ESTIMATORS if arm in {"gndpo", *args.arms}):
            try:
                watched = run(arm, folder, args.steps, environment, more)
                steps = watched.pop("steps")
                check_alive(arm, steps)
            except RunFailed as failure:
                # The others took minutes: they are shown all the same.
                failures.append(str(failure))
                continue
            arms[arm] = watched | {"seconds": median_seconds(steps)}
            print(arm, {name: round(value, 1) for name, value in arms[arm]["seconds"].items()}, flush=True)
    if "gndpo" not in arms:
        sys.exit("\n".join(failures))

    ratios = {}
    for rival in arms:
        if rival != "gndpo":
            ours, theirs = arms["gndpo"], arms[rival]
            ratios[f"start_up_vs_{rival}"] = ours["start_up_s"] / theirs["start_up_s"]
            ratios[f"memory_vs_{rival}"] = ours["peak_gb"] / theirs["peak_gb"]
            for name in ("step", "step_without_gen"):
                ratios[f"{name}_vs_{rival}"] = ours["seconds"][name] / theirs["seconds"][name]
    for arm in ("gndpo", "grpo"):
        if arm in arms and f"{arm}_shared" in arms:
            for name in ("step", "step_without_gen", "old_log_prob", "update_actor"):
                ratios[f"{arm}_shared_{name}"] = arms[f"{arm}_shared"]["seconds"][name] / arms[arm]["seconds"][name]
    if {"gndpo_shared", "verl_opd"} <= set(arms):
        ratios["gndpo_shared_step_vs_verl_opd"] = (
            arms["gndpo_shared"]["seconds"]["step"] / arms["verl_opd"]["seconds"]["step"]
        )
    sizes = {"batch": args.batch, "n": args.n, "steps": args.steps, "warm_up_steps": WARM_UP_STEPS}
    write_json(args.json, {"machine": machine(), "sizes": sizes, "arms": arms} | ratios)
    rows = [["start-up, s", *(arm["start_up_s"] for arm in arms.values())]]
    rows += [["peak memory, GB", *(arm["peak_gb"] for arm in arms.values())]]
    rows += [[stage, *(arm["seconds"][stage] for arm in arms.values())] for stage in (*STAGES, "step_without_gen")]
    counted = args.steps - WARM_UP_STEPS
    title_line = f"{args.batch} prompts x {args.n} responses: median seconds of {counted} steps"
    print_table(title_line, ["stage", *arms], rows)
    print("gndpo against ...: " + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    print("targets against verl_opd: start_up <= 0.75, memory <= 0.8, step <= 1.0")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
