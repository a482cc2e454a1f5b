# The two commands: `make study` runs the main job and shows its report, `make test` runs the tests.
# Both prepare .venv first and need nothing but Python >= 3.11 and a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The venv stands ready once this file is newer than what it was made from.
READY := $(VENV)/.ready

.PHONY: setup study fast test slow lint tables figures docs peers clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

study: setup
	$(BIN)/midflight study quick
	$(BIN)/midflight report quick

# The quick ones of the core's tests, in a minute.
FAST := tests/space tests/gradcheck tests/parity tests/tuner tests/oracles/test_rules.py tests/oracles/test_blocks.py \
	tests/oracles/test_solvers.py
SLOWER := tests/tuner/test_population.py tests/tuner/test_horizon.py tests/tuner/test_diagnostics.py

fast: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(FAST) $(addprefix --ignore=,$(SLOWER))

test: setup lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"
	$(BIN)/python -m pytest -n 2 --dist loadfile docs

# What takes minutes by itself: more kills and interrupts, a Ray cluster that asks for a token.
slow: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

lint: setup
	$(BIN)/ruff check src tests examples benchmarks dev docs
	$(BIN)/ruff format --check src tests examples benchmarks dev docs
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# The tables and figures of the pages, from the stored rows; a test compares the tables.
tables: setup
	$(BIN)/cog -rP -I docs -p 'from rows import *' docs/benchmarks/*.md

figures: setup
	for command in any_start 'any_start --four' cash equal_compute finetune harm merger mixture multitask noisy_labels \
		recipes scaling short_horizon tables; do \
		set -- $$command; $(BIN)/python benchmarks/$$1.py $$2 --figure > /dev/null || exit 1; done

# The site, in docs/_build/html; it runs the tutorials and examples, and takes some minutes.
docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo open docs/_build/html/index.html

# The libraries beside which benchmarks/overhead.py measures; two refuse a current Python in their metadata only.
peers: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peers]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps torchopt==0.7.3
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python betty-ml==0.2.1

clean:
	rm -rf $(VENV) runs
