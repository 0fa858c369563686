# SPDX-License-Identifier: Apache-2.0
"""The command line that all converters have in common."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import ConversionError, SourceError, one_line
from .lengths import Limit, Measure, load_measure
from .preview import write_preview
from .prompt import STYLES, load_prompt
from .recipe import Recipe
from .report import Report, length_lines, report_table
from .source import Split, open_source
from .verify import import_reader, verify
from .write import METADATA_KEY, Converter, convert_all, worker_pool, write_split

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
    """Converts a source into `<save_dir>/<split>.parquet`, one file a split.

    Each file is replaced in one step, and none before all splits have been converted, are within `max_dropped` (a
    fraction of the split's rows) and have been read back. Arguments are those of the command line.

    Raises:
        ConversionError: the source cannot be read, too much was dropped, or a row does not come back from verl.
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
    # More processes than cores only take memory.
    cores = min(num_proc, os.cpu_count() or 1)
    workers = cores if sum(split.total for split in chosen) >= WORTH_A_POOL else 1
    about = f"{recipe.hub_id}, licence: {recipe.license}"
    with staging(save_dir, recipe.name) as staged, contextlib.ExitStack() as stack:
        pool = worker_pool(workers)
        if pool is not None:
            stack.callback(pool.shutdown, cancel_futures=True)
        reader, measure = None, None
        if max_prompt_length is not None:
            reader, measure = _load_reader(model)
            if measure is None:
                raise ConversionError("--max_prompt_length needs verl to be installed.")
        fits = Limit(measure, max_prompt_length) if measure else None
        reports, files = [], {}
        for split in chosen:
            converter = Converter(recipe, prompt, split.name, split.images, include_unlicensed)
            folder = staged / split.name
            folder.mkdir()
            metadata = {
                "source": recipe.hub_id,
                "license": recipe.license,
                "converter": recipe.name,
                "split": split.name,
                "prompt_style": prompt.name,
                "validation_only": recipe.validation_only,
            }
            outcomes = convert_all(split.rows(), converter, pool, workers)
            reports.append(write_split(split, outcomes, metadata, folder, rows_per_shard, fits))
            files[split.name] = sorted(folder.iterdir())
        stack.close()  # verl needs the memory of the worker processes
        print(report_table(reports, about))
        for report in reports:
            report.check_dropped(max_dropped)
        if not skip_verify and reader is None:
            reader, measure = _load_reader(model)
        if measure is None:
            print("NOT read back through verl, and prompts not measured" + (": --skip_verify" if skip_verify else ""))
        for report in reports if measure else []:
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
    """A hidden folder beside the results; what a killed run left of its own is removed first."""
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
    """Moves the files of each split into place, and removes what an earlier run of the converter left of that split
    under other names: a pattern such as train*.parquet must not find rows twice."""
    for split, shards in files.items():
        written = set()
        for number, path in enumerate(shards):
            name = f"{split}.parquet" if len(shards) == 1 else f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
            os.replace(path, save_dir / name)
            written.add(save_dir / name)
            print(f"wrote {save_dir / name}")
        patterns = (f"{split}.parquet", f"{split}-?????-of-?????.parquet")
        for left in {path for pattern in patterns for path in save_dir.glob(pattern)} - written:
            if _converter_of(left) == converter:
                left.unlink()
                print(f"removed {left}, of an earlier run")


def _converter_of(path: Path) -> str | None:
    try:
        metadata = pq.read_schema(path).metadata or {}
        return json.loads(metadata.get(METADATA_KEY, "{}")).get("converter")
    except (OSError, ValueError, pa.ArrowException):
        return None


def _fraction(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def _parser(recipe: Recipe, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--local_dataset_path", help=f"local copy (file or folder) or hub id; when not given, {recipe.hub_id}")
    add("--local_save_dir", default=f"~/data/{recipe.name}", help="folder for the parquet files")
    add("--image_path", type=Path, help="folder or zip archive of the images, when they do not lie beside the source")
    add("--split", nargs="+", help="convert these splits only")
    add("--limit", type=_positive, help="at most this many rows of each split")
    add("--seed", type=int, help="draw the rows of --limit at random; without it, the first ones")
    add("--num_proc", type=_positive, default=min(os.cpu_count() or 1, 8), help="worker processes")
    add("--prompt_style", default="think_boxed", help=f"{', '.join(STYLES)}, or a file with a template")
    add("--max_dropped", type=_fraction, default=0.01, help="fraction of a split that may be dropped before it fails")
    add("--max_prompt_length", type=_positive, help="drop prompts of more tokens than this; needs --model")
    add("--rows_per_shard", type=_positive, help="write several files a split, with this many rows each")
    add("--model", help="model whose tokenizer and processor measure the prompts and read them back")
    add("--skip_verify", action="store_true", help="do not measure the prompts, nor read them back through verl")
    add("--preview", type=_positive, default=0, metavar="N", help="write preview.html with N rows of each split")
    add("--dry_run", action="store_true", help="do everything but write the parquet files")
    if recipe.keep:
        add("--include_unlicensed", action="store_true", help="keep rows that are flagged as not licensed")
    return parser


def main(recipe: Recipe, description: str, argv: list[str] | None = None) -> int:
    """Command line of a converter. Returns the exit code: 0, or 1 with one line on stderr that says why."""
    options = vars(_parser(recipe, description).parse_args(argv))
    source, save_dir = options.pop("local_dataset_path"), options.pop("local_save_dir")
    options["splits"] = options.pop("split")
    try:
        convert(source, Path(save_dir), recipe, **options)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot write to {save_dir} ({one_line(error)})", file=sys.stderr)
        return 1
    return 0
