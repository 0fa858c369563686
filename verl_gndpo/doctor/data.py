# SPDX-License-Identifier: Apache-2.0
"""Check the data of a run: files, placeholders, rewards, and a teacher for every sample."""

import contextlib
import time
from typing import Any

from verl_gndpo.config import EVERY_SAMPLE
from verl_gndpo.conversion.sets import validation_only
from verl_gndpo.data_facts import FactsError, read_facts
from verl_gndpo.doctor.check import Check, Status, describe_error, select
from verl_gndpo.doctor.inputs import Inputs, local_path
from verl_gndpo.doctor.media import Reading, read_rows
from verl_gndpo.doctor.parquet import CANNOT_READ, ROWS_SHOWN, DataError, Label
from verl_gndpo.rewards.answer_types import ANSWER_TYPE_OF_SOURCE, ANSWER_TYPES, NO_ANSWER
from verl_gndpo.rewards.extract import response_prefix

REWARDS = "pkg://verl_gndpo.rewards"
USE_REWARDS = (
    f"reward.custom_reward_function.path={REWARDS}",
    "reward.custom_reward_function.name=compute_score",
)

READING_S = 30
"""Limit for decoding images and measuring prompts, for all files of a run together."""


def check_data(inputs: Inputs) -> list[Check]:
    """Check that every training and validation file can be read, and that each row has one image per placeholder.

    Training rows with videos are refused: verl 0.9.1 drops `second_per_grid_ts`, and counts one placeholder per video
    where Qwen3-VL has one per frame.
    """
    data = inputs.config.data
    if select(data, "custom_cls.path"):
        return [Check("data", "ok", f"not checked: data.custom_cls.path={data.custom_cls.path} reads it")]
    checks = []
    train_rows: int | None = 0
    for key in ("train_files", "val_files"):
        for file in inputs.files(key) if data.get(key) is not None else [""]:
            check, rows = _check_file(f"data.{key}", file, inputs)
            checks.append(check)
            if key == "train_files":
                train_rows = None if rows is None or train_rows is None else train_rows + rows
    if train_rows is not None:
        limit = data.get("train_max_samples") or -1
        rows = min(train_rows, limit) if limit > 0 else train_rows
        if rows < data.train_batch_size and not data.get("gen_batch_size"):
            detail = f"data.train_files has {rows} rows, not enough for data.train_batch_size={data.train_batch_size}"
            checks.append(Check("data", "error", detail, f"data.train_batch_size={rows} or less, or more data"))
    return checks


def _check_file(key: str, file: str, inputs: Inputs) -> tuple[Check, int | None]:
    """Check one file.

    Args:
        key: setting that names the file, for messages.
        file: name of the file, as the setting gives it.

    Returns:
        The finding, and the number of rows if it is known.
    """
    name = f"{key}: {file}"
    if not file:
        return Check("data", "error", f"{key} is empty", f"set {key} to a parquet file"), None
    if "://" in file:
        return Check("data", "ok", f"{name}: not local, not checked"), None
    path = local_path(file)
    again = "write it again, for example with verl-gndpo data geo3k --local_save_dir DIR"
    if not path.exists():
        remedy = f"correct {key}, or create the file: verl-gndpo data geo3k --local_save_dir {path.parent}"
        return Check("data", "error", f"{name} does not exist", remedy), None
    if path.suffix not in (".parquet", ".json", ".jsonl") or not path.is_file():
        return Check("data", "error", f"{name} is neither a .parquet nor a .json or .jsonl file", again), None
    if path.suffix != ".parquet":
        return Check("data", "ok", f"{name}: JSON, its rows are not checked"), None
    try:
        summary = inputs.file(file).summary
    except DataError as error:
        return Check("data", "error", f"{name}: {error}", f"repair these rows, or {again}"), None
    except CANNOT_READ as error:
        return Check("data", "error", f"{name} can't be read as parquet: {describe_error(error)}", again), None
    if summary.with_videos and key == "data.train_files":
        shown = ", ".join(map(str, summary.with_videos[:ROWS_SHOWN]))
        detail = (
            f"{name}: {len(summary.with_videos)} of {summary.rows} rows have videos, rows {shown}. verl's actor gives "
            "their frames other positions than its rollout does, so that it would train on wrong probabilities"
        )
        remedy = "remove these rows, or give each video's frames as images, with one <image> per frame for its <video>"
        return Check("data", "error", detail, remedy), summary.rows
    return Check("data", "ok", f"{name}: {summary.rows} rows, {summary.images} images"), summary.rows


