#!/usr/bin/env bash
# Costs of a training step and of a calibration on one CUDA GPU: Llama-3.2-1B's shape in bf16, with
# and without activation checkpointing. Needs torch (CUDA), transformers, peft, accelerate and
# safetensors, and no network: weights and tokens are random.
#
#   bash benchmarks/gpu.sh [OUTPUT_DIR]      # default: benchmarks/results
#
# Takes less than ten minutes: each run has a limit of its own, and one that fails or exceeds it
# does not keep the others from running. Needs about 60 GiB of GPU memory at most, by estimate.
set -u
cd "$(dirname "$0")/.."
output=${1:-benchmarks/results}
# The packages of this clone; no model hub.
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1

# 4096 tokens a batch: enough that the GPU computes rather than waits for Python.
workload=(--device cuda --size 1b --dtype bf16 --batch-size 4 --seq-len 1024 --output-dir "$output")
failed=0

run() { # run SECONDS SCRIPT OPTION...
    local limit=$1 script=$2
    shift 2
    timeout "$limit" python "benchmarks/$script" "${workload[@]}" "$@" || {
        echo "failed or took more than $limit s: $script $*" >&2
        failed=1
    }
}

# 195 + 195 + 90 + 90 s = 570 s at most. zo_taylor takes most of a round, hence few rounds.
run 195 calibration.py --repeats 5
run 195 calibration.py --repeats 5 --checkpointing
run 90 step.py
run 90 step.py --checkpointing
exit $failed
