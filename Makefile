# make demo           trains on two ranks with torch.distributed, dense and compressed (needs no compiler, no Horovod)
# make demo-horovod   does the same with horovodrun, and trains a Keras model
# make test           runs lint and all tests, Horovod included
# make horovod        installs Horovod for the torch and TensorFlow of .venv (built once per machine and versions)
# make test-oldest    runs the tests that need no launcher with the oldest versions that setup.cfg permits, in an environment of their own
# make papers         reproduces the papers' claims that have no result yet, and writes docs/papers.md; QUICK=1: those that take minutes, smaller, writes nothing
# make lint           runs ruff and mypy
# make clean          removes .venv and everything that was built

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q
# The tested versions. (If plain `torch` brings CUDA packages that you do not want, name a CPU build here.)
TORCH ?= torch==2.13.0
TENSORFLOW ?= tensorflow-cpu==2.21.0
DEMO_OPTIONS ?=
OLDEST := .venv-oldest
# Options of `uv pip install`, such as --index-url of a CPU build of torch.
OLDEST_OPTIONS ?=

.PHONY: demo demo-horovod test test-oldest horovod papers lint clean

demo: $(VENV)/.demo-installed
	$(PY) examples/demo.py $(DEMO_OPTIONS)

demo-horovod: horovod
	$(PY) examples/demo.py --launcher horovodrun $(DEMO_OPTIONS)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" TF_CPP_MIN_LOG_LEVEL=3 $(VENV)/bin/horovodrun --gloo -np 2 $(PY) examples/keras_mnist.py

test: horovod lint
	$(PY) -m pytest -n 2 tests --ignore tests/frameworks --ignore tests/examples
	$(PY) -m pytest tests/frameworks tests/examples

# tests/project tests this repository: its types, docs and tools, with their newest versions.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n 2 tests --ignore tests/frameworks --ignore tests/examples --ignore tests/project

papers: $(VENV)/.all-installed
	$(PY) benchmarks/papers/papers.py $(if $(QUICK),--quick)

horovod: $(VENV)/.all-installed
	$(PY) tools/build_horovod.py --no-check

lint: $(VENV)/.all-installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(PY):
	python3 -m venv $(VENV)

$(VENV)/.demo-installed: setup.cfg pyproject.toml | $(PY)
	@echo "installing torch, grace_ext and the examples' needs into $(VENV) ..."
	$(PIP) "$(TORCH)"
	$(PIP) -e '.[torch,examples]'
	@touch $@

$(VENV)/.all-installed: $(VENV)/.demo-installed
	@echo "installing TensorFlow, MPI and the tests' needs into $(VENV) ..."
	$(PIP) "$(TENSORFLOW)"
	$(PIP) -e '.[torch,tensorflow,mpi,horovod,privacy,examples,trainers,torchft,dev]'
	@touch $@

$(OLDEST)/.installed: setup.cfg pyproject.toml
	python3 -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q uv
	$(OLDEST)/bin/uv pip install -q --python $(OLDEST)/bin/python --resolution lowest-direct $(OLDEST_OPTIONS) \
		-e '.[torch,tensorflow,mpi,privacy,testing]' 'pytest-xdist>=3' 'matplotlib>=3.10.8'
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info demo .pytest_cache .ruff_cache .mypy_cache
