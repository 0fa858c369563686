# SPDX-License-Identifier: Apache-2.0
"""The steps of `verl-gndpo evaluate`."""

import json
import re
import urllib.parse
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl_gndpo.evaluation import certainty
from verl_gndpo.evaluation.breakdowns import figures_of, group_of
from verl_gndpo.evaluation.grading import COLUMNS, Graded, Row, grade, load_reward, read_rows
from verl_gndpo.evaluation.job import Answers, Job, Means, key_of, write_job
from verl_gndpo.evaluation.pool import AnsweringError, answer
from verl_gndpo.export.folders import find_actor
from verl_gndpo.rewards import compute_score, is_missing
from verl_gndpo.rewards.answer_types import ANSWER_TYPE_OF_SOURCE, NO_ANSWER

FORMAT = "verl-gndpo evaluation"


class EvaluationError(ValueError):
    """Models can't be evaluated. The message is one line: what is wrong, where, and what to do."""


def evaluate(
    jobs: list[Job],
    out: Path,
    say: Callable[[str], None] = print,
    reward: str | None = None,
    means: Means | None = None,
) -> dict[str, Any]:
    """Do what `_evaluate` does, and turn what the disk or a damaged file of `out` leads to into an EvaluationError."""
    try:
        return _evaluate(jobs, out, say, reward, means or Means())
    except EvaluationError:
        raise
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise EvaluationError(
            f"--out {out} can't be used: {place}{error.strerror or error} -> make room or give another --out; "
            "answers that are there stay"
        ) from error


def _evaluate(
    jobs: list[Job], out: Path, say: Callable[[str], None], reward: str | None, means: Means
) -> dict[str, Any]:
    """Let models answer, grade the answers, and write `summary.json` and `index.html`.

    Args:
        jobs: one per model, which differ in nothing else but where it runs.
        out: the folder. Each model has a folder in it, whose answers a second call goes on with.
        say: takes lines for the user.
        reward: PATH:NAME of the function that grades; None for `verl_gndpo.rewards.compute_score`.
        means: with what models answer.

    Returns:
        what summary.json holds.

    Raises:
        EvaluationError: a model, file or function can't be used, `out` has answers to another job, or answering failed.
    """
    from verl_gndpo.evaluation.page import render

    if any(job.server for job in jobs):
        _of_file(key_of, means.key_from)
    for job in jobs:
        if job.server is None:
            _check_model(job.model)
            _check_length(job)
    for file in jobs[0].files:
        _check_file(Path(file), typed=reward is None)
    if len({job.model for job in jobs}) < len(jobs):
        raise EvaluationError("a model is given twice -> give each model once")
    function = _of_file(load_reward, reward) if reward else compute_score
    rows = read_rows(jobs[0].files, jobs[0].limit)
    by_source: dict[str, list[tuple[int, Row]]] = {}
    for number, row in enumerate(rows):
        if not is_missing(row.truth) and row.info.get("answer_type") != NO_ANSWER:
            by_source.setdefault(row.problem.source, []).append((number, row))
    if not by_source:
        raise EvaluationError("no row of --data has an answer (reward_model.ground_truth)")
    labels = _labels([job.model for job in jobs])
    folders = [out / "models" / re.sub(r"[^\w.-]+", "_", label) for label in labels]
    for job, folder in zip(jobs, folders, strict=True):
        if not _of_file(write_job, folder / "job.json", job):
            raise EvaluationError(
                f"{folder} has answers to other questions or settings, or --data has changed since "
                "-> give another --out"
            )
    numbers = sorted(number for found in by_source.values() for number, _ in found)
    answers: dict[str, Answers] = {}
    failures = []
    for label, job, folder in zip(labels, jobs, folders, strict=True):
        lacking = _of_file(Answers, folder / "answers.jsonl").lacking(numbers)
        if lacking:
            say(f"answering  {label}: {len(lacking)} of {len(numbers)} problems")
            try:
                answer(folder / "job.json", lacking, len(numbers), means, job.server is not None)
            except AnsweringError as error:
                # The other models may take a night, which this one need not cost.
                failures.append(f"{label}: {error}")
                continue
        answers[label] = _of_file(Answers, folder / "answers.jsonl")
    if failures:
        kept = f"; the {len(answers)} other model(s) are answered" if answers else ""
        raise EvaluationError("; ".join(failures) + kept)
    graded = {
        label: {
            source: _of_file(grade, found, answers[label], job.answers, function) for source, found in by_source.items()
        }
        for label, job in zip(labels, jobs, strict=True)
    }
    summary = _summarise(jobs, labels, by_source, graded, reward)
    for name, text in (
        ("summary.json", json.dumps(summary, indent=1) + "\n"),
        ("index.html", render(summary, by_source, graded, answers)),
    ):
        temporary = out / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8", errors="replace")
        temporary.replace(out / name)
    for label, sources in summary["models"].items():
        for source, found in sources.items():
            value, low, high = found["accuracy"]
            say(f"accuracy   {label} on {source}: {value:.3f} ({low:.3f} to {high:.3f}), {found['problems']} problems")
    say(f"evaluation of {len(jobs)} model(s): {out / 'index.html'}")
    return summary