def check_rows(inputs: Inputs) -> list[Check]:
    """Check that verl can decode the images of the rows, and how many prompts are too long for it.

    All rows of a file are read if that takes less than its share of `READING_S` seconds, otherwise a sample.
    """
    data = inputs.config.data
    if select(data, "custom_cls.path"):
        return []
    files: dict[str, str] = {}
    for key in ("train_files", "val_files"):
        for file in inputs.files(key):
            if "://" not in file and file.endswith(".parquet"):
                files.setdefault(file, f"data.{key}: {file}")
    if not files:
        return []
    measure, why = inputs.measure
    # `check_models` reports a student that can't be read.
    checks = [] if measure else [Check("prompts", "ok", f"lengths are not known: {why}")]
    end = time.monotonic() + READING_S
    for place, (file, name) in enumerate(files.items()):
        seconds = max(end - time.monotonic(), 0) / (len(files) - place)
        # `check_data` reports a file that can't be read, or whose placeholders and media differ.
        with contextlib.suppress(*CANNOT_READ):
            if inputs.file(file).summary:
                reading = read_rows(local_path(file), data, measure, seconds)
                checks += [*_check_readable(name, reading, data), *_check_lengths(name, reading, data)]
    return checks


def _check_readable(name: str, reading: Reading, data: Any) -> list[Check]:
    """Report the rows that verl can't read, most of them because of an image.

    Args:
        name: setting and file, for messages.
        reading: what was read.
        data: verl's `data` section.
    """
    if not reading.unreadable:
        return [Check("data", "ok", f"{name}: the images of {reading.extent} can be decoded")] if reading.rows else []
    shown = "; ".join(f"row {row}: {why}" for row, why in sorted(reading.unreadable.items())[:ROWS_SHOWN])
    dropped = bool(data.get("filter_overlong_prompts"))
    follows = "verl will drop them" if dropped else "the run would stop at the first of them"
    detail = f"{name}: {len(reading.unreadable)} rows ({reading.extent}) can't be read, {follows}: {shown}"
    return [Check("data", "warning" if dropped else "error", detail, "repair these rows, or remove them from the file")]


def _check_lengths(name: str, reading: Reading, data: Any) -> list[Check]:
    """Report the rows whose prompts are longer than `data.max_prompt_length`, and what verl does with them.

    Args:
        name: setting and file, for messages.
        reading: what was read.
        data: verl's `data` section.
    """
    if not reading.lengths:
        return [Check("prompts", "ok", f"{name}: not measured: {reading.unmeasured}")] if reading.unmeasured else []
    limit, longest = data.max_prompt_length, max(reading.lengths.values())
    long = {row for row, tokens in reading.lengths.items() if tokens > limit}
    part = f"{len(reading.lengths)} rows were measured" + (
        f", others not: {reading.unmeasured}" if reading.unmeasured else ""
    )
    measured = f"up to {longest} tokens ({reading.extent}; {part})"
    if not long:
        return [Check("prompts", "ok", f"{name}: {measured}, data.max_prompt_length={limit}")]
    rows = ", ".join(map(str, sorted(long)[:ROWS_SHOWN]))
    detail = (
        f"{name}: {len(long)} prompts have more than data.max_prompt_length={limit} tokens, {measured}: rows {rows}"
    )
    if data.get("filter_overlong_prompts"):
        share = len(long) / len(reading.lengths)
        status: Status = "error" if share == 1 else "warning"
        detail = f"{detail}. verl will drop them, {share:.1%} of the rows"
        return [Check("prompts", status, detail, f"data.max_prompt_length={longest}")]
    if long & reading.with_media:
        detail = f"{detail}. verl stops at such a row if it has images"
        return [
            Check("prompts", "error", detail, f"data.max_prompt_length={longest}, or data.filter_overlong_prompts=True")
        ]
    detail = f"{detail}. verl cuts off their beginning"
    return [
        Check("prompts", "warning", detail, f"data.max_prompt_length={longest}, or data.filter_overlong_prompts=True")
    ]


