# SPDX-License-Identifier: Apache-2.0
"""A whole GNDPO step against a GRPO step of the same sizes, and where the time goes.

    python benchmarks/step.py [--json OUT] [--steps 8] [--batch 16] [--n 4]

Runs examples/run_qwen2_5vl_gndpo.sh with PROFILE=cpu on tiny models twice, the second time with ESTIMATOR=grpo and all
else the same, and reads the timers that verl logs. About 4 minutes and 8 GB a run: on a machine that is busy otherwise
the ratio says little.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import machine, print_table, write_json

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("gen", "old_log_prob", "teacher_log_prob", "adv", "update_actor", "update_weights", "step")
WARM_UP_STEPS = 2


def run(estimator: str, folder: Path, steps: int, environment: dict[str, str]) -> list[dict]:
    """Train and return the data of each step's log line.

    Raises:
        SystemExit: the run failed; the end of its log has been printed.
    """
    metrics, log = folder / f"{estimator}.jsonl", folder / f"{estimator}.log"
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
    ]
    environment = environment | {"ESTIMATOR": estimator, "VERL_FILE_LOGGER_PATH": str(metrics)}
    with log.open("w") as sink:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT).returncode
    if code != 0:
        print("\n".join(log.read_text(errors="replace").splitlines()[-40:]))
        sys.exit(f"the {estimator} run failed with exit code {code}")
    return [json.loads(line)["data"] for line in metrics.read_text().splitlines()]


def median_seconds(steps: list[dict]) -> dict[str, float]:
    """Median of each stage over the steps after the warm-up; 0.0 for a stage that a run does not have."""
    timed = [step for step in steps if "timing_s/step" in step][WARM_UP_STEPS:]
    return {stage: statistics.median(step.get(f"timing_s/{stage}", 0.0) for step in timed) for stage in STAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=8, help=f"{WARM_UP_STEPS} of them are not counted")
    parser.add_argument("--batch", type=int, default=16, help="prompts a step")
    parser.add_argument("--n", type=int, default=4, help="responses a prompt")
    args = parser.parse_args()
    if args.steps <= WARM_UP_STEPS:
        parser.error(f"--steps must be more than {WARM_UP_STEPS}")

    environment = os.environ | {"PROFILE": "cpu", "PYTHON": sys.executable, "BATCH": str(args.batch), "N": str(args.n)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = [sys.executable, "-m"]
        models = {"STUDENT": ("student", 0), "TEACHER": ("teacher", 1)}
        for name, seed in models.values():
            build = ["examples.quickstart.tiny_vlm", "--out", str(folder / name), "--seed", str(seed)]
            subprocess.run(python + build, cwd=ROOT, env=environment, check=True)
        data = ["examples.quickstart.diagrams", "--out", str(folder / "data")]
        subprocess.run(python + data, cwd=ROOT, env=environment, check=True)
        environment |= {variable: str(folder / name) for variable, (name, _) in models.items()}
        environment |= {"DATA_DIR": str(folder / "data"), "OUTPUT_DIR": str(folder / "out")}
        seconds = {e: median_seconds(run(e, folder, args.steps, environment)) for e in ("gndpo", "grpo")}

    ratio = seconds["gndpo"]["step"] / seconds["grpo"]["step"]
    figures = {
        "machine": machine(),
        "sizes": {"batch": args.batch, "n": args.n, "steps": args.steps, "warm_up_steps": WARM_UP_STEPS},
        "seconds": seconds,
        "step_vs_grpo": ratio,
    }
    write_json(args.json, figures)
    print_table(
        f"one step, {args.batch} prompts x {args.n} responses: median seconds of {args.steps - WARM_UP_STEPS} steps",
        ["stage", "gndpo", "grpo"],
        [[stage, seconds["gndpo"][stage], seconds["grpo"][stage]] for stage in STAGES],
    )
    print(f"gndpo step / grpo step: {ratio:.2f}")


if __name__ == "__main__":
    main()
