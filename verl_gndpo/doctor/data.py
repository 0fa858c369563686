# SPDX-License-Identifier: Apache-2.0
"""What a run needs of its data: files, placeholders, rewards and a teacher for each sample."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from verl_gndpo.config import EVERY_SAMPLE, ConfigError, read_teacher_config
from verl_gndpo.conversion.sets import validation_only
from verl_gndpo.data_facts import FactsError, read_facts
from verl_gndpo.doctor.check import Check, select
from verl_gndpo.rewards.answer_types import ANSWER_TYPE_OF_SOURCE, ANSWER_TYPES

# verl's placeholder of each kind of medium, and the config key under `data` that names its column.
MEDIA = {"<image>": "image_key", "<video>": "video_key", "<audio>": "audio_key"}
ROWS_SHOWN = 3


def check_routing(config: Any) -> list[Check]:
    """Each of several teachers has samples in the training files, and each sample a teacher."""
    try:
        teacher = read_teacher_config(config)
    # Which `check_settings` reports.
    except ConfigError:
        return []
    from verl_gndpo.teacher.routing import Routing

    routing = Routing(teacher)
    if routing.column is None or select(config, "data.custom_cls.path"):
        return []
    found, lacking, unread = _values_of_column(config, routing.column)
    if lacking:
        detail = f"teacher.routing_key={routing.column} is no column of data.train_files {', '.join(lacking)}"
        return [Check("routing", "error", detail, "name a column that tells the teachers' samples apart")]
    checks = []
    if unread:
        detail = f"{', '.join(unread)}: not looked into, so a sample without a teacher would stop the run"
        checks.append(Check("routing", "warning", detail))
    other = sorted({type(value).__name__ for value in found if not isinstance(value, str)})
    if other and teacher.backend == "server":
        detail = f"column {routing.column} holds {', '.join(other)}; verl's teacher servers are found by strings"
        checks.append(Check("routing", "error", detail, "teacher.backend=worker, or a column of strings"))
    found = {str(value) for value in found}
    unknown = sorted(found - set(routing.keys)) if EVERY_SAMPLE not in routing.keys else []
    if unknown:
        detail = f"no teacher for {routing.column}={', '.join(unknown)}; there are keys for {', '.join(routing.keys)}"
        checks.append(Check("routing", "error", detail, "add them to teacher.models.<name>.keys"))
    unused = sorted(set(routing.keys) - found - {EVERY_SAMPLE})
    if unused and not unread:
        detail = f"teacher.models has keys that no training row has: {', '.join(unused)}"
        checks.append(Check("routing", "warning", detail, f"the rows have {', '.join(sorted(found))}"))
    return checks or [Check("routing", "ok", f"{routing.column}: {', '.join(sorted(found))}")]


def _values_of_column(config: Any, column: str) -> tuple[set, list[str], list[str]]:
    """What a column of the training files holds, the files that lack it, and those that can't be looked into."""
    found: set = set()
    lacking, unread = [], []
    for file in _files(config, "train_files"):
        try:
            with pq.ParquetFile(Path(file).expanduser()) as parquet:
                if column not in parquet.schema_arrow.names:
                    lacking.append(file)
                    continue
                for batch in parquet.iter_batches(columns=[column]):
                    found |= set(pc.unique(batch[column]).to_pylist())
        except (pa.ArrowException, OSError):
            unread.append(file)
    return found, lacking, unread


class DataError(ValueError):
    """A data file can't be trained on; the message says what is wrong with it."""


@dataclass(frozen=True)
class DataSummary:
    rows: int
    images: int


def check_data(config: Any) -> list[Check]:
    """Every training and validation file can be read, and each row has as many images as its prompt has placeholders.

    Reads of a parquet file only the prompts and, of the images, the smallest of their columns: never the image bytes.
    """
    data = config.data
    if select(data, "custom_cls.path"):
        return [Check("data", "ok", f"not looked at: data.custom_cls.path={data.custom_cls.path} reads it")]
    checks = []
    train_rows: int | None = 0
    for key in ("train_files", "val_files"):
        files = data.get(key)
        files = [files] if files is None or isinstance(files, str) else list(files)
        for file in files:
            check, rows = _check_file(f"data.{key}", file, config)
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


def _files(config: Any, key: str) -> list[str]:
    """The files of `data.<key>`, which may name one, several or none."""
    files = config.data.get(key)
    return [files] if isinstance(files, str) else list(files or ())


