# SPDX-License-Identifier: Apache-2.0
"""The stability study: which signal to use, and when.

    python -m benchmarks.stability                       # all of it: less than 2 hours on two cores
    python -m benchmarks.stability --smoke               # that everything runs: about 4 minutes
    python -m benchmarks.stability --tables-only --out docs/study    # tables and plots from results that are there

Killed and started again, it goes on where it was. plan.py says what is compared, docs/study.md what came of it.
"""

import argparse
import time
from pathlib import Path

from benchmarks.stability import analyse, plan, quality, run

SMOKE = plan.Round(
    ours="log_odds_opd",
    arms=("opd", "gndpo", "full_kl", "opd_gain_matched", "log_odds_opd"),
    seeds=(0, 1),
    selection_seeds=(1000,),
    # 3e-4 learns faster, but eight steps of it end anywhere: they close 0.28 to 1.00 of the gap.
    adamw_rates=(3e-5, 1e-4),
    sgd_rates=(),
)
QUALITY_REGIMES = ("clean", "near convergence", "outliers 5 %", "outliers 20 %", "sharp teacher")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/stability"), help="folder of models and results")
    parser.add_argument("--tables", type=Path, help="folder of tables and plots (default: --out)")
    parser.add_argument("--smoke", action="store_true", help="few arms, one regime, eight steps")
    parser.add_argument("--tables-only", action="store_true", help="train nothing")
    args = parser.parse_args()
    began = time.monotonic()
    if args.tables_only:
        path = next((args.out / name for name in ("runs.jsonl", "runs.jsonl.gz") if (args.out / name).exists()), None)
        if path is None:
            parser.error(f"{args.out} has no runs.jsonl")
    elif args.smoke:
        path = run.run_study(args.out, SMOKE, regimes=("clean",), steps=8)
        quality.measure(args.out, ("clean",))
    else:
        for plans in plan.ROUNDS.values():
            path = run.run_study(args.out, plans)
        quality.measure(args.out, QUALITY_REGIMES)
    tables = args.tables or args.out
    for title, frame in analyse.analyse(path, tables, {"smoke": SMOKE} if args.smoke else plan.ROUNDS).items():
        print(f"\n{title}\n{frame.to_string(float_format='{:.3f}'.format)}")
    print(f"\n{path}; tables.md and plots in {tables}; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
