# SPDX-License-Identifier: Apache-2.0
"""Break one thing after another in real runs on tiny models, and write down what becomes of the run.

    python -m benchmarks.faults [--only NAME ...] [--json OUT] [--keep FOLDER]

Runs examples/run_qwen2_5vl_gndpo.sh with PROFILE=cpu: verl's trainer, vLLM, the teacher's worker, a checkpoint every
second step. Each fault comes in a step that would write a checkpoint. A run that survives gets the next fault; one that
ends is resumed, and the resumed run gets the next one. So each row says whether the last checkpoint could be resumed.
The rows replace those of the table in docs/reliability.md. The exit code is not 0 if a run hangs, ends without naming
the cause, leaves a process behind, or can't be resumed.

Full and read-only disks are real: small file systems in memory, which only root may mount. Without it these faults are
left out. About 20 minutes on two cores.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from benchmarks._common import with_children
from benchmarks._runs import overrides, prepare
from examples.quickstart import diagrams
from tests.end_to_end.harness import REPO, Run, kill

PAGE = REPO / "docs" / "reliability.md"
BEGIN, END = "<!-- faults.py -->", "<!-- end -->"
START_UP_LIMIT_S = 900
STEP_LIMIT_S = 120
FAULT_LIMIT_S = 180
"""A run that neither goes on nor ends within this time hangs."""
LEFT_OVER_S = 20
"""How long after its end processes of a run may still be there."""
TIMEOUT_S = 20
"""The limits of the waits for the teacher and for the rollouts; by default they are at least 10 and 30 minutes."""
FILE_SYSTEMS = {"checkpoints": 200, "metrics": 4, "words": 1}
"""Folders with a file system of their own, and its size in MB."""


class Scene:
    """One run after another with the same models, data and checkpoints."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.switches = folder / "switches"
        self.switches.mkdir()
        self.checkpoints = folder / "checkpoints"
        environment = prepare(folder, batch=2, n=2, MAX_RESPONSE="8", FAULT_FOLDER=str(self.switches))
        self.environment = environment | {"VERL_FILE_LOGGER_PATH": str(folder / "metrics" / "metrics.jsonl")}
        for name in FILE_SYSTEMS:
            (folder / name).mkdir()
        self._runs = self._data_sets = 0
        self.process: subprocess.Popen | None = None
        self.run: Run

    def start(self) -> None:
        """Start a run, which resumes the last checkpoint if there is one, and wait for its first step."""
        self._runs += 1
        words = self.folder / "words" / "words.jsonl"
        arguments = overrides(
            100_000,
            self.checkpoints,
            "trainer.save_freq=2",
            "trainer.max_actor_ckpt_to_keep=2",
            "trainer.test_freq=-1",
            "trainer.resume_mode=auto",
            f"teacher.timeout_s={TIMEOUT_S}",
            f"algorithm.gndpo.rollout_timeout_s={TIMEOUT_S}",
            "algorithm.gndpo.worst_tokens.every=1",
            f"algorithm.gndpo.worst_tokens.path={words}",
        )
        out = self.folder / f"run_{self._runs}"
        out.mkdir()
        (out / "metrics.jsonl").symlink_to(self.environment["VERL_FILE_LOGGER_PATH"])
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.environment["VERL_FILE_LOGGER_PATH"])
        self.run = Run(out, self.environment, arguments, module="benchmarks._fault_hooks")
        self.process = self.run.start()
        self.family = {psutil.Process(self.process.pid)}
        self.wait(lambda: self.run.steps, START_UP_LIMIT_S, "its first step")

    @property
    def step(self) -> int:
        """The last step whose metrics are written."""
        return int(self.run.steps[-1]["training/global_step"])

    @property
    def checkpoint(self) -> int:
        """The step of the last complete checkpoint; 0 without one."""
        tracker = self.checkpoints / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text()) if tracker.exists() else 0

    def wait(self, reached: Callable[[], object], limit: float, what: str) -> None:
        """Wait until something is the case.

        Raises:
            SystemExit: the run has ended before, or it was too long.
        """
        assert self.process is not None
        deadline = time.monotonic() + limit
        while not reached():
            if self.process.poll() is not None or time.monotonic() > deadline:
                print("\n".join(self.run.log.splitlines()[-40:]))
                sys.exit(f"{self.run.out}: waiting for {what}; exit code {self.process.returncode}")
            self.family.update(with_children(psutil.Process(self.process.pid)))
            time.sleep(0.1)

    def processes(self, *names: str) -> list[psutil.Process]:
        """Return the run's processes whose command has one of these names.

        Raises:
            SystemExit: there are none.
        """
        assert self.process is not None
        found = []
        for member in with_children(psutil.Process(self.process.pid)):
            with contextlib.suppress(psutil.Error):
                if any(name in " ".join(member.cmdline()) for name in names):
                    found.append(member)
        return found or sys.exit(f"{self.run.out}: no process is called {' or '.join(names)}")

    def send(self, number: signal.Signals, *names: str) -> None:
        """Send a signal to processes of the run."""
        for process in self.processes(*names):
            process.send_signal(number)

    def switch_on(self, name: str) -> None:
        """Have the processes of the run do what benchmarks/_fault_hooks.py says of a name."""
        (self.switches / name).touch()

    def fill(self, name: str) -> None:
        """Use up the space of a file system."""
        with (self.folder / name / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def remount(self, name: str, options: str) -> None:
        """Change the options of a file system."""
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder / name], check=True)

    def replace_data(self) -> None:
        """Put other problems in the place of those that the run reads."""
        self._data_sets += 1
        problems = diagrams.make_problems("train", 256, seed=self._data_sets)
        diagrams.write_parquet(problems, self.folder / "data" / "train.parquet")

    def mend(self) -> None:
        """Undo what faults did, but for the data."""
        for switch in self.switches.iterdir():
            switch.unlink()
        for name in FILE_SYSTEMS:
            if os.path.ismount(self.folder / name):
                self.remount(name, "rw")
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name / "filler").unlink()

    def left_over(self) -> list[str]:
        """Return the names of processes that outlive the run, and end them."""
        _, alive = psutil.wait_procs(self.family, timeout=LEFT_OVER_S)
        names = []
        for process in alive:
            with contextlib.suppress(psutil.Error):
                names.append(" ".join(process.cmdline()[:3])[:60])
                process.kill()
        return names

    def stop(self) -> None:
        """End the run with everything that it has started."""
        if self.process is not None:
            kill(self.process)
            self.left_over()
            self.process = None


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong."""

    name: str
    happens: str
    """The fault in words."""

    cause: Callable[[Scene], object]
    says: str
    """What the log has to say, as a regular expression."""

    ends: bool = True
    """True: the run ends. False: it goes on."""

    file_system: str | None = None
    """The folder that needs a file system of its own."""

    resumed_says: str = ""
    """What the log of the run that resumes this one has to say; it is shown instead if there is anything."""


def _kill(*names: str) -> Callable[[Scene], object]:
    return lambda scene: scene.send(signal.SIGKILL, *names)


def _stop(*names: str) -> Callable[[Scene], object]:
    return lambda scene: scene.send(signal.SIGSTOP, *names)


def _switch(name: str) -> Callable[[Scene], object]:
    return lambda scene: scene.switch_on(name)


TEACHER, ENGINE, REWARD = "ray::TeacherWorker", "VLLM::", "ray::RewardLoopWorker"
REPLACED = r"the teacher was lost and is replaced \(\d of 3 times\): "
LOST = r"prompts of this step have failed, and with them \d+% of its responses.*?have: "
STALLED = rf"no response was finished within {TIMEOUT_S} s.*?(all workers answer|do not answer: )"

FAULTS = (
    Fault("teacher_killed", "teacher: kill -9", _kill(TEACHER), REPLACED + "ActorDiedError", ends=False),
    Fault("teacher_stopped", "teacher: kill -STOP", _stop(TEACHER), REPLACED + "1 of its ranks had not", ends=False),
    Fault(
        "disk_full_words",
        "disk full at the worst tokens",
        lambda scene: scene.fill("words"),
        "words.jsonl can't be written: .*?No space left on device; no more of the worst tokens will be written",
        ends=False,
        file_system="words",
    ),
    Fault("clock", "clock set back by an hour", _switch("clock"), "", ends=False),
    Fault("data", "data file replaced", Scene.replace_data, "", ends=False),
    Fault(
        "data_resumed",
        "data file replaced, then main process: kill -9",
        lambda scene: (scene.replace_data(), scene.send(signal.SIGKILL, "main_ppo")),
        "",
        resumed_says="global_step_[0-9]+ was made with other training data: .*?has changed",
    ),
    Fault(
        "trainer_killed",
        "trainer's process (TaskRunner): kill -9",
        _kill("ray::TaskRunner"),
        "ActorDiedError|ActorUnavailableError|WorkerCrashedError",
    ),
    Fault("driver_killed", "main process: kill -9", _kill("main_ppo"), ""),
    Fault(
        "teacher_memory",
        "teacher: out of memory",
        _switch("out_of_memory"),
        "OutOfMemoryError: .*?teacher.max_token_len_per_gpu",
    ),
    Fault("teacher_raises", "teacher: raises", _switch("raises"), "RuntimeError: a bug of the model"),
    Fault("teacher_nan", "teacher: returns NaN", _switch("nan"), r"the teacher's log-prob of token 0 .*? is nan"),
    Fault("teacher_too_few", "teacher: too few log-probs", _switch("too_few"), r"\d+ log-probs of \d+ response tokens"),
    Fault("engine_killed", "rollout engine: kill -9", _kill(ENGINE), LOST + "rollout engine: "),
    Fault("engine_stopped", "rollout engine: kill -STOP", _stop(ENGINE), STALLED),
    Fault("reward_killed", "reward worker: kill -9", _kill(REWARD), LOST + "reward: "),
    Fault("reward_stopped", "reward worker: kill -STOP", _stop(REWARD), STALLED + "reward worker 0"),
    Fault(
        "disk_full_checkpoint",
        "disk full at a checkpoint",
        lambda scene: scene.fill("checkpoints"),
        "could not be written, most likely because its disk is full.*?last complete checkpoint: global_step_",
        file_system="checkpoints",
    ),
    Fault(
        "disk_full_metrics",
        "disk full at the metrics",
        lambda scene: scene.fill("metrics"),
        "the metrics of step .*?No space left on device",
        file_system="metrics",
    ),
    Fault(
        "read_only",
        "checkpoints' folder becomes read-only",
        lambda scene: scene.remount("checkpoints", "ro"),
        "Read-only file system.*?global_step_",
        file_system="checkpoints",
    ),
)


@dataclass
class Outcome:
    """What became of a run."""

    name: str
    exit_code: int | None
    """None: the run went on."""

    seconds: float
    """From the fault to the end of the run, or to the end of the step."""

    usual_step_s: float
    says: str | None
    """What the log says; None: not what it should."""

    steps_lost: int
    """Steps after the last checkpoint, with the one in which the fault came."""

    hangs: bool = False
    left_over: tuple[str, ...] = ()
    resumed_from: int | None = None

    @property
    def is_fine(self) -> bool:
        return self.says is not None and not self.hangs and not self.left_over

    def row(self, fault: Fault) -> str:
        """Return the line of the table."""
        lost = "nothing"
        if self.hangs:
            result = f"**hangs** for {self.seconds:.0f} s"
        elif self.exit_code is None:
            result = f"goes on after {self.seconds:.0f} s"
        else:
            result = f"ends after {self.seconds:.0f} s, exit code {self.exit_code}"
        if self.exit_code is not None or self.hangs:
            lost = f"{self.steps_lost} steps" if self.resumed_from is not None else "**can't be resumed**"
        said = "**not named**" if self.says is None else f"`{self.says}`" if self.says else ""
        return f"| {fault.happens} | {result} | {said} | {lost} |"


def suffer(scene: Scene, fault: Fault) -> Outcome:
    """Cause a fault in a step that would write a checkpoint, and see what becomes of the run."""
    assert scene.process is not None
    scene.wait(lambda: 0 < scene.checkpoint == scene.step - 1, STEP_LIMIT_S, "the step after a checkpoint")
    step, checkpoint, offset = scene.step, scene.checkpoint, len(scene.run.log)
    usual = scene.run.steps[-1]["timing_s/step"]
    begin = time.monotonic()
    fault.cause(scene)
    # Some faults only show when the step after this one reads what they spoiled.
    while scene.process.poll() is None and scene.step < step + 1 and time.monotonic() - begin < FAULT_LIMIT_S:
        scene.family.update(with_children(psutil.Process(scene.process.pid)))
        time.sleep(0.1)
    seconds, code = time.monotonic() - begin, scene.process.poll()
    log = scene.run.log[offset:]
    says = find(fault.says, log, scene.folder)
    outcome = Outcome(fault.name, code, seconds, usual, says, step + 1 - checkpoint)
    outcome.hangs = code is None and scene.step == step
    if code is not None or outcome.hangs:
        outcome.left_over = () if outcome.hangs else tuple(scene.left_over())
        scene.stop()
    if (code is None) == fault.ends and not outcome.hangs:
        outcome.says = None
    if outcome.says is None or outcome.hangs:
        print("\n".join(log.splitlines()[-60:]))
    scene.mend()
    return outcome


def find(wanted: str, log: str, folder: Path) -> str | None:
    """Return where a log says what it should, shortened; None if it does not."""
    said = re.search(wanted, re.sub(r"\x1b\[[0-9;]*m", "", log))
    return None if said is None else shorten(said.group(), folder)


def shorten(text: str, folder: Path) -> str:
    """Return a message of the log in one line, without this run's folder."""
    text = re.sub(r"\([A-Za-z.:_]+ pid=\d+\) ", "", text).replace(f"{folder}/", "")
    text = re.sub(r"run_\d+/", "", " ".join(text.split()))
    return text if len(text) <= 160 else text[:100] + " ... " + text[-55:]


