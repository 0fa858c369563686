# SPDX-License-Identifier: Apache-2.0
"""Read from a parquet file what the checks of the data need, and never the image bytes."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MEDIA = {"<image>": "image_key", "<video>": "video_key", "<audio>": "audio_key"}
"""verl's placeholder for each kind of medium, and the key under `data` that names its column."""

ANSWER_TYPE = "extra_info.answer_type"
GROUND_TRUTH = "reward_model.ground_truth"
ROWS_SHOWN = 3
ROWS_PER_BATCH = 1 << 15


class DataError(ValueError):
    """A data file can't be used for training; the message says what is wrong with it."""


CANNOT_READ = (DataError, pa.ArrowException, OSError)
"""Errors of a file that is missing, damaged, not a parquet file, or without the form that verl expects."""


class Summary(NamedTuple):
    """Size of a data file."""

    rows: int
    images: int

    rows_with_images: Counter[str]
    """Numbers of rows with images or other media, by their value of the routing column as text."""

    with_videos: list[int]
    """Numbers of the rows with videos."""


class Label(NamedTuple):
    """What decides how a row is graded, and which teacher scores it."""

    source: str
    """Its data source; "" if the file has no such column."""

    answer_type: str
    """`extra_info.answer_type`; "" if the row has none."""

    routing_key: str
    """Its value of the routing column as text; "" if the file has no such column."""

    routing_type: str
    """Python type of that value."""

    answered: bool
    """Whether it has a ground truth."""


