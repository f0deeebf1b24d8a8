# Needs Python 3.11 or newer, make and a C compiler.
#   make train    train a small gpt-oss on the sample corpus, and export it
#   make check    ruff, format, mypy and the fast tests
#   make test     all tests but the slow ones
#   make faults   every fault case, and the table in docs/reliability.md
#   make gpu      ten minutes of checks and measurements on a machine with a GPU;  make gpu-wheels   wheels for an offline one
#   make bench    all benchmarks;  make prove   slow proofs;  make corpus   a real corpus
PYTHON ?= python3
VENV   := .venv
TEST_WORKERS ?= 2
BIN    := $(abspath $(VENV)/bin)
READY  := $(VENV)/.installed

export PATH := $(BIN):$(PATH)

.PHONY: train test faults check format bench prove gpu gpu-wheels corpus install clean
train: $(READY)
	deepspeed cpt/run.py --ds_config ds_configs/z3_ulysses.json

# one worker runs all tests of a file, which may share a launch
test: $(READY)
	python -m pytest -n $(TEST_WORKERS) --dist loadfile

# every test that shows a fault case, or those of FAULTS=FILES; rewrites the table in docs/reliability.md
FAULTS ?= tests
faults: $(READY)
	python -m pytest $(FAULTS) --faults --fault_table docs/reliability.md

# what a commit must pass; the fast tests start no process (tests/support/fast.py)
check: $(READY)
	ruff check .
	ruff format --check .
	mypy
	python -m pytest --fast -n $(TEST_WORKERS) --dist loadfile

format: $(READY)
	ruff check --fix .
	ruff format .

bench: $(READY)
	for script in $(filter-out bench/corpus.py bench/gpu_counts.py,$(wildcard bench/*.py)); do python $$script || exit 1; done

# slow proofs: memory at full length, memory of loading
prove: $(READY)
	python -m pytest -m slow tests --ignore tests/faults
	for script in bench/prove/*.py; do python $$script || exit 1; done

# docs/gpu.md says what it does
gpu: $(READY)
	python bench/gpu/acceptance.py --out gpu_results

gpu-wheels: $(READY)
	bench/gpu/wheels.sh

# parallel Japanese/English documentation from Debian packages, with licenses; needs Debian and a package mirror
corpus: $(READY)
	python bench/corpus.py --out data/corpus

install: $(READY)

# torch is installed first and pinned: a range that another package asks for would install another build
$(READY): constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,tensorboard]'
	touch $(READY)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache *.egg-info