def check_rewards(config: Any) -> list[Check]:
    """Every data source of the files has a reward function, which verl finds out after the first rollout; and none is
    trained on that must not be."""
    trained_on = _data_sources(config, "train_files")
    checks = _check_training_allowed(config, {source for source, _ in trained_on})
    function = select(config, "reward.custom_reward_function") or {}
    path, name = function.get("path"), function.get("name") or "compute_score"
    manager = select(config, "reward.reward_manager.name", "naive")
    ours = path == "pkg://verl_gndpo.rewards"
    if (path is not None and not ours) or manager != "naive" or select(config, "reward.reward_model.enable"):
        return checks
    if ours and name != "compute_score":
        detail = f"verl_gndpo.rewards has no function {name}"
        remedy = "reward.custom_reward_function.name=compute_score"
        return [*checks, Check("reward", "error", detail, remedy)]
    sources = trained_on | _data_sources(config, "val_files")
    unrewarded = sorted({source for source, kind in sources if not _has_reward(source, kind, ours)})
    if not unrewarded:
        return checks
    if ours:
        detail = f"verl_gndpo.rewards knows no answer type for data_source {', '.join(unrewarded)}"
        remedy = (
            f"write one of {', '.join(ANSWER_TYPES)} into extra_info.answer_type, as the converters in data_prep do"
        )
    else:
        detail = f"verl has no reward function for data_source {', '.join(unrewarded)}"
        remedy = (
            "reward.custom_reward_function.path=pkg://verl_gndpo.rewards "
            "reward.custom_reward_function.name=compute_score"
        )
    return [*checks, Check("reward", "error", detail, remedy)]


def _check_training_allowed(config: Any, sources: set[str]) -> list[Check]:
    """Refuse training files of sets that are for validation only.

    The facts in a file's metadata state that. A file that another program rewrote since has none; then its rows name
    the set, and the set's converter declares it.

    Args:
        sources: data sources of the rows of `data.train_files`.
    """
    checks, forbidden = [], {}
    for file in _files(config, "train_files"):
        # `check_data` reports a file that can't be read.
        with contextlib.suppress(pa.ArrowException, OSError):
            try:
                facts = read_facts(pq.read_schema(Path(file).expanduser()).metadata)
            except FactsError as error:
                checks.append(Check("data", "error", f"data.train_files: {file}: {error}", "convert the set again"))
                continue
            forbidden |= {one.hub_id: one.validation_only for one in (facts.sets if facts else ())}
    declared = validation_only()
    forbidden |= {source: declared[source] for source in sources & declared.keys()}
    checks += [
        Check("data", "error", f"data.train_files has rows of {source}: {why}", "leave it to data.val_files")
        for source, why in sorted(forbidden.items())
        if why
    ]
    return checks


def _data_sources(config: Any, key: str) -> set[tuple[str, str]]:
    """Data sources of the local parquet files of `data.<key>`, each with how its rows say answers are graded."""
    found = set()
    column = select(config, "data.reward_fn_key", "data_source")
    for file in _files(config, key):
        # A file that can't be read is what `check_data` tells of.
        with contextlib.suppress(pa.ArrowException, OSError), pq.ParquetFile(Path(file).expanduser()) as parquet:
            leaves = [parquet.schema.column(i).path for i in range(parquet.metadata.num_columns)]
            if column not in leaves:
                continue
            typed = "extra_info.answer_type" in leaves
            for batch in parquet.iter_batches(columns=[column, *(["extra_info.answer_type"] if typed else [])]):
                sources = batch[column].to_pylist()
                kinds = (
                    pc.struct_field(batch["extra_info"], "answer_type").to_pylist() if typed else [""] * len(sources)
                )
                found |= {(source, kind or "") for source, kind in zip(sources, kinds, strict=True) if source}
    return found


def _has_reward(source: str, kind: str, ours: bool) -> bool:
    if ours:
        return kind in ANSWER_TYPES or (not kind and source in ANSWER_TYPE_OF_SOURCE)
    from verl.utils.reward_score import default_compute_score

    try:
        default_compute_score(source, "", "")
    except NotImplementedError:
        return False
    except Exception:  # it has one, which doesn't like an empty answer
        return True
    return True


def _check_file(key: str, file: str | None, config: Any) -> tuple[Check, int | None]:
    """A finding on one file, and its number of rows where that is known."""
    name = f"{key}: {file}"
    if not file:
        return Check("data", "error", f"{key} is empty", f"give {key} a parquet file"), None
    if "://" in file:
        return Check("data", "ok", f"{name}: not local, not looked at"), None
    path = Path(file).expanduser()
    again = "write it again, for example with python data_prep/geo3k.py --local_save_dir DIR"
    if not path.exists():
        remedy = f"correct {key}, or create it: python data_prep/geo3k.py --local_save_dir {path.parent}"
        return Check("data", "error", f"{name} does not exist", remedy), None
    if path.suffix not in (".parquet", ".json", ".jsonl") or not path.is_file():
        return Check("data", "error", f"{name} is neither a .parquet nor a .json or .jsonl file", again), None
    if path.suffix != ".parquet":
        return Check("data", "ok", f"{name}: JSON, not looked into"), None
    try:
        summary = summarize_parquet(path, config.data)
    except DataError as error:
        return Check("data", "error", f"{name}: {error}", "repair these rows, or " + again), None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        return Check("data", "error", f"{name} can't be read as parquet: {reason}", again), None
    return Check("data", "ok", f"{name}: {summary.rows} rows, {summary.images} images"), summary.rows