def check_rewards(inputs: Inputs) -> list[Check]:
    """Check that every data source has a reward function, and that training is allowed on every training file.

    verl itself notices a missing reward function after the first rollout.
    """
    config = inputs.config
    trained_on = _labels(inputs, "train_files")
    checks = _check_training_allowed(inputs, {label.source for label in trained_on})
    function = select(config, "reward.custom_reward_function") or {}
    path, name = function.get("path"), function.get("name") or "compute_score"
    manager = select(config, "reward.reward_manager.name", "naive")
    ours = path == REWARDS
    labels = trained_on | _labels(inputs, "val_files")
    without = sorted({label.source or "rows without data_source" for label in labels if not _has_answer(label)})
    if manager != "naive" or select(config, "reward.reward_model.enable"):
        if without and manager != "naive":
            detail = f"no answers in {', '.join(without)}, which reward.reward_manager.name={manager} reads"
            checks.append(Check("reward", "error", detail, "reward.reward_manager.name=naive"))
        prefix = (function.get("reward_kwargs") or {}).get("response_prefix")
        return [*checks, *(_check_prefix(inputs, manager) if ours and manager != "naive" and not prefix else [])]
    if without:
        detail = f"no answers in {', '.join(without)}: their reward is 0, and they have no accuracy"
        checks.append(Check("reward", "ok", detail))
    if path is not None and not ours:
        return checks
    if ours and name != "compute_score":
        return [*checks, Check("reward", "error", f"verl_gndpo.rewards has no function {name}", USE_REWARDS[1])]
    checks += _check_graded(inputs) if ours else []
    unrewarded = _unrewarded(inputs, ours)
    if not unrewarded:
        return checks
    shown = ", ".join(f"{source} ({where})" for source, where in sorted(unrewarded.items()))
    if ours:
        detail = f"verl_gndpo.rewards has no answer type for data_source {shown}"
        remedy = (
            f"set extra_info.answer_type of each row to one of {', '.join(ANSWER_TYPES)}, as verl-gndpo's converters do"
        )
    else:
        detail = f"verl has no reward function for data_source {shown}"
        remedy = " ".join(USE_REWARDS)
    return [*checks, Check("reward", "error", detail, remedy)]


def _unrewarded(inputs: Inputs, ours: bool) -> dict[str, str]:
    """Return the data sources of rows that have an answer and no reward function, each with the first of its rows."""
    found: dict[str, str] = {}
    for key in ("train_files", "val_files"):
        for file in inputs.files(key):
            with contextlib.suppress(*CANNOT_READ):
                for label, row in inputs.file(file).labelled.items():
                    if _has_answer(label) and not _has_reward(label, ours):
                        unknown = f" with answer_type {label.answer_type}" if ours and label.answer_type else ""
                        found.setdefault(f"{label.source or 'null'}{unknown}", f"{file}, first in row {row}")
    return found


def _check_graded(inputs: Inputs) -> list[Check]:
    """Check that the columns that this project's rewards read have the types that they take."""
    checks = []
    for key in ("train_files", "val_files"):
        for file in inputs.files(key):
            # `check_data` reports a file that can't be read.
            with contextlib.suppress(*CANNOT_READ):
                problems = inputs.file(file).why_not_graded()
                if problems:
                    detail = f"data.{key}: {file}: verl_gndpo.rewards can't grade its rows: {', '.join(problems)}"
                    checks.append(Check("reward", "error", detail, "write these columns again with those types"))
    return checks


def _check_prefix(inputs: Inputs, manager: str) -> list[Check]:
    """Warn if the student's chat template begins the response, which only this project's reward manager finds out."""
    measure, _ = inputs.measure
    # `check_models` reports a student that can't be read.
    if measure is None:
        return []
    writer, messages = measure.processor or measure.tokenizer, [{"role": "user", "content": "?"}]
    try:
        prompt = writer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **measure.template)
    except Exception:  # whatever a chat template raises on messages that it refuses
        return []
    prefix = response_prefix(prompt)
    if not prefix:
        return []
    detail = (
        f"the chat template ends the prompt with {prefix}, which reward.reward_manager.name={manager} doesn't tell the "
        "reward function: no response gets the score for its format"
    )
    setting = f"'+reward.custom_reward_function.reward_kwargs.response_prefix=\"{prefix}\"'"
    return [Check("reward", "warning", detail, f"{setting}, or reward.reward_manager.name=naive")]


def _check_training_allowed(inputs: Inputs, sources: set[str]) -> list[Check]:
    """Refuse training files of sets that are for validation only.

    The facts in a file's metadata state that. A file that another program rewrote since has none; then its rows name
    the set, and the set's converter declares it.

    Args:
        sources: data sources of the rows of `data.train_files`.
    """
    checks = []
    forbidden: dict[str, str] = {}
    for file in inputs.files("train_files"):
        try:
            facts = read_facts(inputs.file(file).metadata)
        # `check_data` reports a file that can't be read.
        except CANNOT_READ:
            continue
        except FactsError as error:
            checks.append(Check("data", "error", f"data.train_files: {file}: {error}", "convert the set again"))
            continue
        forbidden |= {one.hub_id: one.validation_only for one in (facts.sets if facts else ())}
    declared = validation_only()
    forbidden |= {source: declared[source] for source in sources & declared.keys()}
    checks += [
        Check("data", "error", f"data.train_files has rows of {source}: {why}", "use it in data.val_files only")
        for source, why in sorted(forbidden.items())
        if why
    ]
    return checks


