# make demo    train the demo networks; pictures and report are in runs/demo
# make test    all tests
# make coverage    all tests, and which lines they run; at least 90 %, half as long again
# make bench   ratios against the peers, after the tests of what is timed; DEVICE=cuda on a GPU
# make check   formatting, lint, types, tests: what must pass before a commit
# Each works on a bare clone: the environment is made when it is missing or when its description changed.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.complete
# One thread in each of two test processes: more processes than cores make OpenMP threads wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

DEVICE ?= cpu
BENCH  := $(BIN)/python benchmarks/

.PHONY: demo test coverage bench lint types check format clean

demo: $(STAMP)
	$(BIN)/ranvier demo

test: $(STAMP)
	$(PYTEST)

coverage: $(STAMP)
	$(PYTEST) --cov=src/ranvier --cov-report=term:skip-covered

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --requirement benchmarks/requirements.txt
	$(BIN)/python -m pytest -q tests/kernels tests/nn/test_convolution.py tests/nn/test_normalized.py tests/nn/test_memory.py tests/nn/test_recompute.py \
	    tests/export/test_inference.py tests/export/test_convolved_chain.py tests/export/test_convolved_graph.py tests/training/test_loop.py
	mkdir -p runs/bench
	$(BENCH)neuron_pass.py --device $(DEVICE) --out runs/bench/neuron_pass.json
	$(BENCH)convolution.py
	$(BENCH)training_step.py --device $(DEVICE) --out runs/bench/training_step.json
	$(BENCH)training_step.py --device $(DEVICE) --what memory --steps 16 --out runs/bench/memory.json
	$(BENCH)training_step.py --device $(DEVICE) --what start --out runs/bench/start.json
	$(BENCH)training_step.py --device $(DEVICE) --what time-steps --out runs/bench/time_steps.json
	$(BENCH)inference.py --device $(DEVICE) --out runs/bench/inference.json
	$(BENCH)processes.py --out runs/bench/processes.json
	$(BENCH)evaluation_batches.py

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

check: lint types test

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml constraints.txt peers.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement peers.txt
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .coverage*
