#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Compare signals over seeds with any recipe, and draw one report: a run for each signal and seed, one after the other.
#
#   bash examples/compare_signals.sh
#   SIGNALS="gndpo log_odds_opd" SEEDS="1 2 3 4 5" RECIPE=examples/run_internvl3_5_gndpo.sh bash examples/compare_signals.sh
#
# A run that has finished is not repeated, and one that was interrupted goes on from its checkpoint. The seed decides the
# order of the data; the models' answers are sampled anew in each run.
set -euo pipefail
SIGNALS=${SIGNALS:-gndpo opd log_odds_opd}
SEEDS=${SEEDS:-1 2 3}
RECIPE=${RECIPE:-$(dirname "${BASH_SOURCE[0]}")/run_qwen2_5vl_gndpo.sh}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/compare_signals}

runs=()
for seed in $SEEDS; do
    for signal in $SIGNALS; do
        out=$OUTPUT_DIR/$signal-seed$seed
        runs+=("$signal=$out")
        [ ! -e "$out/finished" ] || continue
        echo "== $signal, seed $seed: $out"
        # verl overwrites its log when a run is resumed. A killed run may have left its last line unfinished.
        log=$out/metrics.jsonl
        if [ -s "$log" ]; then { cat "$log" && echo; } >>"$log.before"; fi
        # An override, because a recipe may have a choice of its own for the estimator.
        OUTPUT_DIR=$out bash "$RECIPE" ++data.seed="$seed" trainer.resume_mode=auto "$@" algorithm.adv_estimator="$signal"
        if [ -e "$log.before" ]; then cat "$log" >>"$log.before" && mv "$log.before" "$log"; fi
        touch "$out/finished"
    done
done
"${PYTHON:-python}" -m verl_gndpo.cli report "${runs[@]}" --out "$OUTPUT_DIR/report"
