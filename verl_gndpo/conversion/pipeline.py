# SPDX-License-Identifier: Apache-2.0
"""Convert one data set: its splits, in worker processes, into files that appear only when all is well."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from verl_gndpo.data_facts import FactsError, FileFacts, read_facts

from .errors import ConversionError, SourceError
from .lengths import Limit, Measure, load_measure
from .preview import write_preview
from .prompt import load_prompt
from .recipe import Recipe
from .report import Report, length_lines, report_table
from .source import open_source
from .split import Split
from .verify import import_reader, verify
from .write import Converter, convert_all, worker_pool, write_split

WORTH_A_POOL = 256


def convert(
    source: str | None,
    save_dir: Path,
    recipe: Recipe,
    *,
    splits: list[str] | None = None,
    image_path: Path | None = None,
    prompt_style: str = "think_boxed",
    limit: int | None = None,
    seed: int | None = None,
    num_proc: int = 1,
    max_dropped: float = 0.01,
    max_prompt_length: int | None = None,
    rows_per_shard: int | None = None,
    include_unlicensed: bool = False,
    skip_verify: bool = False,
    model: str | None = None,
    preview: int = 0,
    dry_run: bool = False,
) -> list[Report]:
    """Convert a source into `<save_dir>/<split>.parquet`, one file per split.

    Each file is replaced in one step, and only after all splits have been converted, have at most `max_dropped` (a
    fraction of the split's rows) dropped, and have been read back. The arguments are those of the command line.

    Raises:
        ConversionError: the source cannot be read, too many rows were dropped, or verl does not read a row back.
        OSError: `save_dir` cannot be written.
    """
    prompt = load_prompt(prompt_style)
    if max_prompt_length is not None and (model is None or skip_verify):
        raise ConversionError("--max_prompt_length counts a model's tokens: give --model, and leave --skip_verify out.")
    chosen = _chosen_splits(source, recipe, splits, image_path)
    save_dir = save_dir.expanduser().resolve()
    if any(split.folder == save_dir for split in chosen):
        raise ConversionError(f"{save_dir} is the source itself: choose another --local_save_dir.")
    if limit is not None:
        chosen = [split.sample(limit, seed) for split in chosen]
    # More processes than cores only use more memory.
    cores = min(num_proc, os.cpu_count() or 1)
    workers = cores if sum(split.total for split in chosen) >= WORTH_A_POOL else 1
    about = f"{recipe.hub_id}, licence: {recipe.license}"
    with staging(save_dir, recipe.name) as staged, contextlib.ExitStack() as stack:
        pool = worker_pool(workers)
        if pool is not None:
            stack.callback(pool.shutdown, cancel_futures=True)
        reader: type | None = None
        measure: Measure | None = None
        fits: Limit | None = None
        if max_prompt_length is not None:
            reader, measure = _load_reader(model)
            if measure is None:
                raise ConversionError("--max_prompt_length needs verl to be installed.")
            fits = Limit(measure, max_prompt_length)
        reports: list[Report] = []
        files: dict[str, list[Path]] = {}
        for split in chosen:
            converter = Converter(recipe, prompt, split.name, split.images, include_unlicensed)
            folder = staged / split.name
            folder.mkdir()
            facts = FileFacts(recipe.name, (recipe.facts(split.name, prompt.name),))
            outcomes = convert_all(split.rows(), converter, pool, workers)
            reports.append(write_split(split, outcomes, facts, folder, rows_per_shard, fits))
            files[split.name] = sorted(folder.iterdir())
        stack.close()  # verl needs the memory of the worker processes
        print(report_table(reports, about))
        for report in reports:
            report.check_dropped(max_dropped)
        if not skip_verify and reader is None:
            reader, measure = _load_reader(model)
        if reader is None or measure is None:
            print("NOT read back through verl, and prompts not measured" + (": --skip_verify" if skip_verify else ""))
        else:
            for report in reports:
                checked = verify(reader, files[report.split], report, staged, measure, cores)
                print(f"{report.split}: {report.written} rows came back from verl ({checked})")
                print(length_lines(report, measure.name))
        if preview:
            write_preview(save_dir / "preview.html", about, files, reports, preview)
            print(f"wrote {save_dir / 'preview.html'}")
        if dry_run:
            print("nothing written: --dry_run")
        else:
            publish(files, save_dir, recipe.name)
    return reports


def _chosen_splits(source: str | None, recipe: Recipe, names: list[str] | None, image_path: Path | None) -> list[Split]:
    if recipe.validation_only and any(name.lower().startswith("train") for name in names or []):
        raise SourceError(f"{recipe.hub_id} has no split to train on: {recipe.validation_only}")
    found = open_source(source, recipe, image_path)
    if recipe.validation_only and any(split.name.lower().startswith("train") for split in found):
        raise SourceError(f"{source} holds a split named train. {recipe.hub_id}: {recipe.validation_only}")
    known = {split.name: split for split in found}
    if missing := [name for name in names or [] if name not in known]:
        raise SourceError(f"--split {' '.join(missing)}: not in the source, which has {', '.join(known)}.")
    wanted = names or [name for name in recipe.default_splits if name in known] or list(known)
    return [known[name] for name in dict.fromkeys(wanted)]


def _load_reader(model: str | None) -> tuple[type | None, Measure | None]:
    print("reading back goes through verl's RLHFDataset (importing verl takes a while)", file=sys.stderr)
    reader, why = import_reader()
    if reader is None:
        print(f"verl cannot be imported here ({why})")
        return None, None
    return reader, load_measure(model)


@contextlib.contextmanager
def staging(save_dir: Path, name: str) -> Iterator[Path]:
    """Make a hidden folder beside the results, after removing the one that a killed run of the same name left."""
    save_dir.mkdir(parents=True, exist_ok=True)
    for left in save_dir.glob(f".{name}-*"):
        with contextlib.suppress(OSError), (left / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while the run that made it is alive
            shutil.rmtree(left)
    with (
        tempfile.TemporaryDirectory(prefix=f".{name}-", dir=save_dir) as folder,
        (Path(folder) / "lock").open("w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(folder)


def publish(files: dict[str, list[Path]], save_dir: Path, converter: str) -> None:
    """Move the files of each split into place.

    Also remove files of the same split that an earlier run of the converter wrote under other names, because a pattern
    such as train*.parquet must not find a row twice.
    """
    for split, shards in files.items():
        written = set()
        for number, path in enumerate(shards):
            name = f"{split}.parquet" if len(shards) == 1 else f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
            os.replace(path, save_dir / name)
            written.add(save_dir / name)
            print(f"wrote {save_dir / name}")
        patterns = (f"{split}.parquet", f"{split}-?????-of-?????.parquet")
        for left in {path for pattern in patterns for path in save_dir.glob(pattern)} - written:
            if _written_by(left) == converter:
                left.unlink()
                print(f"removed {left}, of an earlier run")


def _written_by(path: Path) -> str | None:
    try:
        facts = read_facts(pq.read_schema(path).metadata)
    except (OSError, FactsError, pa.ArrowException):
        return None
    return facts.written_by if facts else None
