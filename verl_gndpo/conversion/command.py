# SPDX-License-Identifier: Apache-2.0
"""The command line that all converters share."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from .errors import ConversionError, one_line
from .pipeline import convert
from .prompt import STYLES
from .recipe import Recipe


def main(recipe: Recipe, description: str | None, argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command line of a converter.

    Args:
        recipe: the converter's data set.
        description: the converter's docstring; its first line heads `--help`.
        argv: arguments; None takes the process's own.
        prog: name of the command in `--help`; None for the script's name.

    Returns:
        The exit code: 0, or 1 after one line on stderr that says why.
    """
    options = vars(_parser(recipe, description, prog).parse_args(argv))
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


def first_line(description: str | None) -> str:
    """Return the first line of a docstring; "" when there is none."""
    return (description or "").strip().partition("\n")[0]


def _parser(recipe: Recipe, description: str | None, prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=first_line(description), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--local_dataset_path", help=f"local copy (file or folder) or hub id; when not given, {recipe.hub_id}")
    add("--local_save_dir", default=f"~/data/{recipe.name}", help="folder for the parquet files")
    add("--image_path", type=Path, help="folder or zip archive of the images, when they are not beside the source")
    add("--split", nargs="+", help="convert only these splits")
    add("--limit", type=_positive, help="at most this many rows of each split")
    add("--seed", type=int, help="draw the rows of --limit at random; without it, the first ones")
    add("--num_proc", type=_positive, default=min(os.cpu_count() or 1, 8), help="worker processes")
    add("--prompt_style", default="think_boxed", help=f"{', '.join(STYLES)}, or a file with a template")
    add("--max_dropped", type=_fraction, default=0.01, help="fraction of a split that may be dropped before it fails")
    add("--max_prompt_length", type=_positive, help="drop prompts of more tokens than this; needs --model")
    add("--rows_per_shard", type=_positive, help="write several files per split, with this many rows each")
    add("--model", help="model whose tokenizer and processor measure the prompts and read them back")
    add("--skip_verify", action="store_true", help="do not measure the prompts or read them back through verl")
    add("--preview", type=_positive, default=0, metavar="N", help="write preview.html with N rows of each split")
    add("--dry_run", action="store_true", help="do everything except writing the parquet files")
    if recipe.keep:
        add("--include_unlicensed", action="store_true", help="keep rows that are flagged as not licensed")
    return parser


def _fraction(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)
