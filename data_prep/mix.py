# SPDX-License-Identifier: Apache-2.0
"""Join converted sets into one file to train on, and keep the validation sets' problems out of it.

    python data_prep/mix.py --train ~/data/geo3k/train.parquet ~/data/mmk12/train.parquet --weights 1 2 --rows 10000 \\
        --val ~/data/mathvista/testmini.parquet --seed 0 --local_save_dir ~/data/mixed

Two rows hold the same problem when their images have the same pixels, in the same order, and their questions are equal
after ignoring placeholders, case, white space and Unicode's compatibility forms. A problem of an earlier file is left
out of the later ones, and a problem of any validation file out of all training files. Rows that share only an image
with validation are counted, and left out with --drop_shared_images.

The comparison has limits: a picture that was rescaled, cropped or compressed again as JPEG has other pixels, and a
question that was reworded or translated has another text. So a clean report does not prove that there is no
contamination.

Files are streamed twice, once for the digests and once for the rows, so memory does not grow with the images.
"""

from __future__ import annotations

import argparse
import hashlib
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
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from verl_gndpo.conversion.command import first_line
from verl_gndpo.conversion.errors import ConversionError, SourceError, one_line
from verl_gndpo.conversion.images import FORMATS, pixel_digest
from verl_gndpo.conversion.pipeline import staging
from verl_gndpo.conversion.report import Counts
from verl_gndpo.conversion.row import SCHEMA
from verl_gndpo.conversion.sets import validation_only
from verl_gndpo.conversion.source import READ_BATCH_ROWS
from verl_gndpo.conversion.text import IMAGE_PLACEHOLDER
from verl_gndpo.conversion.write import RowGroups
from verl_gndpo.data_facts import FactsError, FileFacts, read_facts

READ_ERRORS = (OSError, pa.ArrowException, ValueError)  # ValueError: text that is not UTF-8


class Digest(NamedTuple):
    """The digest of one row, for the first pass.

    `problem` is a hash of images and question; `content` is a hash of those and of what is graded.
    """

    row_id: str
    data_source: str
    images: list[bytes]
    problem: bytes
    content: bytes


@dataclass
class Source:
    """An input file, and the results of the first pass over its rows.

    Args:
        path: path of the file.
        file: the opened file.
        facts: facts that the file states; None when it states none.
        ids, data_sources, contents: one entry per row.
        left: positions of the rows that may be drawn.
        chosen: positions of the rows that are drawn.
        problems, images: for a validation file, map each digest to the id of a row that has it.
        left_out, kept: the rows that the report names, by kind.
        duplicates, contaminated, sharing: numbers of rows for the report.
    """

    path: Path
    file: pq.ParquetFile
    facts: FileFacts | None
    ids: list[str] = field(default_factory=list)
    data_sources: list[str] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    chosen: Sequence[int] = ()
    problems: dict[bytes, str] = field(default_factory=dict)
    images: dict[bytes, str] = field(default_factory=dict)
    left_out: Counts = field(default_factory=Counts)
    kept: Counts = field(default_factory=Counts)
    duplicates: int = 0
    contaminated: int = 0
    sharing: int = 0

    @property
    def name(self) -> str:
        """Return the file's name with its folder, which distinguishes several files called train.parquet."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def rows(self) -> int:
        """Return the number of rows of the file."""
        return int(self.file.metadata.num_rows)

    def batches(self, positions: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows at these positions, which ascend, a few at a time.

        Raises:
            SourceError: the file breaks off, or a row lacks a column's value.
        """
        start = 0
        try:
            for batch in self.file.iter_batches(batch_size=READ_BATCH_ROWS):
                end = start + batch.num_rows
                wanted = positions[bisect_left(positions, start) : bisect_left(positions, end)]
                rows = batch.take(pa.array([position - start for position in wanted], pa.int64())).to_pylist()
                for position, row in zip(wanted, rows, strict=True):
                    empty = [name for name in SCHEMA.names if row[name] is None]
                    if empty or not row["extra_info"]["id"]:
                        column = empty[0] if empty else "extra_info.id"
                        raise SourceError(f"{self.path}: row {position} has no {column}; convert the set again.")
                yield rows
                start = end
        except READ_ERRORS as error:
            raise SourceError(f"{self.path} breaks off after row {start} ({one_line(error)}).") from error

    def digest(self, row: dict[str, Any]) -> Digest:
        """Return the digest of a row.

        Raises:
            SourceError: an image does not decode.
        """
        info = row["extra_info"]
        try:
            images = [_image_digest(image["bytes"]) for image in row["images"]]
        except Exception as error:  # Pillow's decoders raise anything from struct.error to IndexError on broken bytes
            why = one_line(error)
            raise SourceError(f"{self.path}: row {info['id']}: image does not decode ({why}).") from error
        # Without its bare question, a row has only the message. That does not match the bare question of another file.
        question = info["question"] or "".join(turn["content"] for turn in row["prompt"] if turn["role"] == "user")
        problem = _hash(images, normalised(question))
        content = _hash(problem, row["prompt"], row["reward_model"])
        return Digest(info["id"], sys.intern(row["data_source"]), images, problem, content)