def play(scene: Scene, faults: list[Fault]) -> Iterator[tuple[Fault, Outcome]]:
    """Cause the faults in turn, and resume each run that ends."""
    ended: tuple[Fault, Outcome] | None = None
    for fault in [*faults, None]:
        if scene.process is None and (fault is not None or ended is not None):
            checkpoint = scene.checkpoint
            scene.start()
            first = int(scene.run.steps[0]["training/global_step"])
            if ended is not None:
                ended[1].resumed_from = checkpoint if first == checkpoint + 1 else None
                if ended[0].resumed_says:
                    ended[1].says = find(ended[0].resumed_says, scene.run.log, scene.folder)
                yield ended
                ended = None
        if fault is None:
            break
        outcome = suffer(scene, fault)
        if scene.process is None:
            ended = fault, outcome
        else:
            yield fault, outcome
    scene.stop()


@contextlib.contextmanager
def file_systems(folder: Path) -> Iterator[bool]:
    """Give the folders in FILE_SYSTEMS file systems of their own; return whether that was possible."""
    mounted = []
    for name, size in FILE_SYSTEMS.items():
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", folder / name]
        if subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0:
            mounted.append(folder / name)
    try:
        yield len(mounted) == len(FILE_SYSTEMS)
    finally:
        for path in mounted:
            subprocess.run(["umount", "-l", path], check=True)


