# SPDX-License-Identifier: Apache-2.0
"""Open a source: parquet, JSON, a save_to_disk folder, the hub, or a layout of the data set's own."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import DroppedRow, SourceError, one_line
from .images import ImageStore
from .recipe import Recipe
from .split import SourceRow, Split

READ_BATCH_ROWS = 16
SHARD_NUMBER = re.compile(r"-(\d+)-of-(\d+)\.parquet$")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_TIMEOUT_S = 10
KINDS = (".parquet", ".jsonl", ".json")


def open_source(path_or_hub_id: str | None, recipe: Recipe, image_path: Path | None = None) -> list[Split]:
    """Return the splits of a local copy or of a hub data set.

    Args:
        path_or_hub_id: file, folder or hub id; None for the recipe's own hub id.
        image_path: folder or zip archive of the images, when they are not beside the source.

    Raises:
        SourceError: the source is missing, empty, or in an unknown layout.
    """
    if image_path is not None and not image_path.expanduser().exists():
        raise SourceError(f"--image_path {image_path} does not exist.")
    beside = [] if image_path is None else [image_path.expanduser()]
    name = path_or_hub_id or recipe.hub_id
    path = Path(name).expanduser()
    if path_or_hub_id is not None and path.is_dir():
        splits = _open_folder(path, recipe, beside)
    elif path_or_hub_id is not None and path.exists():
        if path.suffix not in KINDS:
            raise SourceError(f"{path} is none of {', '.join(KINDS)}.")
        splits = [_file_split(_split_of(path, recipe) or recipe.default_split, [path], recipe, beside)]
    elif HUB_ID.fullmatch(name) and path.suffix not in KINDS:
        splits = _open_hub(name, recipe, beside)
    else:
        raise SourceError(f"{path} does not exist. --local_dataset_path takes a file, a folder or a hub id.")
    empty = [split.name for split in splits if split.total == 0]
    if empty or not splits:
        raise SourceError(f"{name} has no rows" + (f" in its split {', '.join(empty)}." if empty else "."))
    return [replace(split, rows=partial(_distinct_keys, split.rows)) for split in splits]


def _split_of(file: Path, recipe: Recipe) -> str | None:
    """Return the split that a file's name states.

    "train-00000-of-00002" and "train_v2" state train, "trainer.parquet" states none.
    """
    match = re.match(rf"({'|'.join(recipe.splits)})(?![A-Za-z])", file.name)
    return recipe.aliases.get(match[1], match[1]) if match else None


def _open_folder(folder: Path, recipe: Recipe, beside: list[Path]) -> list[Split]:
    own = recipe.open_folder(folder) if recipe.open_folder else None
    if own is not None:
        return own
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        return _open_saved(folder, recipe, beside)
    # A clone of a hub repository keeps its files under data/.
    groups = [sorted(place.glob(f"*{kind}")) for place in (folder, folder / "data") for kind in KINDS]
    chosen = next((group for group in groups if any(_split_of(file, recipe) for file in group)), [])
    named: dict[str, list[Path]] = {}
    for file in chosen:
        if split := _split_of(file, recipe):
            named.setdefault(split, []).append(file)
    files = [file for group in groups for file in group]
    if not named and len(files) == 1:
        named = {recipe.default_split: files}
    if named:
        read = [file for group in named.values() for file in group]
        for file in files:
            if file not in read:
                print(f"note: {file.relative_to(folder)} is not read, beside {read[0].name}", file=sys.stderr)
        return [_file_split(name, group, recipe, [*beside, folder]) for name, group in named.items()]
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise SourceError(
        f"{folder} is in an unknown layout (expected {', '.join(f'{name}*' for name in recipe.splits)} as "
        f"{', '.join(KINDS)}, a save_to_disk folder, or the data set's own folders); it holds {found}."
    )


def _file_split(name: str, files: list[Path], recipe: Recipe, beside: list[Path]) -> Split:
    folder = files[0].parent
    images = ImageStore([*beside, folder])
    if files[0].suffix == ".parquet":
        return _parquet_split(name, files, recipe, images)
    if len(files) > 1:
        raise SourceError(f"split {name} is in several files: {', '.join(file.name for file in files)} of {folder}.")
    records = _json_lines if files[0].suffix == ".jsonl" else _json_records
    try:
        total = sum(1 for _ in records(files[0]))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{files[0]} is not a readable {files[0].suffix} file ({one_line(error)}).") from error
    rows = partial(_record_rows, partial(records, files[0]), recipe)
    return Split(name, total, rows, images, folder.resolve())


def _json_lines(file: Path) -> Iterator[object]:
    with file.open("rb") as stream:
        for line in stream:
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield DroppedRow("record is unreadable", one_line(error))


def _json_records(file: Path) -> Iterator[object]:
    """Yield the records of a JSON file that holds a list of them, or one object with an entry per id."""
    content = json.loads(file.read_bytes())
    if isinstance(content, dict):
        yield from ({"id": key} | record if isinstance(record, dict) else record for key, record in content.items())
    elif isinstance(content, list):
        yield from content
    else:
        raise ValueError(f"it holds a {type(content).__name__}, not a list of records")


def _record_rows(records: Callable[[], Iterable[object]], recipe: Recipe) -> Iterator[SourceRow]:
    found: dict[str, Any] | DroppedRow
    for index, record in enumerate(records()):
        if isinstance(record, dict):
            missing = [name for name in recipe.columns if name not in record]
            values = {name: record.get(name) for name in (*recipe.columns, *recipe.optional)}
            found = DroppedRow("record lacks a column", ", ".join(missing)) if missing else values
        elif isinstance(record, DroppedRow):
            found = record
        else:
            found = DroppedRow("record is unreadable", f"it is a {type(record).__name__}")
        yield _source_row(index, found, recipe)


def _source_row(index: int, values: dict[str, Any] | DroppedRow, recipe: Recipe) -> SourceRow:
    parts = [values.get(column) for column in recipe.key] if isinstance(values, dict) else []
    known = parts and all(part is not None and part != "" for part in parts)
    # Text that is not valid Unicode cannot be written.
    key = "-".join(map(str, parts)).encode(errors="replace").decode() if known else index
    return SourceRow(index, key, values)


def _distinct_keys(rows: Callable[[], Iterable[SourceRow]]) -> Iterator[SourceRow]:
    """Yield the rows with distinct keys: append a number to a key that an earlier row has.

    This happens before any row is dropped or sampled, so that the keys do not depend on either.
    """
    seen: dict[object, int] = {}
    for row in rows():
        key = row.key
        while key in seen:
            seen[row.key] += 1
            key = f"{row.key}.{seen[row.key]}"
        seen[key] = 1
        yield row if key == row.key else replace(row, key=key, repeated=True)


def _columns(found: list[str], recipe: Recipe, where: Path | str) -> list[str]:
    if missing := [name for name in recipe.columns if name not in found]:
        raise SourceError(
            f"{where} has no column {', '.join(missing)}: "
            f"expected {', '.join(recipe.columns)}, found {', '.join(found)}."
        )
    return [*recipe.columns, *(name for name in recipe.optional if name in found)]


def _parquet_split(name: str, files: list[Path], recipe: Recipe, images: ImageStore) -> Split:
    total = 0
    for file in files:
        try:
            metadata = pq.ParquetFile(file)
        # Damaged bytes in the name of a column are no text.
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise SourceError(f"{file} is not a readable parquet file ({one_line(error)}).") from error
        _columns(metadata.schema_arrow.names, recipe, file)
        total += metadata.metadata.num_rows
    numbers = [match for file in files if (match := SHARD_NUMBER.search(file.name))]
    if recipe.numbered_shards and numbers and len(numbers) != int(numbers[0][2]):
        raise SourceError(
            f"split {name} has {len(numbers)} of {int(numbers[0][2])} parquet files in {files[0].parent}."
        )

    def batches() -> Iterator[pa.RecordBatch]:
        for file in files:
            # Without pre_buffer=False, pyarrow reads ahead and keeps every row group that it has read.
            opened = pq.ParquetFile(file, pre_buffer=False)
            columns = _columns(opened.schema_arrow.names, recipe, file)
            yield from opened.iter_batches(batch_size=READ_BATCH_ROWS, columns=columns)

    rows = partial(_table_rows, batches, name, recipe, files[0].parent)
    return Split(name, total, rows, images, files[0].parent.resolve())


def _open_saved(folder: Path, recipe: Recipe, beside: list[Path]) -> list[Split]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise SourceError(f"{folder} is not a readable save_to_disk folder ({one_line(error)}).") from error
    return _dataset_splits(loaded, recipe, folder, ImageStore([*beside, folder]))


def _open_hub(hub_id: str, recipe: Recipe, beside: list[Path]) -> list[Split]:
    import datasets
    from huggingface_hub import HfApi, constants, snapshot_download

    print(f"loading {hub_id} from the Hugging Face hub", file=sys.stderr)
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    why, loaded, folder = "", None, None
    try:
        try:
            HfApi().dataset_info(hub_id, timeout=HUB_TIMEOUT_S)
        except Exception as error:
            why = one_line(error)
            # One failed request is enough. `datasets` would retry for half a minute before it looks into its cache,
            # which is the only place that can still have the data.
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        if recipe.hub_files and hub_id == recipe.hub_id:
            folder = Path(snapshot_download(hub_id, repo_type="dataset", allow_patterns=list(recipe.hub_files)))
        else:
            loaded = datasets.load_dataset(hub_id, recipe.hub_config if hub_id == recipe.hub_id else None)
    except Exception as error:
        raise SourceError(
            f"{hub_id} is not a local path, and it cannot be loaded from the hub ({why or one_line(error)}). "
            "Give a local copy with --local_dataset_path."
        ) from error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
    if folder is not None:
        return _open_folder(folder, recipe, beside)
    return _dataset_splits(loaded, recipe, hub_id, ImageStore(beside))


def _dataset_splits(loaded: Any, recipe: Recipe, where: Path | str, images: ImageStore) -> list[Split]:
    """Return the splits of a `datasets.Dataset` or `DatasetDict`."""
    by_name = loaded if isinstance(loaded, dict) else {str(loaded.split or recipe.default_split): loaded}
    folder = where.resolve() if isinstance(where, Path) else None
    splits = []
    for key, dataset in by_name.items():
        columns = _columns(dataset.column_names, recipe, f"split {key} of {where}")
        # The arrow format returns the stored bytes; the default format would decode every picture and lose them.
        chosen = dataset.select_columns(columns).with_format("arrow")
        # A slice such as "train[:10%]" also names a split, but verl could not open a file of that name.
        name = re.split(r"\W", str(key), maxsplit=1)[0] or recipe.default_split
        name = recipe.aliases.get(name, name)
        rows = partial(_table_rows, partial(chosen.iter, batch_size=READ_BATCH_ROWS), name, recipe, where)
        splits.append(Split(name, len(dataset), rows, images, folder))
    return splits


def _table_rows(
    batches: Callable[[], Iterable[Any]], split: str, recipe: Recipe, where: Path | str
) -> Iterator[SourceRow]:
    index = 0
    try:
        for batch in batches():
            for position in range(batch.num_rows):
                yield _source_row(index, _values(batch, position, recipe), recipe)
                index += 1
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise SourceError(f"split {split} of {where} breaks off after row {index} ({one_line(error)}).") from error


def _values(batch: Any, position: int, recipe: Recipe) -> dict[str, Any] | DroppedRow:
    values: dict[str, Any] = dict.fromkeys(recipe.optional)
    try:
        return values | {name: batch.column(name)[position].as_py() for name in batch.schema.names}
    except UnicodeDecodeError as error:
        return DroppedRow("text is not valid Unicode", str(error))
