# SPDX-License-Identifier: Apache-2.0
"""Opening a source: parquet files, save_to_disk folders, the hub, or a layout of the data set's own."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import DroppedRow, SourceError, one_line

READ_BATCH_ROWS = 16
SPLIT_ALIASES = {"val": "validation"}
SPLIT_FILE = re.compile(r"(train|validation|val|test)(?![A-Za-z])")
SHARD_NUMBER = re.compile(r"-(\d+)-of-(\d+)\.parquet$")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_TIMEOUT_S = 10


@dataclass(frozen=True)
class Problem:
    """One row in the words of its source; nothing about it has been checked.

    `images` holds `{"bytes": ..., "path": ...}` entries; `folder` is where their relative paths start.
    """

    question: object
    answer: object
    images: list
    folder: Path | None = None


@dataclass(frozen=True)
class SourceRow:
    """A row before it is loaded. `index` and `id` depend on its place in the source alone, so they are the same in
    every run and on every machine, and a dropped row leaves a gap. `load` raises DroppedRow when the record is broken.
    """

    index: int
    id: str
    load: Callable[[], Problem]


@dataclass(frozen=True)
class Split:
    """One split of a source. `rows` starts a fresh pass and raises SourceError when the source breaks off."""

    name: str
    total: int
    rows: Callable[[], Iterable[SourceRow]]
    folder: Path | None = None


@dataclass(frozen=True)
class Recipe:
    """A data set.

    Args:
        name: folder name under ~/data, as in verl's recipes.
        hub_id: source when none is given; also verl's `data_source`, which selects the reward.
        id_prefix: first part of the row ids.
        question, answer, images: column names.
        open_folder: reads a layout of the data set's own, or returns None when a folder does not have that layout.
    """

    name: str
    hub_id: str
    id_prefix: str
    question: str
    answer: str
    images: str
    open_folder: Callable[[Path], list[Split] | None]

    def row_id(self, split: str, key: int | str) -> str:
        return f"{self.id_prefix}-{split}-{key}"


def open_source(path_or_hub_id: str | None, recipe: Recipe) -> list[Split]:
    """Splits of a local copy or of a hub data set.

    Raises:
        SourceError: the source is missing, empty, or in no layout that the recipe knows.
    """
    if path_or_hub_id is None:
        return _check_not_empty(_open_hub(recipe.hub_id, recipe), recipe.hub_id)
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        splits = _open_folder(path, recipe)
    elif path.exists():
        name = SPLIT_FILE.match(path.name)
        splits = [_parquet_split(_split_name(name[1]) if name else "train", [path], recipe)]
    elif HUB_ID.fullmatch(path_or_hub_id) and path.suffix != ".parquet":
        splits = _open_hub(path_or_hub_id, recipe)
    else:
        raise SourceError(f"{path} does not exist. --local_dataset_path takes a file, a folder or a hub id.")
    return _check_not_empty(splits, path_or_hub_id)


def _check_not_empty(splits: list[Split], source: str) -> list[Split]:
    empty = [split.name for split in splits if split.total == 0]
    if empty or not splits:
        raise SourceError(f"{source} has no rows" + (f" in its split {', '.join(empty)}." if empty else "."))
    return splits


def _split_name(name: str) -> str:
    return SPLIT_ALIASES.get(name, name)


def _open_folder(folder: Path, recipe: Recipe) -> list[Split]:
    own = recipe.open_folder(folder)
    if own is not None:
        return own
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        return _open_saved(folder, recipe)
    # A clone of a hub repository keeps its files under data/.
    for candidate in (folder, folder / "data"):
        shards: dict[str, list[Path]] = {}
        for file in sorted(candidate.glob("*.parquet")):
            if match := SPLIT_FILE.match(file.name):
                shards.setdefault(_split_name(match[1]), []).append(file)
            else:
                print(f"note: {file.name} belongs to no split by its name; it is not read", file=sys.stderr)
        if shards:
            return [_parquet_split(name, files, recipe) for name, files in shards.items()]
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise SourceError(
        f"{folder} is in no known layout (train*.parquet / validation*.parquet / test*.parquet, a save_to_disk folder, "
        f"or the data set's own folders); it holds {found}."
    )


def _check_columns(schema: pa.Schema, recipe: Recipe, where: object) -> None:
    expected = [recipe.question, recipe.images, recipe.answer]
    if missing := [name for name in expected if name not in schema.names]:
        raise SourceError(
            f"{where} has no column {', '.join(missing)}: "
            f"expected {', '.join(expected)}, found {', '.join(schema.names)}."
        )
    kind = schema.field(recipe.images).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not (is_list and pa.types.is_struct(kind.value_type) and kind.value_type.get_field_index("bytes") >= 0):
        raise SourceError(f"column {recipe.images} of {where} is {kind}: expected a list of structs of bytes and path.")


def _parquet_split(name: str, files: list[Path], recipe: Recipe) -> Split:
    total = 0
    for file in files:
        try:
            metadata = pq.ParquetFile(file)
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"{file} is no readable parquet file ({one_line(error)}).") from error
        _check_columns(metadata.schema_arrow, recipe, file)
        total += metadata.metadata.num_rows
    numbers = [match for file in files if (match := SHARD_NUMBER.search(file.name))]
    if numbers and len(numbers) != int(numbers[0][2]):
        raise SourceError(
            f"split {name} has {len(numbers)} of {int(numbers[0][2])} parquet files in {files[0].parent}."
        )

    def batches() -> Iterator[pa.RecordBatch]:
        columns = [recipe.question, recipe.images, recipe.answer]
        for file in files:
            # Without this, pyarrow reads ahead and keeps every row group that it has read.
            yield from pq.ParquetFile(file, pre_buffer=False).iter_batches(batch_size=READ_BATCH_ROWS, columns=columns)

    folder = files[0].parent.resolve()
    return Split(name, total, partial(_table_rows, batches, name, folder, recipe, files[0].parent), folder)


def _open_saved(folder: Path, recipe: Recipe) -> list[Split]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise SourceError(f"{folder} is no readable save_to_disk folder ({one_line(error)}).") from error
    return _dataset_splits(loaded, recipe, folder)


def _open_hub(hub_id: str, recipe: Recipe) -> list[Split]:
    import datasets
    from huggingface_hub import HfApi, constants

    print(f"loading {hub_id} from the Hugging Face hub", file=sys.stderr)
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    why = ""
    try:
        try:
            HfApi().dataset_info(hub_id, timeout=HUB_TIMEOUT_S)
        except Exception as error:
            why = one_line(error)
            # One failed question is enough: `datasets` would go on asking for half a minute before it looks at its
            # cache, which is the only place that can still have the data.
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        loaded = datasets.load_dataset(hub_id)
    except Exception as error:
        raise SourceError(
            f"{hub_id} is no local path, and cannot be loaded from the Hugging Face hub ({why or one_line(error)}). "
            "Give a local copy with --local_dataset_path."
        ) from error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
    return _dataset_splits(loaded, recipe, hub_id)


def _dataset_splits(loaded, recipe: Recipe, where: object) -> list[Split]:
    """Splits of a `datasets.Dataset` or `DatasetDict`."""
    by_name = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    folder = where.resolve() if isinstance(where, Path) else None
    splits = []
    for key, dataset in by_name.items():
        _check_columns(dataset.data.schema, recipe, f"split {key} of {where}")
        # The arrow format hands out stored bytes; the default one would decode every picture and lose them.
        batches = partial(dataset.with_format("arrow").iter, batch_size=READ_BATCH_ROWS)
        # A slice such as "train[:10%]" is a split's name too, but no file name that verl could open.
        name = _split_name(re.match(r"\w*", str(key))[0] or "train")
        splits.append(Split(name, len(dataset), partial(_table_rows, batches, name, folder, recipe, where)))
    return splits


def _table_rows(
    batches: Callable[[], Iterable], split: str, folder: Path | None, recipe: Recipe, where: object
) -> Iterator[SourceRow]:
    index = 0
    try:
        for batch in batches():
            for position in range(batch.num_rows):
                load = partial(_table_problem, batch, position, folder, recipe)
                yield SourceRow(index, recipe.row_id(split, index), load)
                index += 1
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"split {split} of {where} breaks off after row {index} ({one_line(error)}).") from error


def _table_problem(batch, position: int, folder: Path | None, recipe: Recipe) -> Problem:
    try:
        question, answer, images = (
            batch.column(name)[position].as_py() for name in (recipe.question, recipe.answer, recipe.images)
        )
    except UnicodeDecodeError as error:
        raise DroppedRow("text is not valid Unicode", str(error)) from error
    return Problem(question, answer, images or [], folder)
