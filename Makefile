# Everything runs from the repository root, in .venv, which `make setup` makes.

PYTHON ?=
PY := .venv/bin/python
READY := .venv/.ready
ARGS ?=
# Two processes, each with whole files: what a file prepares once stays prepared.
PYTEST := $(PY) -m pytest -q -n 2 --dist loadfile

# A virtual environment whose interpreter is gone counts as none.
$(shell $(PY) -c '' 2>/dev/null || rm -f $(READY))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-aot test-slurm parity lint bench bench-decode bench-gpu gpu-wheels notebooks lab clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1	\2/p' Makefile | expand -t 14

setup: $(READY)  ## find Python >= 3.12, make .venv, install everything pinned

$(READY): pyproject.toml setup.py constraints.txt
	PYTHON='$(PYTHON)' sh tools/setup.sh
	@touch $@

demo: setup  ## compare balancing strategies on a tiny model, 8 minutes on 2 free cores
	$(PY) -m experiments.sweep --sweep=experiments/sweeps/demo.py --workdir=runs/demo $(ARGS)

test: lint  ## lint, types and every test but the slow ones
	$(PYTEST) -m "not slow" $(ARGS)

test-all: lint  ## the slow tests too
	$(PYTEST) $(ARGS)

test-aot:  ## compile for H100s that are not here, in .venv-aot: overlap and memory
	PYTHON='$(PYTHON)' VENV=.venv-aot EXTRAS=test,aot sh tools/setup.sh
	JAX_PLATFORMS=cpu REQUIRE_AOT=1 .venv-aot/bin/python -m pytest -q \
	    tests/parallel/test_aot.py tests/parallel/pipeline/test_aot.py \
	    tests/pallas_kernels/test_aot_*.py $(ARGS)

test-slurm: setup  ## sweeps on a Slurm of this machine alone; installs it (Debian, root)
	REQUIRE_SLURM=1 sh tests/slurm/cluster.sh \
	    $(PY) -m pytest -q -rP tests/slurm $(ARGS)

parity: setup  ## compare with transformers, live: fresh models, our exports loaded there
	$(PY) -m tests.parity.live $(ARGS)

lint: setup  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: setup  ## tokens/s of a training step on this CPU; ARGS="--peers --json FILE"
	$(PY) benchmarks/train_cpu.py $(ARGS)

bench-decode: setup  ## tokens/s of generation on this CPU; same ARGS
	$(PY) benchmarks/decode_cpu.py $(ARGS)

bench-gpu:  ## all that needs a Hopper GPU, in 8 minutes, by its python3; ARGS="--help"
	$(or $(PYTHON),python3) -m benchmarks.gpu $(ARGS)

gpu-wheels: setup  ## beforehand, with a network: what bench-gpu's machine may lack
	$(PY) -m benchmarks.gpu_wheels $(ARGS)

notebooks: setup  ## run every notebook from top to bottom
	.venv/bin/jupyter execute --timeout=600 notebooks/*.ipynb

lab: setup  ## open the notebooks in JupyterLab
	.venv/bin/jupyter lab --notebook-dir=notebooks

clean:  ## remove caches and build products; runs/ and .venv stay
	rm -rf .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
