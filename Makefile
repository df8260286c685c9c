# The two commands of the README, `make quickstart` and `make test`, both from a bare clone.
PYTHON ?= python3
# where pyenv has one
PYTHON_312 ?= $(lastword $(sort $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12)))
VENV := .venv
BIN := $(VENV)/bin
# No telemetry and no hub traffic: everything the quickstart and the tests need is installed or made.
export HF_HUB_OFFLINE := 1
export AXOLOTL_DO_NOT_TRACK := 1
export DO_NOT_TRACK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: install quickstart dpo test test-distributed test-current lint format benchmark \
    benchmark-step benchmark-calibration benchmark-quantised gpu-pack gpu-rehearsal clean

# The versions that were run under an interpreter are in the constraints file of its name. The stamp
# is written last: an interrupted install is not taken for a finished one.
$(VENV)/.installed: pyproject.toml $(wildcard constraints-*.txt)
	@python=$(BIN)/python; test -x $$python || python=$(PYTHON); set -e; \
	file=$$($$python -c 'import sys; print("constraints-%d.%d.txt" % sys.version_info[:2])'); \
	test -f $$file || { echo "make install needs Python 3.11 or 3.12: there is no $$file for" \
	    "$$python; try: make VENV=.venv-3.11 PYTHON=python3.11 ..." >&2; exit 1; }; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	echo "installing into $(VENV) by $$file"; \
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c $$file -e ".[dev]"
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

# All but the tests marked `full`, file by file in so many processes at a time, in the order of
# tests/conftest.py.
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: lint
	$(BIN)/python $(PYTEST) $(PYTEST_ARGS)

# Real processes under every engine: the core of it, which `make test` has too, and the rest.
test-distributed: install
	$(BIN)/python $(PYTEST) -m "" tests/distributed $(PYTEST_ARGS)

# The core of the tests with the newest Axolotl that is supported, in an environment of its own
# (7 GB).
CURRENT := tests/trainer_ext/tuner tests/trainer_ext/calibration/test_run.py \
    tests/trainer_ext/checkpoints tests/trainer_ext/distributed tests/trainer_ext/export \
    tests/trainer_ext/config/test_peft_type.py tests/trainer_ext/report \
    tests/trainer_ext/training tests/trainer_ext/test_package.py \
    tests/trainer_ext/test_versions.py tests/distributed/test_engines.py \
    tests/distributed/test_optim.py tests/distributed/test_trl.py \
    tests/axolotl_spft/test_calibration_data.py tests/axolotl_spft/test_commands.py \
    tests/axolotl_spft/test_engines.py tests/axolotl_spft/test_lora_yaml.py \
    tests/axolotl_spft/test_merge_command.py tests/axolotl_spft/test_plugin_discovery.py \
    tests/axolotl_spft/test_preferences.py tests/axolotl_spft/test_processes.py \
    tests/axolotl_spft/test_training_options.py

test-current:
	$(MAKE) VENV=.venv-current PYTHON=$(or $(PYTHON_312),python3.12) install
	.venv-current/bin/python $(PYTEST) $(CURRENT) $(PYTEST_ARGS)

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

$(GPU_VENV)/.installed: benchmarks/gpu-requirements.txt
	test -x $(GPU_VENV)/bin/python || $(or $(PYTHON_312),$(PYTHON)) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet -r benchmarks/gpu-requirements.txt
	touch $@

# Every stage of benchmarks/gpu.sh on the CPU, at tiny sizes and from the packed parts.
gpu-rehearsal: gpu-pack $(GPU_VENV)/.installed
	rm -rf .gpu-rehearsal .gpu-carried/cache
	PYTHON=$(GPU_VENV)/bin/python bash benchmarks/gpu.sh --device cpu --output .gpu-rehearsal
	rm -rf .gpu-carried/cache

clean:
	rm -rf $(VENV) .venv-current $(GPU_VENV) .gpu-carried .gpu-rehearsal quickstart/cache \
	    quickstart/output quickstart/output-dpo quickstart/result.json
