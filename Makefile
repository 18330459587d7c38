# make demo | test | check | install, on a machine with Python >= 3.11 and nothing else.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

# Debian's: a real Slurm to test on, and a linter of shell scripts.
PACKAGES := slurmd slurmctld slurm-client munge shellcheck

.PHONY: help install demo test test-long packages chaos gpu gpu-kit aot check format clean
help:
	@echo "make demo     the whole chain on two cores: text, shards, training, resume, export, generation"
	@echo "make test     the tests"
	@echo "make test-long  every layout for longer and in all dtypes, thousands of drawn ones; half an hour"
	@echo "make packages  Debian packages (as root) without which the tests on a real Slurm are skipped"
	@echo "make chaos    a small run killed at 20 moments, starved of disk, robbed of files; SEED=n draws others"
	@echo "make gpu      check and measure everything on a GPU, by the machine's own torch; GPU='--only scan'"
	@echo "make gpu-kit  the wheels that make gpu needs where there is no network; MAMBA_SSM=1 adds a rival"
	@echo "make aot      compile every kernel for every architecture, and write what each takes"
	@echo "make check    formatting, lint, types, import floors"
	@echo "make format   let ruff format and mend what it can"
	@echo "make install  only set up $(VENV); on a GPU machine give CONSTRAINTS=your-file.txt"

install: $(READY)

$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "plait needs Python 3.11 or later: make PYTHON=python3.12")'
	@echo "setting up $(VENV) with the versions of $(CONSTRAINTS) (once; a minute or two)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first: where torch is already there, nothing pulls in another build of it.
	@$(PIP) install -c $(CONSTRAINTS) torch
	@$(PIP) install -c $(CONSTRAINTS) -e '.[dev]'
	@# pyright follows no import hooks; this link lets it see the package under its name.
	@mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/plait
	@touch $@

demo: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/demo.sh

test: $(READY)
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder

test-long: $(READY)
	$(BIN)/python -m pytest -m long --timeout 3600

packages:
	apt-get update -qq
	apt-get install -qq -y --no-install-recommends $(PACKAGES)

chaos: $(READY)
	$(BIN)/python tests/chaos/chaos.py --seed $(or $(SEED),0) --write

# Not by $(VENV): the machine's own Python, with the torch that was made for its GPU.
gpu:
	cd benchmarks && $(PYTHON) -m gpu $(GPU)

gpu-kit: $(READY)
	cd benchmarks && ../$(BIN)/python -m gpu.kit $(if $(MAMBA_SSM),--mamba-ssm) $(KIT)

aot: $(READY)
	$(BIN)/python benchmarks/aot.py --write

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
