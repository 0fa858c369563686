#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Applies this folder's patches to a verl checkout, or to the folder that an installed or unpacked verl lies in.
#
#   patches/apply.sh CHECKOUT            apply what is missing
#   patches/apply.sh CHECKOUT --check    change nothing; say what would happen
#
# Exit status: 0 all patches are (or with --check: would be) in, 1 a patch does not fit, 2 wrong use or wrong version.
set -euo pipefail

fail() {
    local status=$1
    shift
    echo "apply.sh: $*" >&2
    exit "$status"
}

usage="usage: patches/apply.sh CHECKOUT [--check]   (CHECKOUT is the folder that holds verl/)"
checkout=""
check_only=false
for argument in "$@"; do
    case $argument in
        --check) check_only=true ;;
        -*) fail 2 "unknown option $argument; $usage" ;;
        *)
            [[ -z $checkout ]] || fail 2 "more than one CHECKOUT; $usage"
            checkout=$argument
            ;;
    esac
done
[[ -n $checkout ]] || fail 2 "$usage"
command -v git >/dev/null || fail 2 "git is not on PATH, and 'git apply' does the work here"

patches=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
[[ -f $checkout/verl/version/version ]] || fail 2 "$checkout is no verl checkout: it has no verl/version/version"
cd "$checkout"
version=$(tr -d '[:space:]' <verl/version/version)
[[ -d $patches/verl-$version ]] ||
    fail 2 "no patches for verl $version; there are some for: $(cd "$patches" && echo verl-*/ | tr -d /)"

# Inside another repository (a virtual environment, say) git would take paths relative to that repository's root and
# skip all of them without a word. The ceiling makes it look for a repository in CHECKOUT only.
GIT_CEILING_DIRECTORIES=$(dirname "$(pwd -P)")
export GIT_CEILING_DIRECTORIES
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE

# A wheel has no tests/, and an installed verl shares its folder with other packages.
git_apply=(git apply)
[[ -d tests ]] || git_apply+=("--exclude=tests/*")

pending=()
for patch in "$patches/verl-$version"/*.patch; do
    name=$(basename "$patch")
    if "${git_apply[@]}" --reverse --check "$patch" 2>/dev/null; then
        echo "already applied: $name"
    elif problem=$("${git_apply[@]}" --check "$patch" 2>&1); then
        pending+=("$patch")
        if $check_only; then echo "would apply: $name"; fi
    else
        fail 1 "$name does not fit verl $version in $checkout; nothing was changed. git says:"$'\n'"$problem"
    fi
done
if $check_only || [[ ${#pending[@]} -eq 0 ]]; then exit 0; fi

# One stream: git checks every file of every patch before it writes the first.
cat "${pending[@]}" | "${git_apply[@]}" || fail 1 "git could not apply the patches together; nothing was changed"
for patch in "${pending[@]}"; do echo "applied: $(basename "$patch")"; done