def _summarise(
    jobs: Sequence[Job],
    labels: Sequence[str],
    by_source: dict[str, list[tuple[int, Row]]],
    graded: dict[str, dict[str, Graded]],
    reward: str | None,
) -> dict:
    groups = {source: [group_of(row.problem) for _, row in rows] for source, rows in by_source.items()}
    models = {
        label: {source: _describe(by_source[source], groups[source], one) for source, one in sources.items()}
        for label, sources in graded.items()
    }
    comparisons: list[dict[str, Any]] = []
    for first, second in combinations(graded, 2):
        for source in by_source:
            found = certainty.compare(graded[first][source].acc, graded[second][source].acc, groups[source])
            interval = found.interval
            comparisons.append(
                {"first": first, "second": second, "source": source, "only_first": found.only_a}
                | {"only_second": found.only_b, "p": found.p}
                | {"difference": [interval.value, interval.low, interval.high]}
            )
    for entry, p in zip(comparisons, certainty.holm([entry["p"] for entry in comparisons]), strict=True):
        entry |= {"p_adjusted": p, "different": p < 1 - certainty.LEVEL}
    job = jobs[0]
    settings = {
        "n": job.answers,
        "temperature": job.temperature,
        "seed": job.seed,
        "limit": job.limit,
        "max_prompt": job.max_prompt,
        "max_response": job.max_response,
        "data": job.files,
        "data_sha256": job.contents,
        "reward_function": reward,
        "servers": {label: one.server for label, one in zip(labels, jobs, strict=True) if one.server},
        # Without a tokenizer, nobody knows which prompts a server made.
        "prompts_unchecked": [
            label for label, one in zip(labels, jobs, strict=True) if one.server and one.tokenizer is None
        ],
    }
    return {"format": FORMAT, "settings": settings, "models": models, "comparisons": comparisons}


def _describe(rows: Sequence[tuple[int, Row]], groups: list[str], graded: Graded) -> dict[str, Any]:
    interval = certainty.accuracy(graded.acc, groups)
    answers = graded.acc.shape[1]
    powers = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= answers]
    return {
        "problems": len(rows),
        "accuracy": [interval.value, interval.low, interval.high],
        "pass_at": {str(k): certainty.pass_at_k(graded.acc, k) for k in powers},
        "format": float(graded.format.mean()),
        "tokens_mean": float(graded.tokens.mean()),
        "truncated": float(graded.truncated.mean()),
        "no_answer_found": float(1 - graded.found.mean()),
        "prompts_too_long": graded.too_long,
        "figures": [
            [one.breakdown, one.name, one.value, one.count]
            for one in figures_of([row.problem for _, row in rows], graded.acc)
        ],
    }


