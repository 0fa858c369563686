# SPDX-License-Identifier: Apache-2.0
"""The command line that all converters have in common."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path

from .errors import ConversionError, one_line
from .row import FOREIGN_PLACEHOLDERS, IMAGE_PLACEHOLDER
from .source import Recipe, open_source
from .verify import import_reader, verify
from .write import Report, check_dropped, report_table, write_split

INSTRUCTION = (
    "Work through the problem inside <think> </think> tags first. "
    "After the closing tag, state only the final answer, written as \\boxed{answer}."
)


def convert(
    source: str | None,
    save_dir: Path,
    recipe: Recipe,
    instruction: str = INSTRUCTION,
    max_dropped: float = 1.0,
    skip_verify: bool = False,
    model: str | None = None,
) -> list[Report]:
    """Converts a source into `<save_dir>/<split>.parquet`, one file a split.

    Each file is replaced in one step, and none before all splits have been converted, are within `max_dropped` (a
    fraction of the split's rows) and have been read back.

    Raises:
        ConversionError: the source cannot be read, too much was dropped, or a row does not come back from verl.
        OSError: `save_dir` cannot be written.
    """
    splits = open_source(source, recipe)
    save_dir = save_dir.expanduser().resolve()
    if any(split.folder == save_dir for split in splits):
        raise ConversionError(f"{save_dir} is the source itself: choose another --local_save_dir.")
    save_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{recipe.name}-", dir=save_dir) as staging:
        staged = [(Path(staging) / f"{split.name}.parquet", split) for split in splits]
        reports = [write_split(split, recipe, instruction, path) for path, split in staged]
        print(report_table(reports))
        for report in reports:
            check_dropped(report, max_dropped)
        if skip_verify:
            print("NOT read back through verl: --skip_verify")
        else:
            _verify_all([path for path, _ in staged], reports, Path(staging) / "cache", model)
        for path, _ in staged:
            os.replace(path, save_dir / path.name)
            print(f"wrote {save_dir / path.name}")
    return reports


def _verify_all(paths: list[Path], reports: list[Report], cache: Path, model: str | None) -> None:
    print("reading back through verl's RLHFDataset (importing verl takes a while)", file=sys.stderr)
    reader, why = import_reader()
    if reader is None:
        print(f"NOT read back through verl: it cannot be imported here ({why})")
        return
    for path, report in zip(paths, reports, strict=True):
        checked = verify(reader, path, report, cache, model)
        print(f"{report.split}: {report.written} rows came back from verl ({checked})")


def _fraction(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _instruction(text: str) -> str:
    if marks := [mark for mark in (IMAGE_PLACEHOLDER, *FOREIGN_PLACEHOLDERS) if mark in text]:
        raise argparse.ArgumentTypeError(f"{', '.join(marks)} in the instruction would be read as a placeholder")
    return text


def main(recipe: Recipe, description: str, argv: list[str] | None = None) -> int:
    """Command line of a converter. Returns the exit code: 0, or 1 with one line on stderr that says why."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--local_dataset_path", help=f"local copy (file or folder) or hub id; when not given, {recipe.hub_id}"
    )
    parser.add_argument("--local_save_dir", default=f"~/data/{recipe.name}", help="folder for the parquet files")
    parser.add_argument("--instruction", type=_instruction, default=INSTRUCTION, help="text put after each question")
    parser.add_argument(
        "--max_dropped",
        type=_fraction,
        default=1.0,
        help="fraction of a split that may be dropped before it fails (default: any, but not all)",
    )
    parser.add_argument("--skip_verify", action="store_true", help="do not read the result back through verl")
    parser.add_argument("--model", help="model whose tokenizer and processor the reading back uses")
    args = parser.parse_args(argv)
    try:
        convert(
            args.local_dataset_path,
            Path(args.local_save_dir),
            recipe,
            args.instruction,
            args.max_dropped,
            args.skip_verify,
            args.model,
        )
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot write to {args.local_save_dir} ({one_line(error)})", file=sys.stderr)
        return 1
    return 0