class DataFile:
    """A parquet file of training or validation data. Each reading is made when it is first asked for, and kept.

    All readings raise one of `CANNOT_READ` if the file can't be read.
    """

    def __init__(self, path: Path, data: Any, source_column: str, routing_column: str):
        """Remember where the file is and which columns to read.

        Args:
            path: of the file.
            data: verl's `data` section, which names the columns of prompts and media.
            source_column: column of the data sources.
            routing_column: column that decides which teacher scores a row.
        """
        self._path, self._data = path, data
        self._source_column, self._routing_column = source_column, routing_column

    def _open(self) -> pq.ParquetFile:
        self._check_kind()
        try:
            return pq.ParquetFile(self._path)
        except UnicodeDecodeError as error:
            raise DataError(f"the name of a column is no text: {error}") from error

    def _check_kind(self) -> None:
        # Opening a pipe would wait for its other end.
        if not self._path.is_file():
            raise DataError("it is no file")

    @cached_property
    def _schema(self) -> pa.Schema:
        self._check_kind()
        try:
            schema = pq.read_schema(self._path)
        except UnicodeDecodeError as error:
            raise DataError(f"the name of a column is no text: {error}") from error
        twice = [name for name, count in Counter(schema.names).items() if count > 1]
        if twice:
            raise DataError(f"several columns are called {', '.join(twice)}")
        return schema

    def _is_field(self, column: str, name: str) -> bool:
        """Return whether a column holds structs with a field of this name."""
        return column in self.columns and _has_field(self._schema.field(column).type, name)

    @property
    def columns(self) -> list[str]:
        """Return the names of the columns."""
        return self._schema.names

    @property
    def metadata(self) -> Mapping[bytes, bytes] | None:
        """Metadata of the schema."""
        return self._schema.metadata

    @property
    def labels(self) -> set[Label]:
        """Return the distinct labels of all rows."""
        return set(self.labelled)

    @cached_property
    def labelled(self) -> dict[Label, int]:
        """Return the distinct labels of all rows, each with the number of its first row."""
        labels: dict[Label, int] = {}
        sourced, routed = (name in self.columns for name in (self._source_column, self._routing_column))
        typed, graded = self._is_field("extra_info", "answer_type"), self._is_field("reward_model", "ground_truth")
        wanted = {self._source_column: sourced, ANSWER_TYPE: typed, GROUND_TRUTH: graded, self._routing_column: routed}
        if not any(wanted.values()):
            return {Label("", "", "", "str", False): 0}
        with self._open() as file:
            start = 0
            for batch in file.iter_batches(columns=[x for x in wanted if wanted[x]], batch_size=ROWS_PER_BATCH):
                empty = [""] * len(batch)
                sources = _values(batch[self._source_column], start) if sourced else empty
                types = _values(pc.struct_field(batch["extra_info"], "answer_type"), start) if typed else empty
                keys = _values(batch[self._routing_column], start) if routed else empty
                answers = _are_given(batch["reward_model"]) if graded else [False] * len(batch)
                for row, values in enumerate(zip(sources, types, keys, answers, strict=True), start):
                    source, answer_type, key, answered = values
                    label = Label(str(source or ""), str(answer_type or ""), str(key), type(key).__name__, answered)
                    labels.setdefault(label, row)
                start += len(batch)
        return labels

    @cached_property
    def rows_without_index(self) -> int:
        """Return the number of rows without `extra_info.index`, by which verl tells rows apart."""
        with self._open() as file:
            if not self._is_field("extra_info", "index"):
                return file.metadata.num_rows
            batches = file.iter_batches(columns=["extra_info.index"], batch_size=ROWS_PER_BATCH)
            return sum(pc.struct_field(batch["extra_info"], "index").null_count for batch in batches)

    def why_not_graded(self) -> list[str]:
        """Return what this project's rewards refuse in the types of the columns that they read."""
        problems = []
        for column, fields in GRADED.items():
            for name, (fits, form) in fields.items():
                kind = self._schema.field(column).type.field(name).type if self._is_field(column, name) else pa.null()
                if not pa.types.is_null(kind) and not fits(kind):
                    problems.append(f"{column}.{name} holds {kind}, not {form}")
        return problems

    @cached_property
    def summary(self) -> Summary:
        """Number of rows and images. Compares placeholders with media on the way, as verl's RLHFDataset does.

        Reads only the prompts and, of each medium, the smallest of its columns.

        Raises:
            DataError: no rows, no prompts, or placeholders and media that don't match.
        """
        with self._open() as file:
            prompt_key = self._data.get("prompt_key", "prompt")
            rows = file.metadata.num_rows
            if rows == 0:
                raise DataError("it has no rows")
            if prompt_key not in self.columns:
                raise DataError(f"no column {prompt_key} (data.prompt_key); it has {', '.join(self.columns)}")
            prompt_columns = _prompt_columns(file, prompt_key)
            self._check_structs()
            media = self._media_columns()
            leaves = [_smallest_leaf(file, column) for column in media.values()]
            routing = [self._routing_column] if self._routing_column in self.columns else []

            with_images: Counter[str] = Counter()
            start, images, bad, broken = 0, 0, [], []
            with_videos: list[int] = []
            for batch in file.iter_batches(columns=[*prompt_columns, *leaves, *routing], batch_size=ROWS_PER_BATCH):
                counts = {
                    placeholder: pc.list_value_length(batch[column]).fill_null(0).to_numpy(zero_copy_only=False)
                    for placeholder, column in media.items()
                }
                images += int(counts.get("<image>", np.zeros(1)).sum())
                with_videos += (start + np.flatnonzero(counts.get("<video>", np.zeros(1)))).tolist()
                seeing = np.flatnonzero(sum(counts.values(), np.zeros(len(batch))))
                keys = _values(batch[self._routing_column], start) if routing else [""] * len(batch)
                with_images.update(str(keys[row]) for row in seeing)
                broken += [(start + row, what) for row, what in _broken_messages(batch[prompt_key])]
                bad += [(start + row, what) for row, what in self._mismatches(batch[prompt_key], counts)]
                start += len(batch)
        for rows_of, what in ((broken, "prompts that verl can't use"), (bad, "mismatched media")):
            if rows_of:
                shown = "; ".join(f"row {row}: {why}" for row, why in sorted(rows_of)[:ROWS_SHOWN])
                raise DataError(f"{len({row for row, _ in rows_of})} of {rows} rows have {what}: {shown}")
        return Summary(rows, images, with_images, with_videos)

    def _check_structs(self) -> None:
        """Check the columns of which verl asks for entries by name.

        Raises:
            DataError: one holds something else, such as JSON as text.
        """
        for column in ("extra_info", "reward_model"):
            kind = self._schema.field(column).type if column in self.columns else pa.null()
            if not pa.types.is_struct(kind) and not pa.types.is_null(kind):
                raise DataError(f"column {column} holds {kind}; verl needs a struct, and does not parse text")
        if self._source_column in self.columns and pa.types.is_nested(self._schema.field(self._source_column).type):
            kind = self._schema.field(self._source_column).type
            raise DataError(f"column {self._source_column} holds {kind}; verl needs the name of the row's data set")

    def _media_columns(self) -> dict[str, str]:
        """Return the column of each medium that the file has, by the medium's placeholder."""
        columns = {}
        for placeholder, key in MEDIA.items():
            column = self._data.get(key)
            if column in self.columns:
                kind = self._schema.field(column).type
                if not _is_list(kind):
                    raise DataError(f"column {column} (data.{key}) holds one {kind} per row; verl needs a list of them")
                columns[placeholder] = column
        return columns

    def _mismatches(self, prompts: pa.Array, counts: dict[str, np.ndarray]) -> list[tuple[int, str]]:
        """Compare the placeholders in prompts with the number of media.

        Args:
            prompts: (rows,) lists of messages.
            counts: (rows,) number of media, by placeholder; only of media that have a column.

        Returns:
            Row number and description of each mismatch.
        """
        mismatches = []
        none = np.zeros(len(prompts), dtype=np.int64)
        any_medium = sum(counts.values(), none) > 0
        for placeholder, key in MEDIA.items():
            found, media = _count_placeholders(prompts, placeholder), counts.get(placeholder, none)
            wrong = found != media
            if placeholder not in counts and placeholder != "<image>":
                # A page of HTML may hold a <video> tag. Without media in the row, verl takes it for text.
                wrong &= any_medium
            where = f"column {self._data.get(key)}" + ("" if placeholder in counts else ", which the file lacks")
            mismatches += [
                (row, f"{found[row]} {placeholder} in its prompt, {media[row]} in {where}")
                for row in np.flatnonzero(wrong).tolist()
            ]
        return mismatches


