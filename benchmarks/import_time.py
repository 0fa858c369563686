# SPDX-License-Identifier: Apache-2.0
"""`import verl` with this plugin against without it, each in new interpreters, in turns.

    python benchmarks/import_time.py [--json OUT] [--rounds 10]

Target: at most 5 % or 0.2 s slower, whichever is more.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from _common import machine, medians, print_table, time_in_turns, write_json


def import_verl(plugins: str) -> None:
    env = os.environ | {"VERL_USE_EXTERNAL_PLUGINS": plugins}
    subprocess.run([sys.executable, "-c", "import verl"], env=env, check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()

    rivals = {"without": lambda: import_verl("none"), "with_plugin": lambda: import_verl("auto")}
    samples = time_in_turns(rivals, args.rounds, before=lambda: None)
    seconds = medians(samples)
    figures = {
        "machine": machine(),
        "rounds": args.rounds,
        "seconds": seconds,
        "seconds_min": {name: min(values) for name, values in samples.items()},
        "with_plugin_vs_without": seconds["with_plugin"] / seconds["without"],
        "seconds_more": seconds["with_plugin"] - seconds["without"],
    }
    write_json(args.json, figures)
    rows = [[name, value, min(samples[name])] for name, value in seconds.items()]
    print_table(f"import verl, {args.rounds} rounds", ["plugin", "median s", "least s"], rows)
    print(f"ratio {figures['with_plugin_vs_without']:.3f}, {figures['seconds_more']:+.3f} s")


if __name__ == "__main__":
    main()
