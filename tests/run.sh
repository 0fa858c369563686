#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Lint and types, then the three levels of tests, on a machine without a GPU. Sets up .venv unless PYTHON names an environment.
#
#   bash tests/run.sh                        # everything
#   bash tests/run.sh lint                   # lint and types alone
#   bash tests/run.sh tests/unit             # lint and one level: unit, integration or end_to_end
#   bash tests/run.sh tests/unit -k routing  # every other argument goes to pytest
#   VERL=0.9.0 bash tests/run.sh tests/unit  # with that release of verl
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup.sh

if [ -n "${VERL:-}" ]; then
    release=$(dirname "$(dirname "$PYTHON")")/verl-$VERL
    [ -d "$release" ] || "$PYTHON" -m pip install --quiet --no-deps --target "$release" "verl==$VERL"
    # It hides the installed release.
    export PYTHONPATH=$release${PYTHONPATH:+:$PYTHONPATH}
fi

options=() unit=() integration=() end_to_end=() only_lint=no
for argument in "$@"; do
    case $argument in
        lint) only_lint=yes ;;
        tests/unit | tests/unit/*) unit+=("$argument") ;;
        tests/integration | tests/integration/*) integration+=("$argument") ;;
        tests/end_to_end | tests/end_to_end/*) end_to_end+=("$argument") ;;
        *) options+=("$argument") ;;
    esac
done
if [ $only_lint = no ] && [ $((${#unit[@]} + ${#integration[@]} + ${#end_to_end[@]})) = 0 ]; then
    unit=(tests/unit) integration=(tests/integration) end_to_end=(tests/end_to_end)
fi

verdict=PASSED
tests_ran=no
summary=()
minutes() { printf '%d min %02d s' $(($1 / 60)) $(($1 % 60)); }

# step NAME COMMAND...: run one step, and add its result and its time to the summary. Exit code 5 is pytest's for "no test
# selected", as -k leaves it in some levels.
step() {
    local name=$1 begin=$SECONDS code=0 result=passed
    shift
    "$@" || code=$?
    if [ $code = 5 ]; then
        result="no test selected"
    elif [ $code != 0 ]; then
        result="FAILED (exit code $code)" verdict=FAILED
    fi
    if [ "$name" != lint ] && [ $code != 5 ]; then tests_ran=yes; fi
    summary+=("$(printf '%-11s %12s  %s' "$name" "$(minutes $((SECONDS - begin)))" "$result")")
    echo "== ${summary[-1]}"
}

lint() { "$PYTHON" -m ruff check . && "$PYTHON" -m ruff format --check . && "$PYTHON" -m mypy; }
run_pytest() { "$PYTHON" -m pytest --durations=10 "$@"; }
# The unit tests run in one process per core, at most four, each with one thread.
run_unit() { OMP_NUM_THREADS=1 run_pytest -n logical --maxprocesses 4 --dist loadfile "$@"; }

# The integration tests take more memory and start processes of their own: two at a time.
run_integration() { OMP_NUM_THREADS=1 run_pytest -n logical --maxprocesses 2 --dist loadfile "$@"; }

step lint lint
if [ ${#unit[@]} != 0 ]; then step unit run_unit "${unit[@]}" "${options[@]}"; fi
if [ ${#integration[@]} != 0 ]; then step integration run_integration "${integration[@]}" "${options[@]}"; fi
# One at a time: two runs of the real loop would save a quarter of the time, but Ray gives up a start that takes longer than
# 30 seconds.
if [ ${#end_to_end[@]} != 0 ]; then step end_to_end run_pytest "${end_to_end[@]}" "${options[@]}"; fi
if [ $only_lint = no ] && [ $tests_ran = no ]; then
    echo "no test was selected: ${options[*]}" >&2
    verdict=FAILED
fi

printf '\n'
printf '%s\n' "${summary[@]}"
echo "$verdict in $(minutes $SECONDS)"
[ $verdict = PASSED ]
