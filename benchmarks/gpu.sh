#!/usr/bin/env bash
# Everything that a CUDA GPU has to show, stage by stage: benchmarks/GPU.md says what and how.
#
#   bash benchmarks/gpu.sh                        # at most ten minutes; call again for the rest
#   bash benchmarks/gpu.sh --stages smoke correct # some of it
#   bash benchmarks/gpu.sh --device cpu           # the rehearsal: the same stages at tiny sizes
#   PYTHON=... bash benchmarks/gpu.sh             # default: python3
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_stages.py" "$@"
