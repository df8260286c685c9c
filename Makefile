# The two commands of the README, `make quickstart` and `make test`, both from a bare clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# No telemetry and no hub traffic: everything the quickstart and the tests need is installed or made.
export HF_HUB_OFFLINE := 1
export AXOLOTL_DO_NOT_TRACK := 1
export DO_NOT_TRACK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: install quickstart dpo test test-distributed lint format benchmark benchmark-step \
    benchmark-calibration benchmark-quantised gpu-pack gpu-rehearsal clean

# The stamp is written last: an interrupted install is not taken for a finished one.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else \
	    "make install needs Python 3.11 (constraints.txt was tested with it), found %d.%d; \
	try: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed \
	    -c constraints.txt -e ".[dev]"
	touch $@

install: $(VENV)/.installed

quickstart: install
	$(BIN)/python quickstart/run.py

# After the quickstart's model: DPO on pairs derived from its data.
dpo: install
	$(BIN)/python quickstart/dpo.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# All but the tests marked `full`.
test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Real processes under every engine: the core of it, which `make test` has too, and the rest.
test-distributed: install
	$(BIN)/python -m pytest -m "" tests/distributed $(PYTEST_ARGS)

benchmark: benchmark-step

benchmark-step: install
	$(BIN)/python benchmarks/step.py

benchmark-calibration: install
	$(BIN)/python benchmarks/calibration.py

# After the quickstart: SPFT over a 4-bit base beside QLoRA and LoftQ.
benchmark-quantised: install
	$(BIN)/python benchmarks/quantised.py

# What a GPU machine lacks, into .gpu-carried: benchmarks/GPU.md.
gpu-pack: install
	$(BIN)/python benchmarks/gpu_model.py pack

# An environment with what the GPU machine has and nothing else, with its Python where pyenv has it.
GPU_VENV := .venv-gpu
GPU_PYTHON ?= $(or $(lastword $(sort $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3))),$(PYTHON))

$(GPU_VENV)/.installed: benchmarks/gpu-requirements.txt
	test -x $(GPU_VENV)/bin/python || $(GPU_PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet -r benchmarks/gpu-requirements.txt
	touch $@

# Every stage of benchmarks/gpu.sh on the CPU, at tiny sizes and from the packed parts.
gpu-rehearsal: gpu-pack $(GPU_VENV)/.installed
	rm -rf .gpu-rehearsal .gpu-carried/cache
	PYTHON=$(GPU_VENV)/bin/python bash benchmarks/gpu.sh --device cpu --output .gpu-rehearsal

clean:
	rm -rf $(GPU_VENV) .gpu-carried .gpu-rehearsal
	rm -rf $(VENV) quickstart/cache quickstart/output quickstart/output-dpo quickstart/result.json
