# SPDX-License-Identifier: Apache-2.0
"""Joins converted sets into one file to train on, and keeps the validation sets' problems out of it.

    python data_prep/mix.py --train ~/data/geo3k/train.parquet ~/data/mmk12/train.parquet --weights 1 2 --rows 10000 \\
        --val ~/data/mathvista/testmini.parquet --seed 0 --local_save_dir ~/data/mixed

Two rows are one problem when their images have the same pixels, in the same order, and their questions read the same
but for placeholders, case, white space and Unicode's compatibility forms. A problem of an earlier file is left out of
the later ones, and a problem of any validation file out of all of them. Rows that share no more than an image with
validation are counted, and left out with --drop_shared_images.

What this cannot see: a picture that was rescaled, cropped or compressed again as JPEG has other pixels, and a question
that was reworded or translated has another text. A report without contamination is no proof that there is none.

Files are streamed twice, once for the digests and once for the rows, so memory does not grow with the images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import sys
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from io import BytesIO
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

if __package__:
    from data_prep import _core, mathvista
else:  # as a plain script: this folder is on the path, its parent is not
    import _core
    import mathvista

SCHEMA = _core.row.SCHEMA
# What files lack that an older converter wrote. Empty says, as before there were such fields, that nothing is known.
NEWER_INFO = {"answer_type": "", "choices": [], "tolerance": 0.0, "meta": "{}"}
READ_ERRORS = (OSError, pa.ArrowException, ValueError)  # ValueError: text that is not UTF-8, metadata that is not JSON


class Digest(NamedTuple):
    """What the first pass takes from a row. `problem` is of images and question, `content` also of what is graded."""

    row_id: str
    data_source: str
    images: list[bytes]
    problem: bytes
    content: bytes


@dataclass
class Source:
    """An input file, and what is known of its rows after the first pass.

    `left` are the positions of rows that may be drawn, `chosen` of those that are; `problems` and `images` map the
    digests of a validation file to ids.
    """

    path: Path
    file: pq.ParquetFile
    metadata: dict
    ids: list[str] = field(default_factory=list)
    data_sources: list[str] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    chosen: Sequence[int] = ()
    problems: dict[bytes, str] = field(default_factory=dict)
    images: dict[bytes, str] = field(default_factory=dict)
    left_out: _core.report.Counts = field(default_factory=_core.report.Counts)
    kept: _core.report.Counts = field(default_factory=_core.report.Counts)
    duplicates: int = 0
    contaminated: int = 0
    sharing: int = 0

    @property
    def name(self) -> str:
        """Of two files called train.parquet, the folder is what tells them apart."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def validation_only(self) -> str:
        """Why the set must not be trained on; "" when it may, or when its converter did not say."""
        return self.metadata.get("validation_only", "")

    @property
    def rows(self) -> int:
        return self.file.metadata.num_rows

    def batches(self, positions: Sequence[int]) -> Iterator[list[dict]]:
        """Rows at these positions, in ascending order, a few at a time, with every field of `SCHEMA`.

        Raises:
            SourceError: the file breaks off, or a row lacks a column's value.
        """
        start = 0
        try:
            for batch in self.file.iter_batches(batch_size=_core.source.READ_BATCH_ROWS):
                end = start + batch.num_rows
                wanted = positions[bisect_left(positions, start) : bisect_left(positions, end)]
                rows = batch.take(pa.array([position - start for position in wanted], pa.int64())).to_pylist()
                for position, row in zip(wanted, rows, strict=True):
                    empty = [name for name in SCHEMA.names if row[name] is None]
                    if empty or not row["extra_info"]["id"]:
                        column = empty[0] if empty else "extra_info.id"
                        raise _core.SourceError(f"{self.path}: row {position} has no {column}; convert the set again.")
                    row["extra_info"] = NEWER_INFO | row["extra_info"]
                yield rows
                start = end
        except READ_ERRORS as error:
            why = _core.errors.one_line(error)
            raise _core.SourceError(f"{self.path} breaks off after row {start} ({why}).") from error

    def digest(self, row: dict) -> Digest:
        """Raises SourceError when an image does not decode."""
        info = row["extra_info"]
        try:
            images = [_image_digest(image["bytes"]) for image in row["images"]]
        except Exception as error:  # Pillow's decoders raise anything from struct.error to IndexError on broken bytes
            why = _core.errors.one_line(error)
            raise _core.SourceError(f"{self.path}: row {info['id']}: image does not decode ({why}).") from error
        # A row without its bare question has only the message, which does not match the bare question of another file.
        question = info["question"] or "".join(turn["content"] for turn in row["prompt"] if turn["role"] == "user")
        problem = _hash(images, normalised(question))
        content = _hash(problem, row["prompt"], row["reward_model"])
        return Digest(info["id"], sys.intern(row["data_source"]), images, problem, content)