def _labels(inputs: Inputs, key: str) -> set[Label]:
    """Return the labels of the local parquet files of `data.<key>`. `check_data` reports files that can't be read."""
    labels: set[Label] = set()
    for file in inputs.files(key):
        with contextlib.suppress(*CANNOT_READ):
            labels |= inputs.file(file).labels
    return labels


def _has_answer(label: Label) -> bool:
    """Return whether rows with this label are graded, as `RewardManager` and `compute_score` decide it."""
    return label.answered and label.answer_type != NO_ANSWER


def _has_reward(label: Label, ours: bool) -> bool:
    """Return whether rows with this label are graded: by this project's rewards if `ours`, otherwise by verl's."""
    if ours:
        return label.answer_type in ANSWER_TYPES or (not label.answer_type and label.source in ANSWER_TYPE_OF_SOURCE)
    from verl.utils.reward_score import default_compute_score

    try:
        default_compute_score(label.source, "", "")
    except NotImplementedError:
        return False
    # verl has a function for this source, which rejects an empty answer.
    except Exception:
        return True
    return True


def check_indices(inputs: Inputs) -> list[Check]:
    """Check that rows can be told apart where each response has a seed of its own."""
    signal = inputs.settings.signal
    if signal is None or signal.rollout_seed is None or select(inputs.config, "data.custom_cls.path"):
        return []
    checks = []
    for file in inputs.files("train_files"):
        # `check_data` reports a file that can't be read, and what is not local or no parquet file.
        with contextlib.suppress(*CANNOT_READ):
            rows = inputs.file(file).rows_without_index
            if rows:
                detail = (
                    f"data.train_files: {file}: {rows} rows lack extra_info.index. verl takes 0 for it, so that all of "
                    f"them sample with the same seeds of algorithm.gndpo.rollout_seed={signal.rollout_seed}"
                )
                remedy = "number the rows in extra_info.index, as verl-gndpo's converters do"
                checks.append(Check("data", "warning", detail, remedy))
    return checks


def check_routing(inputs: Inputs) -> list[Check]:
    """Check that each of several teachers has samples in the training files, and that each sample has a teacher."""
    teacher = inputs.settings.teacher
    if teacher is None:
        return []
    from verl_gndpo.teacher.routing import Routing

    routing = Routing(teacher)
    if routing.column is None or select(inputs.config, "data.custom_cls.path"):
        return []
    labels: set[Label] = set()
    lacking, unread = [], []
    for file in inputs.files("train_files"):
        try:
            if routing.column in inputs.file(file).columns:
                labels |= inputs.file(file).labels
            else:
                lacking.append(file)
        except CANNOT_READ:
            unread.append(file)
    if lacking:
        detail = f"data.train_files {', '.join(lacking)}: no column {routing.column} ({teacher.column_setting})"
        remedy = f"set {teacher.column_setting} to the column that decides which teacher scores a sample"
        return [Check("routing", "error", detail, remedy)]
    checks = []
    if unread:
        detail = f"{', '.join(unread)}: not checked; a sample without a teacher would stop the run"
        checks.append(Check("routing", "warning", detail))
    types = sorted({label.routing_type for label in labels} - {"str"})
    if types and teacher.backend == "server":
        detail = f"column {routing.column} holds {', '.join(types)}, but verl finds a teacher server by a string"
        checks.append(Check("routing", "error", detail, "teacher.backend=worker, or a column of strings"))
    found = {label.routing_key for label in labels}
    unknown = sorted(found - set(routing.keys)) if EVERY_SAMPLE not in routing.keys else []
    if unknown:
        detail = f"no teacher for {routing.column}={', '.join(unknown)}; there are keys for {', '.join(routing.keys)}"
        checks.append(Check("routing", "error", detail, f"name a teacher for each of them in {teacher.keys_setting}"))
    unused = sorted(set(routing.keys) - found - {EVERY_SAMPLE})
    if unused and not unread:
        detail = f"{teacher.keys_setting} has values that no training row has: {', '.join(unused)}"
        checks.append(Check("routing", "warning", detail, f"the rows have {', '.join(sorted(found))}"))
    return checks or [Check("routing", "ok", f"{routing.column}: {', '.join(sorted(found))}")]
