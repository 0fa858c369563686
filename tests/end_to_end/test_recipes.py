# SPDX-License-Identifier: Apache-2.0
"""The scripts around recipes: a Slurm allocation of two nodes, and a comparison of signals."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.harness import REWARD, Run, overrides, settings
from tests.end_to_end.test_training import assert_healthy, reference_log_probs

SCONTROL = '#!/bin/sh\n[ "$1 $2 $3" = "show hostnames node[1-2]" ] && printf "node1\\nnode2\\n"\n'
# Runs a node's command on this machine. It notes the node, as Slurm would start it there.
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do
    case $1 in --nodelist=*) node=${1#--nodelist=} ;; esac
    shift
done
echo "$node $*" >>"$SRUN_LOG"
exec "$@"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> dict[str, str]:
    """Put a Slurm into place that has two nodes, both of them this machine; return its settings."""
    tools = tmp_path / "slurm"
    tools.mkdir()
    for name, script in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    return {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "SRUN_LOG": str(tmp_path / "srun.log"),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "RAY_PORT": "6391",
        # Ray finds no GPU here, and both of its nodes share a memory.
        "RAY_ARGUMENTS": "--num-gpus=1 --num-cpus=16 --object-store-memory=300000000",
    }


def test_a_recipe_runs_on_the_nodes_of_an_allocation(models, dice, slurm, tmp_path):
    arguments = overrides(2, tmp_path / "checkpoints", "trainer.save_freq=-1", "trainer.resume_mode=disable")
    arguments.insert(0, "examples/run_qwen2_5vl_gndpo.sh")
    run = Run(tmp_path / "run", settings(models, dice, **slurm), arguments, "multinode.sh").finish()
    assert_healthy(run, [1, 2])
    assert "Ray runs on 2 nodes" in run.log
    # What other programs look for to find a Ray that runs on this machine.
    assert not Path("/tmp/ray/ray_current_cluster").exists()
    started = [line.split() for line in Path(slurm["SRUN_LOG"]).read_text().splitlines() if "start" in line.split()]
    assert sorted((line[0], "--head" in line) for line in started) == [("node1", True), ("node2", False)]
    for row in run.captured(1)[:4]:
        for key, name in (("teacher_log_probs", "teacher"), ("old_log_probs", "student")):
            np.testing.assert_allclose(row[key].numpy(), reference_log_probs(models / name, row), atol=1e-4, rtol=0)


def test_a_dedicated_teacher_works_on_a_node_of_its_own(models, dice, slurm, tmp_path):
    """Each node has one GPU, so the actor has that of one node and the teacher that of the other."""
    arguments = overrides(2, tmp_path / "checkpoints", "trainer.save_freq=-1", "trainer.resume_mode=disable")
    arguments.insert(0, "examples/run_qwen2_5vl_gndpo.sh")
    arguments.append("trainer.nnodes=1")
    run = Run(tmp_path / "run", settings(models, dice, TEACHER_GPUS="1", **slurm), arguments, "multinode.sh").finish()
    assert_healthy(run, [1, 2])
    assert all("gndpo/teacher_ahead_share" in step for step in run.steps)
    for row in run.captured(2)[:4]:
        expected = reference_log_probs(models / "teacher", row)
        np.testing.assert_allclose(row["teacher_log_probs"].numpy(), expected, atol=1e-4, rtol=0)


def test_signals_are_compared_over_their_runs(models, dice, tmp_path):
    """A run that has finished is not repeated, and one that was interrupted keeps its log."""
    compared = tmp_path / "run"
    logged = {"training/global_step": 1, "actor/grad_norm": 1.0, "timing_s/step": 2.0}
    line = json.dumps({"step": 1, "data": logged}) + "\n"
    for name, text in (("gndpo-seed3", line), ("log_odds_opd-seed3", line + '{"step": 2, "da')):
        (compared / name).mkdir(parents=True)
        (compared / name / "metrics.jsonl").write_text(text)
    (compared / "gndpo-seed3" / "finished").touch()
    arguments = ["trainer.total_training_steps=2", "trainer.val_before_train=False", "trainer.test_freq=-1", *REWARD]
    environment = settings(models, dice, SIGNALS="gndpo log_odds_opd", SEEDS="3", CHECK="True")
    Run(compared, environment, arguments, "compare_signals.sh").finish()

    assert (compared / "gndpo-seed3" / "metrics.jsonl").read_text() == line
    lines = (compared / "log_odds_opd-seed3" / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert lines[:2] == [line, '{"step": 2, "da\n']
    log = compared / "log_odds_opd-seed3" / "metrics.jsonl"
    log.write_text("".join(lines[2:]))
    assert_healthy(Run(log.parent, {}), [1, 2], gain=False)
    summary = json.loads((compared / "report" / "summary.json").read_text())
    steps = {arm["label"]: arm["runs"][0]["steps"] for arm in summary["arms"]}
    assert steps == {"gndpo": [1, 1], "log_odds_opd": [1, 2]}
