# The two commands of the README, `make quickstart` and `make test`, both from a bare clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# No telemetry and no hub traffic: everything the quickstart and the tests need is installed or made.
export HF_HUB_OFFLINE := 1
export AXOLOTL_DO_NOT_TRACK := 1
export DO_NOT_TRACK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: install quickstart dpo test test-distributed test-current lint format benchmark benchmark-step \
    benchmark-calibration benchmark-quantised clean

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

# All but the tests marked `full`.
test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Real processes under every engine: the core of it, which `make test` has too, and the rest.
test-distributed: install
	$(BIN)/python -m pytest -m "" tests/distributed $(PYTEST_ARGS)

# The core of the tests with the newest Axolotl that is supported, in an environment of its own
# (7 GB).
PYTHON_CURRENT ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12) python3.12)
CURRENT := $(addprefix tests/trainer_ext/,tuner $(addprefix test_,$(addsuffix .py, \
    calibration checkpoints distributed merging package peft_type report trainer trainer_forward \
    trl_kinds trl_quantised trl_reference trl_trainers versions))) \
    $(addprefix tests/distributed/test_,engines.py optim.py trl.py) \
    $(addprefix tests/axolotl_spft/test_,$(addsuffix .py,calibration_data commands engines lora_yaml \
    merge_command plugin_discovery preferences processes training_options))

test-current:
	$(MAKE) VENV=.venv-current PYTHON=$(PYTHON_CURRENT) install
	.venv-current/bin/python -m pytest $(CURRENT) $(PYTEST_ARGS)

benchmark: benchmark-step

benchmark-step: install
	$(BIN)/python benchmarks/step.py

benchmark-calibration: install
	$(BIN)/python benchmarks/calibration.py

# After the quickstart: SPFT over a 4-bit base beside QLoRA and LoftQ.
benchmark-quantised: install
	$(BIN)/python benchmarks/quantised.py

clean:
	rm -rf $(VENV) .venv-current quickstart/cache quickstart/output quickstart/output-dpo quickstart/result.json