def _image_digest(data: bytes) -> bytes:
    with Image.open(BytesIO(data), formats=FORMATS) as image:
        return pixel_digest(image.convert("RGB"))


def normalised(question: str) -> str:
    """Return the question without placeholders, case, and differences of white space and Unicode form."""
    bare = question.replace(IMAGE_PLACEHOLDER, " ")
    return " ".join(unicodedata.normalize("NFKC", bare).casefold().split())


def _hash(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def open_converted(path: Path) -> Source:
    """Open a file that a converter or `mix` wrote.

    Raises:
        SourceError: it cannot be read, or has other columns.
    """
    path = Path(os.path.abspath(path.expanduser()))
    if not path.is_file():
        raise SourceError(f"{path} does not exist or is not a file: give parquet files that a converter wrote.")
    try:
        # Without pre_buffer=False, pyarrow reads ahead and keeps every row group that it has read.
        file = pq.ParquetFile(path, pre_buffer=False)
        facts = read_facts(file.schema_arrow.metadata)
    except FactsError as error:
        raise SourceError(f"{path}: {error}. Convert the set again.") from error
    except READ_ERRORS as error:
        raise SourceError(f"{path} is not a readable parquet file ({one_line(error)}).") from error
    expected, found = _fields(SCHEMA), _fields(file.schema_arrow)
    for column in dict.fromkeys([*expected, *found]):
        if expected.get(column) != found.get(column):
            has, should = found.get(column, "missing"), expected.get(column, "no such column")
            raise SourceError(f"{path}: column {column} is {has}, expected: {should}. Convert the set again.")
    return Source(path, file, facts)


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
    """Join the files into `<save_dir>/train.parquet`, and with `val` those into `<save_dir>/val.parquet`.

    Without weights and counts, all remaining rows are joined. With weights and without `rows`, the mix is as large as
    the weights allow without repeating a row. Rows of a file stay in their order, and the files take turns at random.
    Each result is replaced in one step, after all have been written. The arguments are those of the command line.

    Returns:
        The report.

    Raises:
        ConversionError: an input cannot be used, may not be trained on, or has too few rows; or options conflict.
        OSError: `save_dir` cannot be written.
    """
    _check_options(len(train), weights, rows, counts)
    sources, validation = [open_converted(path) for path in train], [open_converted(path) for path in val]
    results = {"train": sources, "val": validation} if validation else {"train": sources}
    for source in sources:
        if source.facts and (why := source.facts.validation_only):
            raise SourceError(f"{source.path} must not be trained on: {why} Give it with --val.")
    save_dir = save_dir.expanduser().resolve()
    for source in (*sources, *validation):
        if source.path.resolve() in [save_dir / f"{name}.parquet" for name in results]:
            raise SourceError(f"{source.path} would be overwritten: choose another --local_save_dir.")

    _first_pass(sources, validation, drop_shared_images)
    for files in results.values():
        _check_ids(files)
    rng = random.Random(seed)
    numbers = counts or [len(source.left) for source in sources]
    if weights:
        if empty := [source for source in sources if not source.left]:
            raise ConversionError(f"{empty[0].path} has no row left after de-duplication: leave the file out.")
        numbers = shares(numbers, weights, rows)
    for source, number in zip(sources, numbers, strict=True):
        if number > len(source.left):
            raise ConversionError(
                f"{source.path} has {len(source.left)} of its {source.rows} rows left after de-duplication, but "
                f"{number} are wanted: lower --rows, --counts or its weight."
            )
        if number == 0 and weights:
            raise ConversionError(f"{source.path} gets no row by its weight: raise that, or leave the file out.")
        source.chosen = sorted(rng.sample(source.left, number))
    for source in validation:
        source.chosen = range(source.rows)
    if not any(source.chosen for source in sources):
        raise ConversionError("no row is left to train on: all are in the validation files, or there were none.")

    if not dry_run:
        options = {"seed": seed, "weights": weights, "validation": [source.name for source in validation]}
        rows_of = {"train": _interleaved(sources, rng), "val": chain.from_iterable(map(_chosen_rows, validation))}
        with staging(save_dir, "mix") as folder:
            for name, files in results.items():
                total = sum(len(source.chosen) for source in files)
                progress = tqdm(rows_of[name], total=total, desc=f"{name}: writing", unit="row")
                with RowGroups(folder / f"{name}.parquet", _joined_facts(files, options)) as writer:
                    for row in progress:
                        writer.add(row)
            for name in results:
                os.replace(folder / f"{name}.parquet", save_dir / f"{name}.parquet")
    return report(results)


def _joined_facts(files: list[Source], options: dict[str, Any]) -> FileFacts:
    """Return the facts of a result: those of all sets that its rows come from, and how it was made."""
    used = [source for source in files if source.chosen]
    sets = dict.fromkeys(chain.from_iterable(source.facts.sets for source in used if source.facts))
    written = [{"file": source.name, "rows": len(source.chosen)} for source in files]
    return FileFacts("mix", tuple(sets), options | {"files": written})


def _check_options(files: int, weights: list[float] | None, rows: int | None, counts: list[int] | None) -> None:
    if counts and (weights or rows is not None):
        raise ConversionError("--counts says how many rows of each file: leave --weights and --rows out.")
    if rows is not None and not weights:
        raise ConversionError("--rows is the size of a mix by weight: give --weights too, or --counts instead.")
    values: Sequence[float]
    for option, values in (("--weights", weights or ()), ("--counts", counts or ())):
        if values and len(values) != files:
            raise ConversionError(f"{option} has {len(values)} numbers, --train {files} files: give one each.")
    for value in (*(weights or counts or ()), 1 if rows is None else rows):
        if not 0 < value < math.inf:
            raise ConversionError(f"weights, counts and rows have to be above 0, {value:g} is not.")


def shares(have: list[int], weights: list[float], rows: int | None) -> list[int]:
    """Return the number of rows of each set in a mix by weight; rounding changes each by less than one row.

    Args:
        have: number of rows of each set.
        weights: weight of each set, above 0.
        rows: number of rows of the mix; None for as many as possible.
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
    """Find the rows that may be drawn, and note the others for the report."""
    total = sum(source.rows for source in (*sources, *validation))
    forbidden = validation_only()
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
                # A file that was rewritten since states no facts, but its rows still name their set.
                if why := forbidden.get(digest.data_source):
                    raise SourceError(f"{source.path} holds rows of {digest.data_source}: {why} Give it with --val.")
                if _is_left(source, digest, validation, earlier, drop_shared_images):
                    source.left.append(position)


def _is_left(
    source: Source, digest: Digest, validation: list[Source], earlier: dict[bytes, str], drop_shared_images: bool
) -> bool:
    """Return whether a row may be drawn, and note for the report why not.

    Args:
        source: file of the row.
        digest: digest of the row.
        validation: files with the problems to avoid.
        earlier: maps the problems of earlier rows to their ids; receives the row's problem.
        drop_shared_images: leave out rows that share only an image with validation.
    """
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
    """Raise ConversionError when two rows of one result have the same id and different contents."""
    first: dict[str, tuple[Source, int]] = {}
    for source in sources:
        for position in source.left:
            other, place = first.setdefault(source.ids[position], (source, position))
            if other.contents[place] != source.contents[position]:
                raise ConversionError(
                    f"{other.path} and {source.path} have rows that differ under one id, {source.ids[position]}: "
                    "leave one of the files out, or convert both again from one copy of the set."
                )


def _chosen_rows(source: Source) -> Iterator[dict[str, Any]]:
    return chain.from_iterable(source.batches(source.chosen))


def _interleaved(sources: list[Source], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yield the chosen rows of all sources, drawing each source with probability proportional to its remaining rows."""
    streams = [_chosen_rows(source) for source in sources]
    owed = [len(source.chosen) for source in sources]
    for rows_to_come in range(sum(owed), 0, -1):
        place = bisect_right(list(accumulate(owed)), rng.randrange(rows_to_come))
        owed[place] -= 1
        yield next(streams[place])


def report(results: dict[str, list[Source]]) -> str:
    """Return a table of each file's rows, with the first ids of each kind, and the numbers of rows by set.

    The id in brackets is the row that stays.
    """
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


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; None takes the process's own.
        prog: name of the command in `--help`; None for the script's name.

    Returns:
        The exit code: 0, or 1 after one line on stderr that says why.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=first_line(__doc__), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--train", nargs="+", type=Path, required=True, help="converted sets to join; the first keeps what two have")
    add("--weights", nargs="+", type=float, help="share of each set's rows in the mix, such as 1 2")
    add("--rows", type=int, help="rows of a mix by weight; when not given, as many as possible")
    add("--counts", nargs="+", type=int, help="rows of each set, instead of weights")
    add("--val", nargs="+", type=Path, default=[], help="validation sets, whose problems are kept out of train.parquet")
    add("--seed", type=int, default=0, help="seed of the draw, and of the order in which the sets take turns")
    add("--drop_shared_images", action="store_true", help="leave out rows that share only an image with validation")
    add("--local_save_dir", type=Path, default="~/data/mixed", help="folder for train.parquet and val.parquet")
    add("--dry_run", action="store_true", help="report, and write nothing")
    options = vars(parser.parse_args(argv))
    save_dir, dry_run = options.pop("local_save_dir"), options["dry_run"]
    try:
        print(mix(options.pop("train"), save_dir, **options))
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot write to {save_dir} ({one_line(error)})", file=sys.stderr)
        return 1
    print("nothing written: --dry_run" if dry_run else f"wrote to {save_dir.expanduser()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
