#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Start Ray on all nodes of a Slurm allocation, and a recipe on the first one.
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=1 --exclusive examples/multinode.sh examples/run_qwen2_5vl_gndpo.sh
#   sbatch ... examples/multinode.sh examples/run_internvl3_5_gndpo.sh trainer.total_epochs=2
#
# Settings of the recipe come from the environment, which sbatch passes on. The project, PYTHON's environment, the data and
# OUTPUT_DIR are on storage that all nodes see. NNODES and GPUS are those of the allocation.
set -euo pipefail
if [ $# = 0 ]; then echo "usage: sbatch [options] examples/multinode.sh RECIPE [OVERRIDE...]" >&2 && exit 2; fi
if [ -z "${SLURM_JOB_NODELIST:-}" ]; then
    echo "this script runs in a Slurm allocation: submit it with sbatch. Elsewhere, run 'ray start' on each node and the recipe" \
        "with NNODES on one of them" >&2
    exit 2
fi
PYTHON=${PYTHON:-python}
PORT=${RAY_PORT:-6379}
# Ray notes there which cluster runs on the node, and does not take it back when it is stopped. Other jobs, and whoever works
# there afterwards, have the usual folder. Short, because sockets lie in it.
export RAY_TMPDIR=${RAY_TMPDIR:-/tmp/ray-${SLURM_JOB_ID:-$$}}
mkdir -p "$RAY_TMPDIR"
# Only this job can use its Ray. Older releases ignore the token.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
START_UP_LIMIT_S=${START_UP_LIMIT_S:-300}
# Arguments of `ray start` on each node, such as --num-gpus where Ray does not find them.
read -r -a RAY_ARGUMENTS <<<"${RAY_ARGUMENTS:-}"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NNODES=${#nodes[@]}
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then export GPUS=${GPUS:-$SLURM_GPUS_ON_NODE}; fi
# Called in subshells only, which srun replaces, so that stopping them stops it.
on() { exec srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" "${@:2}"; }
ray_start() { on "$1" "$PYTHON" -m ray.scripts.scripts start --block --disable-usage-stats "${RAY_ARGUMENTS[@]}" "${@:2}"; }

head_ip=$(on "${nodes[0]}" "$PYTHON" -c 'import ray.util; print(ray.util.get_node_ip_address())')
steps=()
stop() { kill "${steps[@]}" 2>/dev/null || true; wait; }
trap stop EXIT

ray_start "${nodes[0]}" --head --node-ip-address="$head_ip" --port="$PORT" &
steps+=($!)
for node in "${nodes[@]:1}"; do
    ray_start "$node" --address="$head_ip:$PORT" &
    steps+=($!)
done

export RAY_ADDRESS=$head_ip:$PORT
"$PYTHON" - "$NNODES" "$START_UP_LIMIT_S" <<'PYTHON_END' &
import sys
import time

import ray

nodes, limit = int(sys.argv[1]), float(sys.argv[2])
deadline, alive = time.monotonic() + limit, 0
while alive < nodes:
    try:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="ERROR")
        alive = sum(node["Alive"] for node in ray.nodes())
    except ConnectionError:
        pass
    if time.monotonic() > deadline:
        sys.exit(f"after {limit:.0f} s, Ray runs on {alive} of {nodes} nodes; see above for what `ray start` says there")
    time.sleep(1)
print(f"Ray runs on {alive} nodes")
PYTHON_END
all_nodes=$!
# Whichever ends first: this wait, or a node's Ray, which would otherwise be waited for.
wait -n || exit 1
if kill -0 "$all_nodes" 2>/dev/null; then echo "Ray has ended on one of the nodes; see above for the reason" >&2 && exit 1; fi
bash "$@"
