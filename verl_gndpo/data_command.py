# SPDX-License-Identifier: Apache-2.0
"""Run the command `verl-gndpo data`: list the data sets, convert one, or mix converted ones.

A converter runs the same code here as in `python data_prep/<name>.py`, so this module imports neither torch nor verl.
"""

from __future__ import annotations

import argparse
import importlib

from verl_gndpo.conversion import main as convert
from verl_gndpo.conversion.command import first_line
from verl_gndpo.conversion.sets import converters, markdown_table, plain_table

PROG = "verl-gndpo data"


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: `list`, `mix` or the name of a converter, then its own arguments.

    Returns:
        The exit code of the converter's script, or of `mix`.

    Raises:
        SystemExit: argparse's code, after `--help` (0) or wrong arguments (2).
    """
    mix = importlib.import_module("verl_gndpo.data_prep.mix")
    modules = converters()
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Convert published data sets to verl's parquet, and mix them.",
        epilog=f"`{PROG} COMMAND --help` shows the options of a command.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    listing = commands.add_parser("list", help="print the table of data sets: hub id, size, licence and permitted use")
    listing.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    for name, module in {"mix": mix, **modules}.items():
        commands.add_parser(name, add_help=False, help=first_line(module.__doc__))
    command = parser.parse_args(argv[:1] or ["--help"]).command
    if command == "list":
        markdown = parser.parse_args(argv).markdown
        print(markdown_table() if markdown else plain_table())
        return 0
    prog = f"{PROG} {command}"
    if command == "mix":
        code: int = mix.main(argv[1:], prog)
        return code
    return convert(modules[command].RECIPE, modules[command].__doc__, argv[1:], prog)
