# SPDX-License-Identifier: Apache-2.0
"""Runs a recipe of examples/ with PROFILE=cpu and reads back what it left."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

REPO = Path(__file__).parents[2]
REWARD = [
    f"reward.custom_reward_function.path={REPO / 'examples' / 'quickstart' / 'reward.py'}",
    "reward.custom_reward_function.name=compute_score",
]
START_UP_LIMIT_S = 1200


@dataclass
class Run:
    """One run of a recipe. `settings` are its environment variables, `overrides` its arguments.

    `module` is imported by verl in each of the run's processes.
    """

    out: Path
    settings: dict[str, str]
    overrides: list[str] = field(default_factory=list)
    recipe: str = "run_qwen2_5vl_gndpo.sh"
    module: str = "tests.end_to_end.capture"
    listening: dict[str, list[str]] = field(default_factory=dict)
    """The addresses at which the run's processes accepted connections when it was killed, each with their commands."""

    @property
    def steps(self) -> list[dict]:
        """The metrics of the finished steps, by verl's file logger; a line that is being written is left out."""
        return [metrics for metrics in self._metrics if "training/global_step" in metrics]

    @property
    def validation(self) -> dict:
        """The metrics of the first validation."""
        return next(metrics for metrics in self._metrics if any(name.startswith("val-core/") for name in metrics))

    @property
    def _metrics(self) -> list[dict]:
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line)["data"] for line in lines if line.endswith("\n")]

    @property
    def log(self) -> str:
        return (self.out / "log").read_text(errors="replace")

    def start(self) -> subprocess.Popen:
        self.out.mkdir(parents=True, exist_ok=True)
        capture = self.out / "captured"
        capture.mkdir(exist_ok=True)
        # The trainer checks the same before it places a worker; compare_signals in test_recipes.py has the doctor, too.
        env = os.environ | {"CHECK": "False"} | self.settings
        env |= {
            "PROFILE": "cpu",
            "PYTHON": sys.executable,
            "OUTPUT_DIR": str(self.out),
            "CAPTURE_DIR": str(capture),
            "VERL_USE_EXTERNAL_MODULES": self.module,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")])),
        }
        command = ["bash", f"examples/{self.recipe}", *self.overrides]
        with (self.out / "log").open("w") as sink:
            return subprocess.Popen(command, cwd=REPO, env=env, stdout=sink, stderr=subprocess.STDOUT)

    def finish(self) -> "Run":
        process = self.start()
        try:
            code = process.wait(START_UP_LIMIT_S)
        finally:
            kill(process)
        assert code == 0, f"the run failed with exit code {code}\n" + "\n".join(self.log.splitlines()[-60:])
        return self

    def kill_after(self, step: int) -> "Run":
        """Start, and SIGKILL everything as soon as the metrics of `step` are written."""
        process = self.start()
        try:
            self._wait_for(process, step)
            self.listening = listening(process)
        finally:
            kill(process)
        return self

    def kill_at_random(self, seed: int) -> "Run":
        """Start, and SIGKILL everything at some time in the third or fourth step. The first takes much longer."""
        chance = random.Random(seed)
        steps, share = chance.randint(2, 3), chance.random()
        print(f"seed {seed}: killed after {steps} steps and {share:.2f} of a step")
        process = self.start()
        try:
            self._wait_for(process, steps)
            time.sleep(share * self.steps[-1]["timing_s/step"])
        finally:
            kill(process)
        return self

    def kill_while_writing(self, file: Path) -> "Run":
        """Start, and SIGKILL everything while a file is being written, of which the first bytes are left."""
        file.parent.mkdir(parents=True)
        # Whoever writes into a pipe waits until somebody reads.
        os.mkfifo(file)
        pipe = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        process, written = self.start(), b""
        deadline = time.monotonic() + START_UP_LIMIT_S
        try:
            while not written:
                assert process.poll() is None, "the run ended early\n" + "\n".join(self.log.splitlines()[-60:])
                assert time.monotonic() < deadline, f"nothing was written to {file}"
                time.sleep(0.1)
                with contextlib.suppress(BlockingIOError):
                    written = os.read(pipe, 1000)
        finally:
            kill(process)
            os.close(pipe)
        file.unlink()
        file.write_bytes(written)
        return self

    def finish_without(self, name: str, step: int, only_first: bool = False) -> "Run":
        """Run to the end, but SIGKILL processes as soon as metrics of so many steps are written.

        Args:
            name: part of their command lines.
            step: how many steps.
            only_first: kill only the one that was started first.
        """
        process = self.start()
        try:
            self._wait_for(process, step)
            family = psutil.Process(process.pid).children(recursive=True)
            killed = [member for member in family if name in " ".join(member.cmdline())]
            assert killed
            killed.sort(key=psutil.Process.create_time)
            for member in killed[:1] if only_first else killed:
                member.kill()
            code = process.wait(START_UP_LIMIT_S)
        finally:
            kill(process)
        assert code == 0, f"the run failed with exit code {code}\n" + "\n".join(self.log.splitlines()[-60:])
        return self

    def _wait_for(self, process: subprocess.Popen, step: int) -> None:
        deadline = time.monotonic() + START_UP_LIMIT_S
        while len(self.steps) < step:
            assert process.poll() is None, "the run ended early\n" + "\n".join(self.log.splitlines()[-60:])
            assert time.monotonic() < deadline, f"no step {step} in time\n" + "\n".join(self.log.splitlines()[-60:])
            time.sleep(0.2)

    def captured(self, step: int, batch: int = 0) -> list[dict]:
        """The rows of a step's batch, in the order in which the estimator saw them."""
        import torch

        return torch.load(self._capture(step, batch), weights_only=False)

    def has_captured(self, step: int) -> bool:
        """True if the run came so far in a step that its estimator saw a batch."""
        return self._capture(step, 0).exists()

    def _capture(self, step: int, batch: int) -> Path:
        return self.out / "captured" / f"step_{step}.{batch}.pt"

    def weights(self, step: int) -> dict[str, "torch.Tensor"]:
        """The weights in a checkpoint of one rank, in the folder `checkpoints` beside `out`."""
        import torch

        folder = self.out.parent / "checkpoints" / f"global_step_{step}" / "actor"
        loaded = torch.load(folder / "model_world_size_1_rank_0.pt", weights_only=False)
        return {name: getattr(value, "_local_tensor", value) for name, value in loaded.items()}


def overrides(steps: int, checkpoints: Path, *more: str) -> list[str]:
    """The arguments of a run of so many steps with a rule-based reward."""
    return [
        f"trainer.total_training_steps={steps}",
        f"trainer.default_local_dir={checkpoints}",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        *REWARD,
        *more,
    ]


def settings(models: Path, data: Path, **more: str) -> dict[str, str]:
    """The environment of a run with the student and the teacher in a folder."""
    base = {"STUDENT": str(models / "student"), "TEACHER": str(models / "teacher"), "DATA_DIR": str(data)}
    return base | {"BATCH": "4", "N": "4", "LR": "1e-3"} | more


def listening(process: subprocess.Popen) -> dict[str, list[str]]:
    """The addresses at which a run accepts connections, each with the commands of the processes that do."""
    found: dict[str, list[str]] = {}
    for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in member.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    program, *arguments = member.cmdline()
                    command = " ".join([Path(program).name, *arguments])[:80]
                    found.setdefault(connection.laddr.ip, []).append(command)
    return found


def kill(process: subprocess.Popen) -> None:
    """SIGKILL a run with everything that it has started: Ray and vLLM put processes into sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=60)
    process.wait()
