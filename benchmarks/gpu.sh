#!/usr/bin/env bash
# All tables of one CUDA GPU in one go of less than ten minutes: the step at Llama-3.2-1B's and at
# Llama-3.1-8B's shape in bf16, with and without activation checkpointing, where the step's time
# goes, and the calibration. Needs torch (CUDA), transformers, peft, accelerate and safetensors,
# and no network: weights and tokens are random.
#
#   bash benchmarks/gpu.sh [OUTPUT_DIR]      # default: benchmarks/results
#   PYTHON=... bash benchmarks/gpu.sh        # default: python3
#
# The most valuable table comes first. Each part has a limit of its own, and one that fails or
# exceeds it does not keep the others from running. Estimates are for an H100 with 80 GB.
set -u
cd "$(dirname "$0")/.."
output=${1:-benchmarks/results}
python=${PYTHON:-python3}
# The packages of this clone; no model hub. Segments that grow leave no unusable gaps.
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
failed=0

run() { # run SECONDS SCRIPT OPTION...
    local limit=$1 script=$2
    shift 2
    timeout "$limit" "$python" "benchmarks/$script" --device cuda --dtype bf16 \
        --output-dir "$output" "$@" || {
        echo "failed or took more than $limit s: $script $*" >&2
        failed=1
    }
}

# The first import may read gigabytes from a cold disk.
timeout 60 "$python" -c 'import torch, trainer_ext; assert torch.cuda.is_available(), "no GPU"' || {
    echo "$python cannot import trainer_ext and torch with CUDA; nothing was measured" >&2
    exit 1
}

# 4096 tokens a batch: enough that the GPU computes rather than waits for Python.
one_b=(--size 1b --batch-size 4 --seq-len 1024)
# 1024 tokens a batch: frozen, LoRA and both forwards of SPFT together hold two copies of the base
# (32 GB), 15 GB of adapters and AdamW state, and a step of LoRA adds about 15 GB. DoRA and SHiRA
# make dense copies of the base weights in every step, full fine-tuning needs 64 GB for itself,
# and LoRA-FA inverts a matrix for each of 224 layers in every step: they are left out.
eight_b=(--size 8b --batch-size 1 --seq-len 1024
    --methods frozen spft_write_through spft_delta lora)

# 60 + 150 + 90 + 85 + 60 + 50 + 75 = 570 s at most. A step run starts for about 30 s, so a time
# limit of its own ends its rounds early rather than losing them.
run 150 step.py "${one_b[@]}" --repeats 20 --time-limit 70                 # about 110 s, 45 GB
run 90 step.py "${eight_b[@]}" --repeats 20 --time-limit 30                # about 60 s, 65 GB
run 85 step.py "${one_b[@]}" --repeats 10 --time-limit 25 --checkpointing \
    --methods frozen spft_write_through spft_delta lora dora miss shira full   # about 60 s, 40 GB
run 60 step.py "${eight_b[@]}" --repeats 10 --time-limit 15 --checkpointing    # about 50 s, 60 GB
run 50 step_profile.py "${one_b[@]}" --repeats 5                           # about 35 s, 20 GB
# zo_taylor's forwards take most of a round, hence few rounds and directions.
run 75 calibration.py "${one_b[@]}" --repeats 3 --zo-directions 2          # about 60 s, 30 GB
exit $failed
