# SPDX-License-Identifier: Apache-2.0
"""Check the data of a run: files, placeholders, rewards, and a teacher for every sample."""

import contextlib
from pathlib import Path

from verl_gndpo.config import EVERY_SAMPLE
from verl_gndpo.conversion.sets import validation_only
from verl_gndpo.data_facts import FactsError, read_facts
from verl_gndpo.doctor.check import Check, select
from verl_gndpo.doctor.inputs import Inputs
from verl_gndpo.doctor.parquet import CANNOT_READ, DataError, Label
from verl_gndpo.rewards.answer_types import ANSWER_TYPE_OF_SOURCE, ANSWER_TYPES, NO_ANSWER

REWARDS = "pkg://verl_gndpo.rewards"
USE_REWARDS = (
    f"reward.custom_reward_function.path={REWARDS}",
    "reward.custom_reward_function.name=compute_score",
)


def check_data(inputs: Inputs) -> list[Check]:
    """Check that every training and validation file can be read, and that each row has one image per placeholder."""
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
    path = Path(file).expanduser()
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
        reason = str(error).strip().splitlines()[0]
        return Check("data", "error", f"{name} can't be read as parquet: {reason}", again), None
    return Check("data", "ok", f"{name}: {summary.rows} rows, {summary.images} images"), summary.rows


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
        return checks
    if without:
        detail = f"no answers in {', '.join(without)}: their reward is 0, and they have no accuracy"
        checks.append(Check("reward", "ok", detail))
    if path is not None and not ours:
        return checks
    if ours and name != "compute_score":
        return [*checks, Check("reward", "error", f"verl_gndpo.rewards has no function {name}", USE_REWARDS[1])]
    labels = {label for label in labels if _has_answer(label)}
    unrewarded = sorted({label.source for label in labels if label.source and not _has_reward(label, ours)})
    if not unrewarded:
        return checks
    if ours:
        detail = f"verl_gndpo.rewards has no answer type for data_source {', '.join(unrewarded)}"
        remedy = (
            f"set extra_info.answer_type of each row to one of {', '.join(ANSWER_TYPES)}, as verl-gndpo's converters do"
        )
    else:
        detail = f"verl has no reward function for data_source {', '.join(unrewarded)}"
        remedy = " ".join(USE_REWARDS)
    return [*checks, Check("reward", "error", detail, remedy)]


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
