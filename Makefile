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
    benchmark-calibration benchmark-quantised clean

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

clean:
	rm -rf $(VENV) quickstart/cache quickstart/output quickstart/output-dpo quickstart/result.json
