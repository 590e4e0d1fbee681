#!/usr/bin/env bash
# Train: one process for each GPU, or on the CPU where there is none.
#
#   NGPU=2 CONFIG_FILE=./configs/debug_cpu.toml ./run_train.sh --training.steps 100
#
# Environment:
#   NGPU           processes on this machine (default 2)
#   CONFIG_FILE    TOML file with the options (default ./configs/debug_cpu.toml)
#   LOG_RANK       local ranks whose output is shown, separated by commas (default 0)
#   TORCHRUN_ARGS  more options for torchrun, such as "--max-restarts 3" or "--nnodes 2 --rdzv_endpoint host:29500"
#   PYTHON         the Python to use (default: that of .venv beside this script, else python3)
#
# Everything after the script's name goes to the trainer; --help lists its options.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [ -z "${PYTHON:-}" ]; then
    PYTHON="$here/.venv/bin/python"
    if [ ! -x "$PYTHON" ]; then
        PYTHON=python3
        if ! python3 -c 'import importlib.util as u, sys; sys.exit(u.find_spec("milepost") is None)' 2>/dev/null; then
            echo "error: milepost is not installed: run \`make setup\` in $here, or name a Python that has it in PYTHON" >&2
            exit 2
        fi
    fi
elif ! command -v "$PYTHON" >/dev/null; then
    echo "error: PYTHON=$PYTHON: there is no such program" >&2
    exit 2
fi
NGPU="${NGPU:-2}"
CONFIG_FILE="${CONFIG_FILE:-$here/configs/debug_cpu.toml}"
export LOG_RANK="${LOG_RANK:-0}"

# Without a GPU every rank computes on the CPU, and all of them together share its cores.
if ! nvidia-smi -L >/dev/null 2>&1; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi

# milepost.train.launch is torchrun, but for how it ends: no traceback for a mistake or for Ctrl-C, which saves first.
# SIGUSR1 to it saves at the next step. LOGLEVEL=INFO shows torchrun's own log.
# Port 0 lets two runs on one machine stay out of each other's way.
# shellcheck disable=SC2086  # TORCHRUN_ARGS is a list of words
exec "$PYTHON" -m milepost.train.launch \
    --nproc_per_node "$NGPU" --rdzv_backend c10d --rdzv_endpoint localhost:0 \
    --local-ranks-filter "$LOG_RANK" ${TORCHRUN_ARGS:-} \
    -- --job.config_file "$CONFIG_FILE" "$@"