def update_table(page: str, rows: dict[str, str]) -> str:
    """Put rows of the table, by what happens, in the place of those of a page; return the page."""
    before, _, rest = page.partition(BEGIN)
    table, _, after = rest.partition(END)
    lines = [line for line in table.splitlines() if line.startswith("|")]
    old = {line.split(" | ")[0].removeprefix("| "): line for line in lines[2:]}
    new = old | rows
    order = [fault.happens for fault in FAULTS if fault.happens in new]
    return before + "\n".join([BEGIN, "", *lines[:2], *(new[name] for name in order), "", END]) + after


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[fault.name for fault in FAULTS], metavar="NAME")
    parser.add_argument("--json", type=Path, help="file for a line of JSON per fault")
    parser.add_argument("--keep", type=Path, help="folder of the runs; a temporary one without it")
    arguments = parser.parse_args()
    faults = [fault for fault in FAULTS if arguments.only is None or fault.name in arguments.only]
    if arguments.keep is not None:
        shutil.rmtree(arguments.keep, ignore_errors=True)
        arguments.keep.mkdir(parents=True)
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        scene = Scene((arguments.keep or Path(temporary)).resolve())
        with file_systems(scene.folder) as mounted:
            possible = [fault for fault in faults if mounted or fault.file_system is None]
            for fault in faults:
                if fault not in possible:
                    print(f"{fault.name}: left out, because only root may mount a file system", flush=True)
            try:
                for fault, outcome in play(scene, possible):
                    line = json.dumps(asdict(outcome))
                    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
                    if arguments.json is not None:
                        with arguments.json.open("a") as file:
                            file.write(line + "\n")
                    PAGE.write_text(update_table(PAGE.read_text(), {fault.happens: outcome.row(fault)}))
                    if not outcome.is_fine or (outcome.exit_code is not None and outcome.resumed_from is None):
                        failed.append(fault.name)
            finally:
                scene.stop()
    sys.exit(f"not as it should be: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
