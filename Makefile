# Needs Python 3.11 or newer, make and a C compiler.
#   make train    train a small gpt-oss on the sample corpus, and export it
#   make check    ruff, format, mypy and the fast tests
#   make test     all tests but the slow ones
#   make faults   every fault case, and the table in docs/reliability.md
#   make gpu      ten minutes of checks and measurements on a machine with a GPU;  make gpu-wheels   wheels for an offline one
#   make oracle   other people's programs on the exports (docs/weights.md)
#   make bench    all benchmarks;  make prove   slow proofs;  make corpus   a real corpus
#   make sbom     a bill of materials of .venv;  make audit   known vulnerabilities;  make licenses   docs/licenses.md
PYTHON ?= python3
VENV   := .venv
TEST_WORKERS ?= 2
BIN    := $(abspath $(VENV)/bin)
READY  := $(VENV)/.installed

export PATH := $(BIN):$(PATH)
# without bytecode every process that a test starts compiles the project anew, and pytest all tests
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test faults check format bench prove oracle gpu gpu-wheels corpus sbom audit licenses install clean
train: $(READY)
	deepspeed cpt/run.py --ds_config ds_configs/z3_ulysses.json

# one worker runs all tests of a file, which may share a launch; the longest files come first (tests/conftest.py)
test: $(READY)
	python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

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

# slow proofs: memory at full length, memory of loading, hostile files
prove: $(READY)
	python -m pytest -m slow tests --ignore tests/faults
	for script in bench/prove/*.py; do python $$script || exit 1; done

# docs/weights.md says what it does; its environments lie in .venv-oracle
oracle: $(READY)
	python bench/oracle/run.py

# docs/gpu.md says what it does
gpu: $(READY)
	python bench/gpu/acceptance.py --out gpu_results

gpu-wheels: $(READY)
	bench/gpu/wheels.sh

# parallel Japanese/English documentation from Debian packages, with licenses; needs Debian and a package mirror
corpus: $(READY)
	python bench/corpus.py --out data/corpus

install: $(READY)

# Every package with its hash and nothing that is not listed.  TORCH=cpu or TORCH=cuda chooses; by default torch's build for
# CPUs is taken where pip is offered one, and that of the package index, with CUDA's libraries, elsewhere.
TORCH ?= cpu cuda
PIP := python -m pip install --quiet --disable-pip-version-check --no-deps
$(READY): $(wildcard requirements/*.txt) constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes -r requirements/build.txt
	$(PIP) --require-hashes --no-build-isolation --use-pep517 -r requirements/test.txt
	for build in $(TORCH); do $(PIP) --require-hashes -r requirements/torch-$$build.txt && exit 0; \
	    echo "pip is offered no torch for $$build here"; done; exit 1
	$(PIP) --no-build-isolation --use-pep517 -e .
	python -m pip check --disable-pip-version-check
	touch $(READY)

# tools of a release, in an environment of their own
RELEASE := .venv-release
RELEASE_READY := $(RELEASE)/.installed
$(RELEASE_READY): requirements/release.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/release.txt
	touch $(RELEASE_READY)

# CycloneDX JSON: what is installed in .venv, with versions and licenses
sbom: $(READY) $(RELEASE_READY)
	$(RELEASE)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o sbom.json $(BIN)/python

# asks a database of advisories over the network
audit: $(RELEASE_READY)
	for file in run test torch-cuda build; do \
	    $(RELEASE)/bin/pip-audit --disable-pip --require-hashes -r requirements/$$file.txt || exit 1; done

# asks the package index for the metadata of every pinned package
licenses: $(RELEASE_READY)
	$(RELEASE)/bin/python -m pip install --quiet --disable-pip-version-check 'pip>=23.3'
	$(RELEASE)/bin/python requirements/licenses.py

clean:
	rm -rf $(VENV) $(RELEASE) .venv-oracle sbom.json .mypy_cache .pytest_cache .ruff_cache *.egg-info
