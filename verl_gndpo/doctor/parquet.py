# SPDX-License-Identifier: Apache-2.0
"""Read from a parquet file what the checks of the data need, and never the image bytes."""

from collections import Counter
from collections.abc import Mapping
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

CANNOT_READ = (pa.ArrowException, OSError)
"""Errors of a file that is missing, damaged or not a parquet file."""


class DataError(ValueError):
    """A data file can't be used for training; the message says what is wrong with it."""


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

    @cached_property
    def _schema(self) -> pa.Schema:
        return pq.read_schema(self._path)

    @property
    def columns(self) -> list[str]:
        """Return the names of the columns."""
        return self._schema.names

    @property
    def metadata(self) -> Mapping[bytes, bytes] | None:
        """Metadata of the schema."""
        return self._schema.metadata

    @cached_property
    def labels(self) -> set[Label]:
        """Return the distinct labels of all rows."""
        labels: set[Label] = set()
        with pq.ParquetFile(self._path) as file:
            leaves = {file.schema.column(i).path for i in range(file.metadata.num_columns)}
            wanted = [name for name in (self._source_column, ANSWER_TYPE, GROUND_TRUTH) if name in leaves]
            routed = self._routing_column in self.columns
            if routed and self._routing_column not in wanted:
                wanted.append(self._routing_column)
            if not wanted:
                return {Label("", "", "", "str", False)}
            for batch in file.iter_batches(columns=wanted, batch_size=ROWS_PER_BATCH):
                empty = [""] * len(batch)
                sources = batch[self._source_column].to_pylist() if self._source_column in leaves else empty
                types = (
                    pc.struct_field(batch["extra_info"], "answer_type").to_pylist() if ANSWER_TYPE in leaves else empty
                )
                keys = batch[self._routing_column].to_pylist() if routed else empty
                answers = _are_given(batch["reward_model"]) if GROUND_TRUTH in leaves else [False] * len(batch)
                labels |= {
                    Label(str(source or ""), answer_type or "", str(key), type(key).__name__, answered)
                    for source, answer_type, key, answered in zip(sources, types, keys, answers, strict=True)
                }
        return labels

    @cached_property
    def summary(self) -> Summary:
        """Number of rows and images. Compares placeholders with media on the way, as verl's RLHFDataset does.

        Reads only the prompts and, of each medium, the smallest of its columns.

        Raises:
            DataError: no rows, no prompts, or placeholders and media that don't match.
        """
        with pq.ParquetFile(self._path) as file:
            prompt_key = self._data.get("prompt_key", "prompt")
            rows = file.metadata.num_rows
            if rows == 0:
                raise DataError("it has no rows")
            if prompt_key not in self.columns:
                raise DataError(f"no column {prompt_key} (data.prompt_key); it has {', '.join(self.columns)}")
            content = _content_column(file, prompt_key)
            media = self._media_columns()
            leaves = [_smallest_leaf(file, column) for column in media.values()]
            routing = [self._routing_column] if self._routing_column in self.columns else []

            with_images: Counter[str] = Counter()
            start, images, bad = 0, 0, []
            with_videos: list[int] = []
            for batch in file.iter_batches(columns=[content, *leaves, *routing], batch_size=ROWS_PER_BATCH):
                counts = {
                    placeholder: pc.list_value_length(batch[column]).fill_null(0).to_numpy(zero_copy_only=False)
                    for placeholder, column in media.items()
                }
                images += int(counts.get("<image>", np.zeros(1)).sum())
                with_videos += (start + np.flatnonzero(counts.get("<video>", np.zeros(1)))).tolist()
                seeing = np.flatnonzero(sum(counts.values(), np.zeros(len(batch))))
                keys = batch[self._routing_column].take(pa.array(seeing)).to_pylist() if routing else [""] * len(seeing)
                with_images.update(str(key) for key in keys)
                bad += [(start + row, what) for row, what in self._mismatches(batch[prompt_key], counts)]
                start += len(batch)
        if bad:
            shown = "; ".join(f"row {row}: {what}" for row, what in sorted(bad)[:ROWS_SHOWN])
            raise DataError(f"{len({row for row, _ in bad})} of {rows} rows have mismatched media: {shown}")
        return Summary(rows, images, with_images, with_videos)

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
    if pa.types.is_string(truths.type) or pa.types.is_large_string(truths.type):
        given = pc.and_(given, pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(truths)), 0).fill_null(False))
    return given.to_pylist()


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _content_column(file: pq.ParquetFile, prompt_key: str) -> str:
    """Return the dotted name of the column of the prompts' text; the prompt column if the content is structured."""
    kind = file.schema_arrow.field(prompt_key).type
    message = kind.value_type if _is_list(kind) else None
    if message is None or not pa.types.is_struct(message) or message.get_field_index("content") < 0:
        raise DataError(f"column {prompt_key} holds {kind}; verl needs a list of messages with role and content")
    leaves = [leaf for leaf in _leaves(file, prompt_key) if leaf.endswith(".content")]
    return leaves[0] if leaves else prompt_key


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
    if not (pa.types.is_string(content.type) or pa.types.is_large_string(content.type)):
        # verl replaces placeholders in strings only.
        return np.zeros(len(prompts), dtype=np.int64)
    found = pc.count_substring(content, placeholder).fill_null(0).to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(prompts)), lengths)
    return np.bincount(row, weights=found, minlength=len(prompts)).astype(np.int64)
