# make demo    trains AdamW and GaLore side by side, and says where the report is
# make test    all tests, doctests and notebooks
# make bench   optimizer steps, whole training steps and single operations timed
# make lint    style;  make types  annotations
# make clean   removes all that was made here, except runs/
#
# Each sets up .venv first if it has to. Settings go behind: PYTHON=python3.12, PRESET=smoke,
# WORKERS=8.

PYTHON = python3
VENV = .venv
PRESET = demo
WORKERS = 2

python := $(VENV)/bin/python

.PHONY: demo test bench lint types clean
# A step that failed is not taken for done.
.DELETE_ON_ERROR:

demo: $(VENV)/experiments
	$(python) -m experiments.compare --preset $(PRESET) --overwrite

test: $(VENV)/dev
	$(python) -m pytest -n $(WORKERS) --dist worksteal

bench: $(VENV)/experiments
	$(python) -m experiments.bench --out runs/bench
	$(python) -m experiments.bench --size tiny --tokens 4096 --rounds 11 --out runs/bench_training
	$(python) -m experiments.bench --size tiny --kernels --megabytes 64 --out runs/bench_kernels

lint: $(VENV)/dev
	$(python) -m ruff check .
	$(python) -m ruff format --check .

types: $(VENV)/dev
	$(python) -m pyrefly check --python-interpreter-path $(python)

clean:
	rm -rf .venv build dist *.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/experiments: pyproject.toml | $(python)
	@echo 'Installing packages into $(VENV); this takes some minutes, once.'
	$(python) -m pip install --quiet --disable-pip-version-check --editable '.[experiments]'
	@touch $@

$(VENV)/dev: pyproject.toml | $(python)
	@echo 'Installing packages into $(VENV); this takes some minutes, once.'
	$(python) -m pip install --quiet --disable-pip-version-check --editable '.[experiments,dev]'
	@touch $@ $(VENV)/experiments

$(python):
	@command -v $(PYTHON) > /dev/null || \
	  { echo '$(PYTHON) is not there; name a Python 3.11 or newer: make PYTHON=...'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  "Python 3.11 or newer is needed, but $(PYTHON) is %s; name another: make PYTHON=..." \
	  % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
