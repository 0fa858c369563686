# SPDX-License-Identifier: Apache-2.0
"""Describe an exported model: the run that it is from, and what its log says of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from verl_gndpo.checkpoint import load_run
from verl_gndpo.export.folders import Checkpoint, ExportError
from verl_gndpo.report.logs import ReportError, read_run

SHOWN = {
    "critic/score/mean": "task reward in training",
    "gndpo/k1": "KL divergence from the teacher (k1), in nats per token",
    "response_length/mean": "length of responses, in tokens",
    "gndpo/response/truncated_share": "share of responses that reached the length limit",
}
"""Metrics of the step that a card shows, beside the accuracy of the last validation."""


@dataclass(frozen=True)
class Facts:
    """What is known of the run."""

    base: str | None
    """Folder or hub id of the model that training started from."""

    run: dict[str, Any]
    """What the trainer wrote beside the checkpoint; empty for a run without our estimators, or of an older version."""

    metrics: dict[str, tuple[int, float]]
    """By name, the step and the value."""


def collect_facts(checkpoint: Checkpoint, base: str | None, log: Path | None) -> Facts:
    """Return what a checkpoint and the run's log say of it.

    Args:
        base: replaces what the checkpoint says.
        log: of verl's file logger. None: the one that the checkpoint names, or metrics.jsonl in the run's folder, if
            there is one.

    Raises:
        ExportError: `log` can't be read.
    """
    run = load_run(checkpoint.step_folder) or {}
    folder = checkpoint.step_folder.parent
    places = [log] if log else [*([Path(run["log"])] if run.get("log") else []), folder / "metrics.jsonl"]
    metrics: dict[str, tuple[int, float]] = {}
    for place in places:
        if not log and not place.is_file():
            continue
        try:
            metrics = _read_metrics(place, checkpoint.step)
        except (ReportError, OSError) as error:
            if log:
                raise ExportError(str(error)) from error
            continue
        break
    return Facts(base or run.get("base"), run, metrics)


def _read_metrics(path: Path, step: int | None) -> dict[str, tuple[int, float]]:
    """Return the last finite value of each metric of SHOWN and of each accuracy, up to a step."""
    run = read_run(path)
    named = {label: run.metrics[name] for name, label in SHOWN.items() if name in run.metrics}
    found = {}
    for label, values in [*((f"accuracy on {source}", v) for source, v in run.accuracy.items()), *named.items()]:
        values = values.dropna()
        values = values if step is None else values[values.index <= step]
        if len(values):
            found[label] = int(values.index[-1]), float(values.iloc[-1])
    return found


def write_card(
    folder: Path, name: str, checkpoint: Checkpoint, facts: Facts, adapter: bool, weights: str, sees: bool
) -> None:
    """Write README.md.

    Args:
        folder: of the model.
        name: of the model.
        adapter: the folder holds adapters instead of a whole model.
        weights: their type, and what rounding to it changed.
        sees: whether the model takes images.
    """
    run = facts.run
    head: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    head["pipeline_tag"] = "image-text-to-text" if sees else "text-generation"
    head["tags"] = ["verl-gndpo", "on-policy-distillation"] if run else ["verl"]
    # The hub takes ids only.
    if facts.base and not Path(facts.base).is_absolute():
        head["base_model"] = facts.base
    rows = {
        "base model": facts.base,
        "teacher": _join(run.get("teachers")),
        "training data": _join(run.get("train_files")),
        "validation data": _join(run.get("val_files")),
        "signal": run.get("estimator"),
        "its stages": ", ".join(f"{name} {value}" for name, value in run.get("signal", {}).items()),
        "policy loss": run.get("policy_loss"),
        "steps": checkpoint.step,
        "weights": f"{'LoRA adapters, ' if adapter else ''}{weights}",
        "software": ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items()),
    }
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        f"# {name}",
        "",
        *(
            [f"Distilled on its own answers with verl and verl-gndpo from {_join(run.get('teachers'))}."]
            if run
            else ["Trained with verl."]
        ),
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in rows.items() if value not in (None, "")),
        "",
    ]
    if facts.metrics:
        lines += ["| metric | step | value |", "|---|---|---|"]
        lines += [f"| {_cell(name)} | {step} | {value:.4g} |" for name, (step, value) in facts.metrics.items()]
        lines.append("")
    (folder / "README.md").write_text("\n".join(lines))


def _join(values: list[str] | None) -> str:
    return ", ".join(values or [])


def _cell(value: Any) -> str:
    """Return a value as a table shows it."""
    return " ".join(str(value).split()).replace("|", "\\|")