def summarize_parquet(path: Path, data: Any) -> DataSummary:
    """Count rows and images of a file, and compare placeholders with media as verl's RLHFDataset does.

    Args:
        data: verl's `data` section, which names the columns.

    Raises:
        DataError: no rows, no prompts, or placeholders and media that don't match.
        pyarrow.ArrowException, OSError: not a parquet file, or a damaged one.
    """
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        prompt_key = data.get("prompt_key", "prompt")
        rows = file.metadata.num_rows
        if rows == 0:
            raise DataError("it has no rows")
        if prompt_key not in schema.names:
            raise DataError(f"no column {prompt_key} (data.prompt_key); it has {', '.join(schema.names)}")
        content = _content_column(file, prompt_key)
        columns = {}
        for placeholder, key in MEDIA.items():
            column = data.get(key)
            if column in schema.names:
                if not _is_list(schema.field(column).type):
                    kind = schema.field(column).type
                    raise DataError(f"column {column} (data.{key}) holds one {kind} a row; verl needs a list of them")
                columns[placeholder] = column
        leaves = [_smallest_leaf(file, column) for column in columns.values()]

        start, images, bad = 0, 0, []
        for batch in file.iter_batches(columns=[content, *leaves], batch_size=1 << 15):
            counts = {
                placeholder: pc.list_value_length(batch[column]).fill_null(0).to_numpy(zero_copy_only=False)
                for placeholder, column in columns.items()
            }
            images += int(counts.get("<image>", np.zeros(1)).sum())
            any_medium = sum(counts.values(), np.zeros(len(batch), dtype=np.int64)) > 0
            for placeholder, key in MEDIA.items():
                column = columns.get(placeholder)
                found = _count_placeholders(batch[prompt_key], placeholder)
                media = counts.get(placeholder, np.zeros(len(batch), dtype=np.int64))
                wrong = found != media
                if column is None and placeholder != "<image>":
                    # A page of HTML may hold a <video> tag; without media in the row verl takes it for text.
                    wrong &= any_medium
                where = f"column {data.get(key)}" + ("" if column else ", which the file lacks")
                bad += [
                    (start + i, f"{found[i]} {placeholder} in its prompt, {media[i]} in {where}")
                    for i in np.flatnonzero(wrong).tolist()
                ]
            start += len(batch)
    if bad:
        shown = "; ".join(f"row {row}: {what}" for row, what in sorted(bad)[:ROWS_SHOWN])
        raise DataError(f"{len({row for row, _ in bad})} of {rows} rows have mismatched media: {shown}")
    return DataSummary(rows, images)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _content_column(file: pq.ParquetFile, prompt_key: str) -> str:
    """The dotted name of a chat's text in a parquet file, or of the whole prompt where its content is structured."""
    kind = file.schema_arrow.field(prompt_key).type
    message = kind.value_type if _is_list(kind) else None
    if message is None or not pa.types.is_struct(message) or message.get_field_index("content") < 0:
        raise DataError(f"column {prompt_key} holds {kind}; verl needs a list of messages with role and content")
    leaves = [leaf for leaf in _leaves(file, prompt_key) if leaf.endswith(".content")]
    return leaves[0] if leaves else prompt_key


def _leaves(file: pq.ParquetFile, column: str) -> dict[str, int]:
    """Compressed bytes of each leaf column of a column, by its dotted name."""
    metadata, sizes = file.metadata, {}
    for i in range(metadata.num_columns):
        leaf = file.schema.column(i).path
        if leaf.split(".")[0] == column:
            sizes[leaf] = sum(
                metadata.row_group(g).column(i).total_compressed_size for g in range(metadata.num_row_groups)
            )
    return sizes


def _smallest_leaf(file: pq.ParquetFile, column: str) -> str:
    """The leaf column that tells the lengths of a column's lists with the fewest bytes read."""
    leaves = _leaves(file, column)
    return min(leaves, key=leaves.get)


def _count_placeholders(prompts: pa.Array, placeholder: str) -> np.ndarray:
    """How often each row's messages, (batch,) lists of {content}, hold a placeholder; (batch,) int64."""
    lengths = pc.list_value_length(prompts).fill_null(0).to_numpy(zero_copy_only=False)
    content = pc.struct_field(pc.list_flatten(prompts), "content")
    if not (pa.types.is_string(content.type) or pa.types.is_large_string(content.type)):
        # verl replaces placeholders in strings only.
        return np.zeros(len(prompts), dtype=np.int64)
    found = pc.count_substring(content, placeholder).fill_null(0).to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(prompts)), lengths)
    return np.bincount(row, weights=found, minlength=len(prompts)).astype(np.int64)