def _image_digest(data: bytes) -> bytes:
    with Image.open(BytesIO(data), formats=_core.images.FORMATS) as image:
        return _core.images.pixel_digest(image.convert("RGB"))


def normalised(question: str) -> str:
    """The question as it is compared: without placeholders, case, and differences of white space and Unicode form."""
    bare = question.replace(_core.IMAGE_PLACEHOLDER, " ")
    return " ".join(unicodedata.normalize("NFKC", bare).casefold().split())


def _hash(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def open_converted(path: Path) -> Source:
    """A file that one of our converters wrote, or an older one of theirs.

    Raises:
        SourceError: it cannot be read, or has other columns.
    """
    path = Path(os.path.abspath(path.expanduser()))
    if not path.is_file():
        raise _core.SourceError(f"{path} does not exist, or is no file: give parquet files that a converter wrote.")
    try:
        # Without pre_buffer=False, pyarrow reads ahead and keeps every row group that it has read.
        file = pq.ParquetFile(path, pre_buffer=False)
        metadata = json.loads((file.schema_arrow.metadata or {}).get(_core.write.METADATA_KEY, "{}"))
    except READ_ERRORS as error:
        raise _core.SourceError(f"{path} is no readable parquet file ({_core.errors.one_line(error)}).") from error
    expected, found = _fields(SCHEMA), _fields(file.schema_arrow)
    optional = {f"extra_info.{name}" for name in NEWER_INFO}
    for column in dict.fromkeys([*expected, *found]):
        if expected.get(column) != found.get(column) and not (column in optional and column not in found):
            has, should = found.get(column, "missing"), expected.get(column, "no such column")
            raise _core.SourceError(f"{path}: column {column} is {has}, expected: {should}. Convert the set again.")
    return Source(path, file, metadata)


def _fields(schema: pa.Schema) -> dict[str, pa.DataType]:
    fields = {column.name: column.type for column in schema}
    if pa.types.is_struct(fields.get("extra_info", pa.null())):
        fields |= {f"extra_info.{inner.name}": inner.type for inner in fields.pop("extra_info")}
    return fields


def mix(
    train: list[Path],
    save_dir: Path,
    *,
    weights: list[float] | None = None,
    rows: int | None = None,
    counts: list[int] | None = None,
    val: Sequence[Path] = (),
    seed: int = 0,
    drop_shared_images: bool = False,
    dry_run: bool = False,
) -> str:
    """Joins the files into `<save_dir>/train.parquet`, and with `val` those into `<save_dir>/val.parquet`.

    Without weights and counts, all rows that are left; with weights and without `rows`, as many as keep the weights
    and repeat none. Rows of a file stay in their order, and the files take turns at random. Each result is replaced in
    one step, when all have been written. Arguments are those of the command line.

    Returns:
        The report.

    Raises:
        ConversionError: an input cannot be used, or has too few rows; the options contradict each other.
        OSError: `save_dir` cannot be written.
    """
    _check_options(len(train), weights, rows, counts)
    sources, validation = [open_converted(path) for path in train], [open_converted(path) for path in val]
    results = {"train": sources, "val": validation} if validation else {"train": sources}
    for source in sources:
        if why := source.validation_only:
            raise _core.SourceError(f"{source.path} must not be trained on: {why} Give it with --val.")
    save_dir = save_dir.expanduser().resolve()
    for source in (*sources, *validation):
        if source.path.resolve() in [save_dir / f"{name}.parquet" for name in results]:
            raise _core.SourceError(f"{source.path} would be overwritten: choose another --local_save_dir.")

    _first_pass(sources, validation, drop_shared_images)
    for files in results.values():
        _check_ids(files)
    rng = random.Random(seed)
    numbers = counts or [len(source.left) for source in sources]
    if weights:
        if empty := [source for source in sources if not source.left]:
            raise _core.ConversionError(f"{empty[0].path} has no row left after de-duplication: leave the file out.")
        numbers = shares(numbers, weights, rows)
    for source, number in zip(sources, numbers, strict=True):
        if number > len(source.left):
            raise _core.ConversionError(
                f"{source.path} has {len(source.left)} of its {source.rows} rows left after de-duplication, asked for "
                f"were {number}: lower --rows, --counts or its weight."
            )
        if number == 0 and weights:
            raise _core.ConversionError(f"{source.path} gets no row by its weight: raise that, or leave the file out.")
        source.chosen = sorted(rng.sample(source.left, number))
    for source in validation:
        source.chosen = range(source.rows)
    if not any(source.chosen for source in sources):
        raise _core.ConversionError("no row is left to train on: all are in the validation files, or there were none.")

    if not dry_run:
        about = {"seed": seed, "weights": weights, "validation": [source.name for source in validation]}
        rows_of = {"train": _interleaved(sources, rng), "val": chain.from_iterable(map(_chosen_rows, validation))}
        with _core.staging(save_dir, "mix") as folder:
            for name, files in results.items():
                about |= {
                    "converter": "mix",
                    "split": name,
                    "validation_only": next(filter(None, (source.validation_only for source in files)), ""),
                    "sources": [
                        source.metadata | {"file": source.name, "rows": len(source.chosen)} for source in files
                    ],
                }
                total = sum(len(source.chosen) for source in files)
                progress = tqdm(rows_of[name], total=total, desc=f"{name}: writing", unit="row")
                with _core.RowGroups(folder / f"{name}.parquet", about) as writer:
                    for row in progress:
                        writer.add(row)
            for name in results:
                os.replace(folder / f"{name}.parquet", save_dir / f"{name}.parquet")
    return report(results)


def _check_options(files: int, weights: list | None, rows: int | None, counts: list | None) -> None:
    if counts and (weights or rows is not None):
        raise _core.ConversionError("--counts says how many rows of each file: leave --weights and --rows out.")
    if rows is not None and not weights:
        raise _core.ConversionError("--rows is the size of a mix by weight: give --weights too, or --counts instead.")
    for option, values in (("--weights", weights), ("--counts", counts)):
        if values and len(values) != files:
            raise _core.ConversionError(f"{option} has {len(values)} numbers, --train {files} files: give one each.")
    for value in (*(weights or counts or ()), 1 if rows is None else rows):
        if not 0 < value < math.inf:
            raise _core.ConversionError(f"weights, counts and rows have to be above 0, {value:g} is not.")


def shares(have: list[int], weights: list[float], rows: int | None) -> list[int]:
    """How many rows of each set make up a mix by weight; exact but for rounding by less than one row.

    Args:
        have: rows of each set.
        weights: of each set, above 0.
        rows: of the mix; None for as many as there can be.
    """
    parts = [Fraction(str(weight)) for weight in weights]  # 0.1 as it was typed: floats would lose rows to rounding
    if rows is None:
        scale = min(number / part for number, part in zip(have, parts, strict=True))
        return [int(scale * part) for part in parts]
    exact = [rows * part / sum(parts) for part in parts]
    numbers = [int(number) for number in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: numbers[place] - exact[place])
    for place in by_remainder[: rows - sum(numbers)]:
        numbers[place] += 1
    return numbers


def _first_pass(sources: list[Source], validation: list[Source], drop_shared_images: bool) -> None:
    """Finds out which rows are left to draw from, and what the report says of the others."""
    total = sum(source.rows for source in (*sources, *validation))
    with (
        ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as threads,
        tqdm(total=total, desc="comparing", unit="row") as progress,
    ):

        def digests(source: Source) -> Iterator[tuple[int, Digest]]:
            for batch in source.batches(range(source.rows)):
                for digest in threads.map(source.digest, batch):
                    source.ids.append(digest.row_id)
                    source.data_sources.append(digest.data_source)
                    source.contents.append(digest.content)
                    yield len(source.ids) - 1, digest
                    progress.update()

        for source in validation:
            for position, digest in digests(source):
                source.left.append(position)
                source.problems.setdefault(digest.problem, digest.row_id)
                for image in digest.images:
                    source.images.setdefault(image, digest.row_id)
        earlier: dict[bytes, str] = {}
        for source in sources:
            for position, digest in digests(source):
                if digest.data_source == mathvista.RECIPE.hub_id:
                    why = mathvista.RECIPE.validation_only
                    raise _core.SourceError(
                        f"{source.path} holds rows of {digest.data_source}: {why} Give it with --val."
                    )
                if _is_left(source, digest, validation, earlier, drop_shared_images):
                    source.left.append(position)


def _is_left(
    source: Source, digest: Digest, validation: list[Source], earlier: dict[bytes, str], drop_shared_images: bool
) -> bool:
    """Whether a row may be drawn; notes for the report why not. `earlier` are the problems of the rows before it."""
    known = [other for other in validation if digest.problem in other.problems]
    for other in known:
        source.left_out.add(f"{digest.row_id} ({other.problems[digest.problem]})", f"problem of {other.name}")
    if known:
        source.contaminated += 1
        return False
    if digest.problem in earlier:
        source.left_out.add(f"{digest.row_id} ({earlier[digest.problem]})", "problem of an earlier row")
        source.duplicates += 1
        return False
    earlier[digest.problem] = digest.row_id
    noted = source.left_out if drop_shared_images else source.kept
    shares_image = False
    for other in validation:
        if owner := next((other.images[image] for image in digest.images if image in other.images), None):
            noted.add(f"{digest.row_id} ({owner})", f"image of {other.name}, with another question")
            shares_image = True
    source.sharing += shares_image
    return not (shares_image and drop_shared_images)


def _check_ids(sources: list[Source]) -> None:
    """Raises ConversionError when rows of one result have the same id, and not the same content."""
    first: dict[str, tuple[Source, int]] = {}
    for source in sources:
        for position in source.left:
            other, place = first.setdefault(source.ids[position], (source, position))
            if other.contents[place] != source.contents[position]:
                raise _core.ConversionError(
                    f"{other.path} and {source.path} have rows that differ under one id, {source.ids[position]}: "
                    "leave one of the files out, or convert both again from one copy of the set."
                )


def _chosen_rows(source: Source) -> Iterator[dict]:
    return chain.from_iterable(source.batches(source.chosen))


def _interleaved(sources: list[Source], rng: random.Random) -> Iterator[dict]:
    """Rows of all sources; each is drawn from a source at random, in proportion to what it still owes."""
    streams = [_chosen_rows(source) for source in sources]
    owed = [len(source.chosen) for source in sources]
    for rows_to_come in range(sum(owed), 0, -1):
        place = bisect_right(list(accumulate(owed)), rng.randrange(rows_to_come))
        owed[place] -= 1
        yield next(streams[place])


def report(results: dict[str, list[Source]]) -> str:
    """What became of each file's rows, with the first ids (in brackets, the row that stays), and rows by set."""
    files = [(result, source) for result, sources in results.items() for source in sources]
    width = max(len(f"{result}: {source.name}") for result, source in files)
    lines = [f"{'file':<{width}}  {'read':>7}  {'duplicate':>9}  {'in val':>7}  {'val image':>9}  {'written':>7}"]
    for result, source in files:
        counts = f"{source.rows:>7}  {source.duplicates:>9}  {source.contaminated:>7}  {source.sharing:>9}"
        lines.append(f"{f'{result}: {source.name}':<{width}}  {counts}  {len(source.chosen):>7}")
        lines += source.left_out.lines("left out") + source.kept.lines("kept")
    by_set = {
        result: Counter(source.data_sources[place] for source in sources for place in source.chosen)
        for result, sources in results.items()
    }
    names = sorted(set(chain.from_iterable(by_set.values())))
    width = max(map(len, (*names, "data_source")))
    lines.append("  ".join([f"{'data_source':<{width}}", *(f"{result:>7}" for result in results)]))
    lines += ["  ".join([f"{name:<{width}}", *(f"{by_set[key][name]:>7}" for key in results)]) for name in names]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit code: 0, or 1 with one line on stderr that says why."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--train", nargs="+", type=Path, required=True, help="converted sets to join; the first keeps what two have")
    add("--weights", nargs="+", type=float, help="share of each set's rows in the mix, such as 1 2")
    add("--rows", type=int, help="rows of a mix by weight; when not given, as many as there can be")
    add("--counts", nargs="+", type=int, help="rows of each set, instead of weights")
    add("--val", nargs="+", type=Path, default=[], help="validation sets, whose problems are kept out of train.parquet")
    add("--seed", type=int, default=0, help="of the draw, and of the order in which the sets take turns")
    add("--drop_shared_images", action="store_true", help="leave out rows that share only an image with validation")
    add("--local_save_dir", type=Path, default="~/data/mixed", help="folder for train.parquet and val.parquet")
    add("--dry_run", action="store_true", help="report, and write nothing")
    options = vars(parser.parse_args(argv))
    save_dir, dry_run = options.pop("local_save_dir"), options["dry_run"]
    try:
        print(mix(options.pop("train"), save_dir, **options))
    except _core.ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot write to {save_dir} ({_core.errors.one_line(error)})", file=sys.stderr)
        return 1
    print("nothing written: --dry_run" if dry_run else f"wrote to {save_dir.expanduser()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