def _of_file(use: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return use(*arguments)
    except ValueError as error:
        raise EvaluationError(str(error)) from error


def _labels(models: list[str]) -> list[str]:
    short = [Path(model).name or model for model in models]
    return [model if short.count(name) > 1 else name for model, name in zip(models, short, strict=True)]


def json_object(option: str, text: str) -> dict[str, Any]:
    """Return the object that an option gives.

    Raises:
        EvaluationError: it is no JSON object.
    """
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise EvaluationError(f'{option} {text} is no JSON object -> write it as {{"key": value}}, in quotes')
    return found


def server_of(
    model: str, models: Sequence[str], servers: Sequence[str], tokenizer: str | None
) -> tuple[str | None, str | None]:
    """Return the URL of the server that answers for a model, and the tokenizer that its prompts are compared with.

    Args:
        model: one of `models`.
        servers: URL or MODEL=URL each.
        tokenizer: as given; None if it was not.

    Raises:
        EvaluationError: a URL can't be used, two are for one model, or one is for none.
    """
    found = []
    for given in servers:
        named, separator, url = given.rpartition("=http")
        if separator and named not in models:
            raise EvaluationError(f"--server {named}=...: there is no model {named} -> correct the name")
        if not separator or named == model:
            found.append(_address(f"http{url}" if separator else given))
    if len(found) > 1:
        raise EvaluationError(f"{model} has {len(found)} servers -> give one --server for it")
    if not found:
        return None, None
    if tokenizer is None and (Path(model) / "config.json").is_file():
        tokenizer = model
    return found[0], tokenizer


def _address(url: str) -> str:
    """Return the URL up to /v1, which is appended to a bare host.

    Raises:
        EvaluationError: it is no URL of a server, or has a password, which would be in files and messages.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        # A port that is no number is found when it is read.
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise EvaluationError("--server has no URL of a server -> give one such as http://localhost:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise EvaluationError(
            f"--server {parts.scheme}://{parts.hostname} has more than a host and a path -> name the variable that "
            "holds its key with --api-key-env"
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


def _check_model(model: str) -> None:
    path = Path(model).expanduser()
    if path.exists() and find_actor(path):
        raise EvaluationError(f"{model} is a checkpoint of verl -> verl-gndpo export {model} --out DIR, then give DIR")
    local = model.startswith((".", "/", "~")) or model.count("/") != 1
    if not (path / "config.json").is_file() and (local or path.exists()):
        raise EvaluationError(f"{model} is no model folder: it has no config.json -> correct the path")
    described = path / "tokenizer_config.json"
    templates = (path / "chat_template.jinja", path / "chat_template.json", path / "additional_chat_templates")
    if (
        described.is_file()
        and "chat_template" not in described.read_text(errors="replace")
        and not any(file.exists() for file in templates)
    ):
        raise EvaluationError(
            f"{model} has no chat template -> copy chat_template.jinja of the model that was trained into it"
        )


def _check_length(job: Job) -> None:
    """Refuse prompts and responses that are longer than the model's context, if its folder states that."""
    path = Path(job.model).expanduser() / "config.json"
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise EvaluationError(f"{path} is damaged: {error} -> restore it") from error
    if not isinstance(config, dict):
        raise EvaluationError(f"{path} holds no JSON object -> restore it")
    text = {**config, **(config.get("text_config") or config.get("llm_config") or {})}
    limit = text.get("max_position_embeddings")
    # A factor stretches the context, in a way of the model's own.
    stretched = "factor" in json.dumps([text.get("rope_scaling"), text.get("rope_parameters")])
    if isinstance(limit, int) and not stretched and job.max_prompt + job.max_response > limit:
        raise EvaluationError(
            f"--max-prompt {job.max_prompt} and --max-response {job.max_response} exceed the {limit} tokens of "
            f"{job.model} -> lower them"
        )


def _check_file(path: Path, typed: bool) -> None:
    """Refuse a file that can't be asked or, if `typed`, has rows that our own reward function can't grade."""
    if not path.is_file():
        raise EvaluationError(f"--data {path} does not exist -> write it with verl-gndpo data NAME")
    try:
        with pq.ParquetFile(path) as parquet:
            names = parquet.schema_arrow.names
            missing = [name for name in ("prompt", *COLUMNS) if name not in names]
            if missing:
                raise EvaluationError(
                    f"--data {path} lacks {', '.join(missing)} -> convert it with verl-gndpo data NAME"
                )
            if not parquet.metadata.num_rows:
                raise EvaluationError(f"--data {path} has no rows -> convert it again with verl-gndpo data NAME")
            used = [name for name in ("data_source", "extra_info") if name in names]
            place = 0
            for batch in parquet.iter_batches(columns=used) if typed else ():
                for row in batch.to_pylist():
                    _check_type(path, place, row)
                    place += 1
    except (pa.ArrowException, OSError) as error:
        raise EvaluationError(f"--data {path} is no parquet file: {' '.join(str(error).split())[:120]}") from error


def _check_type(path: Path, place: int, row: dict[str, Any]) -> None:
    if not (row.get("extra_info") or {}).get("answer_type") and row["data_source"] not in ANSWER_TYPE_OF_SOURCE:
        raise EvaluationError(
            f"--data {path}: row {place} of {row['data_source']!r} has no extra_info.answer_type, so "
            "that its answer can't be graded -> name the run's own function with --reward-function PATH:NAME, or "
            "convert the file with verl-gndpo data NAME"
        )