def _are_given(rewards: pa.Array) -> list[bool]:
    """Return whether each row has a ground truth.

    Args:
        rewards: (rows,) {ground_truth}.
    """
    truths = pc.struct_field(rewards, "ground_truth")
    given = truths.is_valid()
    if _is_text(truths.type):
        truths = truths.cast(pa.large_string())
        given = pc.and_(given, pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(truths)), 0).fill_null(False))
    return given.to_pylist()


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _is_list_of_text(kind: pa.DataType) -> bool:
    return _is_list(kind) and (_is_text(kind.value_type) or pa.types.is_null(kind.value_type))


def _has_field(kind: pa.DataType, name: str) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index(name) >= 0


GRADED: dict[str, dict[str, tuple[Callable[[pa.DataType], bool], str]]] = {
    "reward_model": {"ground_truth": (_is_text, "text")},
    "extra_info": {
        "answer_type": (_is_text, "text"),
        "choices": (_is_list_of_text, "a list of texts"),
        "tolerance": (_is_number, "a number"),
    },
}
"""What `verl_gndpo.rewards` reads of a row, by column and field: whether a type fits, and in words which does."""


def _values(column: pa.Array, start: int) -> list[Any]:
    """Return a column as Python's values.

    Args:
        column: (rows,).
        start: number of its first row in the file, for messages.

    Raises:
        DataError: a text is not valid UTF-8, which parquet does not check.
    """
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        row = next(row for row, value in enumerate(column) if not is_unicode(value))
        raise DataError(f"row {start + row} holds text that is not valid UTF-8") from None


def is_unicode(value: pa.Scalar) -> bool:
    """Return whether all texts in a value are valid UTF-8."""
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _prompt_columns(file: pq.ParquetFile, prompt_key: str) -> list[str]:
    """Return the dotted names of the columns of the prompts' roles and texts; that of the prompts if the content is
    structured."""
    kind = file.schema_arrow.field(prompt_key).type
    message = kind.value_type if _is_list(kind) else pa.null()
    needs = f"column {prompt_key} holds {kind}; verl needs a list of messages with role and content"
    if not all(_has_field(message, name) for name in ("role", "content")):
        raise DataError(needs)
    content = message.field("content").type
    if not _is_text(message.field("role").type) or not (_is_text(content) or _is_list(content)):
        raise DataError(f"{needs}, the content as text or as a list of parts")
    leaves = [leaf for leaf in _leaves(file, prompt_key) if leaf.endswith((".role", ".content"))]
    return leaves if len(leaves) == 2 else [prompt_key]


def _broken_messages(prompts: pa.Array) -> list[tuple[int, str]]:
    """Return the rows without messages, and those with one that lacks its role or its content.

    A message of the assistant may hold tool calls instead.

    Args:
        prompts: (rows,) lists of {role, content}.

    Returns:
        Row number and description of each.
    """
    lengths = pc.list_value_length(prompts).fill_null(0).to_numpy(zero_copy_only=False)
    messages = pc.list_flatten(prompts)
    row = np.repeat(np.arange(len(prompts)), lengths)
    found = [(number, "its prompt has no messages") for number in np.flatnonzero(lengths == 0).tolist()]
    roles, contents = (pc.struct_field(messages, name) for name in ("role", "content"))
    of_assistant = pc.equal(roles.cast(pa.large_string()), "assistant").fill_null(False)
    for name, missing in (("role", roles.is_null()), ("content", pc.and_not(contents.is_null(), of_assistant))):
        rows = np.unique(row[missing.to_numpy(zero_copy_only=False)])
        found += [(number, f"a message without {name}") for number in rows.tolist()]
    return found


def _leaves(file: pq.ParquetFile, column: str) -> dict[str, int]:
    """Return the compressed bytes of each leaf column of a column, by its dotted name."""
    metadata, sizes = file.metadata, {}
    for i in range(metadata.num_columns):
        leaf = file.schema.column(i).path
        if leaf.split(".")[0] == column:
            sizes[leaf] = sum(
                metadata.row_group(g).column(i).total_compressed_size for g in range(metadata.num_row_groups)
            )
    return sizes


def _smallest_leaf(file: pq.ParquetFile, column: str) -> str:
    """Return the leaf column that gives the lengths of a column's lists with the fewest bytes read."""
    leaves = _leaves(file, column)
    return min(leaves, key=lambda leaf: leaves[leaf])


def _count_placeholders(prompts: pa.Array, placeholder: str) -> np.ndarray:
    """Count a placeholder in the messages of each row.

    Args:
        prompts: (rows,) lists of {content}.

    Returns:
        (rows,) int64.
    """
    lengths = pc.list_value_length(prompts).fill_null(0).to_numpy(zero_copy_only=False)
    content = pc.struct_field(pc.list_flatten(prompts), "content")
    if not _is_text(content.type):
        # verl replaces placeholders in strings only.
        return np.zeros(len(prompts), dtype=np.int64)
    content = content.cast(pa.large_string())
    found = pc.count_substring(content, placeholder).fill_null(0).to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(prompts)), lengths)
    return np.bincount(row, weights=found, minlength=len(prompts)).astype(np.int64)
