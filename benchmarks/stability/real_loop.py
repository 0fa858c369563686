# SPDX-License-Identifier: Apache-2.0
"""Compare the study's loop with real runs: the same arms through verl's trainer, vLLM and the teacher worker.

    python -m benchmarks.stability.real_loop --out outputs/stability     # about 5 minutes per arm on two cores

Start point, prompts' distribution, batch, learning rate and optimizer are the same; sampled responses are not, so that
verl's run is held against several seeds of the study's loop: accuracy while it learns, and signal and gradient norm of
the first step, where all have the same weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.stability import loop, plan, world
from examples.quickstart import diagrams
from examples.quickstart.run import ACCURACY, CORRELATION, read_metrics
from verl_gndpo.advantage import Trace, compute_advantages
from verl_gndpo.config import read_signal_config

ARMS = ("gndpo", "log_odds_opd")
START, STEPS, EVALUATE_EVERY, PROMPTS, RESPONSES, LEARNING_RATE = "40", 12, 2, 16, 4, 5e-5
SEEDS = tuple(range(5))


def run_verl(arm: str, out: Path) -> list[dict]:
    """Run `examples/run_qwen2_5vl_gndpo.sh` with an arm's estimator and return what verl's file logger wrote.

    Raises:
        SystemExit: the run failed; its log is named.
    """
    folder = out / "real_loop" / arm
    folder.mkdir(parents=True, exist_ok=True)
    metrics, log = folder / "metrics.jsonl", folder / "train.log"
    metrics.unlink(missing_ok=True)
    environment = os.environ | {
        "PROFILE": "cpu",
        "PYTHON": sys.executable,
        "ESTIMATOR": plan.ARMS[arm].estimator,
        "STUDENT": str(out / "real_loop" / "student"),
        "TEACHER": str(out / "models" / "teacher"),
        "DATA_DIR": str(out / "real_loop" / "data"),
        "OUTPUT_DIR": str(folder),
        "VERL_FILE_LOGGER_PATH": str(metrics),
        "BATCH": str(PROMPTS),
        "N": str(RESPONSES),
        "LR": str(LEARNING_RATE),
        "FREEZE_VISION": "False",
        "MAX_PROMPT": "64",
        "MAX_RESPONSE": str(loop.MAX_NEW_TOKENS),
    }
    command = [
        *("bash", "examples/run_qwen2_5vl_gndpo.sh"),
        f"trainer.total_training_steps={STEPS}",
        "trainer.total_epochs=100",
        "trainer.val_before_train=True",
        f"trainer.test_freq={EVALUATE_EVERY}",
        "trainer.save_freq=-1",
        "trainer.resume_mode=disable",
        "reward.custom_reward_function.path=examples/quickstart/reward.py",
        "reward.custom_reward_function.name=compute_score",
    ]
    with log.open("w") as sink:
        code = subprocess.run(command, env=environment, stdout=sink, stderr=subprocess.STDOUT).returncode
    if code:
        sys.exit(f"verl's run of {arm} failed with exit code {code}: {log}")
    return read_metrics(metrics)


def describe_verl(lines: list[dict]) -> dict:
    """Return the figures that both loops have."""
    first = next(line["data"] for line in lines if line["step"] == 1)
    steps = [line["data"] for line in lines if "timing_s/step" in line["data"]]
    return {
        "accuracy": [[line["step"], line["data"][ACCURACY]] for line in lines if ACCURACY in line["data"]],
        "k1": first["gndpo/k1"],
        "sigma": first["gndpo/sigma"],
        "grad_norm": first["actor/grad_norm"],
        "correlation_min": min(data[CORRELATION] for data in steps),
        "diagnostics_share": [data["timing_s/gndpo_diagnostics"] / data["timing_s/step"] for data in steps],
    }


def run_in_process(models: world.World, arm: str, seed: int) -> dict:
    """Run the same training in the study's loop."""
    signal = read_signal_config({}, plan.ARMS[arm].estimator).signal

    def on_step(batch: loop.Batch, _) -> dict:
        traces: list[Trace] = []
        inputs = (batch.teacher_log_probs, batch.old_log_probs, batch.response_mask)
        compute_advantages(*inputs, replace(signal, baseline="none", scale="none"), on_trace=traces.append)
        return {"sigma": float(traces[0].bounded.std(ddof=1))}

    settings = loop.Settings(
        steps=STEPS,
        learning_rate=LEARNING_RATE,
        seed=seed,
        prompts=PROMPTS,
        n=RESPONSES,
        evaluate_every=EVALUATE_EVERY,
        evaluate_on="test",
    )
    records = loop.train(models, START, plan.advantage(plan.ARMS[arm], seed), settings, on_step=on_step)
    accuracy = [[record["step"], record["accuracy"]] for record in records if "accuracy" in record]
    return {"accuracy": accuracy} | {name: records[1][name] for name in ("k1", "sigma", "grad_norm")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/stability"), help="folder of models and results")
    out = parser.parse_args().out.resolve()
    torch.set_num_threads(1)
    models = world.prepare(out, (START,))
    models.starts[START].save_pretrained(out / "real_loop" / "student")
    models.processor.save_pretrained(out / "real_loop" / "student")
    diagrams.write_dataset(
        out / "real_loop" / "data", train=world.TRAIN_PROBLEMS, test=world.TEST_PROBLEMS, seed=world.TRAIN_SEED
    )
    # As the loop's test problems, whose seed is the default.
    diagrams.write_parquet(
        diagrams.make_problems("test", world.TEST_PROBLEMS), out / "real_loop" / "data" / "test.parquet"
    )
    result = {
        arm: {
            "verl": describe_verl(run_verl(arm, out)),
            "in_process": [run_in_process(models, arm, seed) for seed in SEEDS],
        }
        for arm in ARMS
    }
    path = out / "real_loop.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    for arm, both in result.items():
        print(arm)
        for name in ("k1", "sigma", "grad_norm"):
            values = [run[name] for run in both["in_process"]]
            print(f"  {name:10} verl {both['verl'][name]:.3f}   in process {min(values):.3f} to {max(values):.3f}")
        for i, (step, accuracy) in enumerate(both["verl"]["accuracy"]):
            values = [run["accuracy"][i][1] for run in both["in_process"]]
            print(f"  step {step:3} verl {accuracy:.3f}   in process {min(values):.3f} to {max(values):.3f}")
        shares = both["verl"]["diagnostics_share"]
        print(f"  correlation of rollout and actor at least {both['verl']['correlation_min']:.6f}")
        print(f"  diagnostics: {statistics.median(shares):.2%} of a step in the median, at most {max(shares):.2%}")
    print(path)


if __name__ == "__main__":
    main()
