# Thin on purpose: every target makes sure of the set-up (scripts/setup_env.py), then runs one command in its environment.
PYTHON ?= python3
PYTEST_ARGS ?=
SIMULATE_ARGS ?=

BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)

# Or else every process compiles thousands of modules anew, which is half of the time that TensorFlow takes to start.
ifdef PYTHONDONTWRITEBYTECODE
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/build/bytecode
endif

.PHONY: help setup demo demo-tf demo-family simulate reproduce reproduce-recipe test test-long test-2 test-4 test-cluster
.PHONY: image image-gpu cluster-demo bench gpu-check lint sanitize clean clean-all
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+( [a-z0-9-]+)*:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make the environment in .venv; all targets below do it by themselves
	@$(PYTHON) scripts/setup_env.py

demo: setup ## train on real data with stock Horovod and with PQASGD on two ranks, and compare
	@$(BIN)/python scripts/demo.py

demo-tf: setup ## the same with TensorFlow: Keras' model.fit
	@$(BIN)/python scripts/demo.py --framework keras

demo-family: setup ## train with every method of docs/methods.md, and draw accuracy against bytes
	@$(BIN)/python scripts/demo_family.py

simulate: setup ## predict step time and bytes on 2 to 4,096 ranks (SIMULATE_ARGS="--rate 10gbit"), and draw them
	@$(BIN)/python scripts/simulate.py $(SIMULATE_ARGS)

reproduce: setup ## measure that convergence has the rate of the theory; takes some minutes
	@$(BIN)/python scripts/reproduce.py

reproduce-recipe: setup ## measure the recipes on CIFAR-10, DATA=folder or .npz; takes an hour or more
	@$(BIN)/python scripts/reproduce_recipe.py $(if $(DATA),--data "$(DATA)")

test: setup ## run all tests (PYTEST_ARGS="-k eden" for some)
	@$(BIN)/pytest --durations=10 $(PYTEST_ARGS)

test-long: setup ## run the tests that are too long for every change
	@$(BIN)/pytest --durations=10 -m long -o timeout=3600 $(PYTEST_ARGS)

# horovodrun imports TensorFlow to see whether it is there, and TensorFlow talks.
test-2 test-4: export TF_CPP_MIN_LOG_LEVEL := 3
test-2 test-4: export TF_ENABLE_ONEDNN_OPTS := 0
test-2: setup ## run tests/ranks and tests/ranks_tensorflow on 2 ranks under horovodrun
test-4: setup ## run tests/ranks and tests/ranks_tensorflow on 4 ranks under horovodrun
RANK_TESTS := pytest -x -q -p no:cacheprovider -o timeout_method=thread
test-2 test-4: test-%:
	@$(BIN)/horovodrun --gloo -np $* $(BIN)/python -m $(RANK_TESTS) tests/ranks $(PYTEST_ARGS)
	@$(BIN)/horovodrun --gloo -np $* $(BIN)/python -m $(RANK_TESTS) tests/ranks_tensorflow $(PYTEST_ARGS)

# What images are built on, if not on what their Dockerfiles say: make image BASE_IMAGE=.. BUILD_IMAGE=..
export BASE_IMAGE BUILD_IMAGE
BASES := $(if $(BASE_IMAGE),--base $(BASE_IMAGE)) $(if $(BUILD_IMAGE),--build-base $(BUILD_IMAGE))

image: setup ## build the container image of a cluster's nodes; needs a Docker engine
	@$(BIN)/python scripts/cluster.py --image cpu $(BASES)

image-gpu: setup ## the same with CUDA and NCCL
	@$(BIN)/python scripts/cluster.py --image gpu $(BASES)

# exec: a signal that ends make's shell has to reach the script, which takes the containers down.
cluster-demo: setup ## train on three containers joined by 1 Gbit/s, and compare; needs a Docker engine
	@exec $(BIN)/python scripts/cluster_demo.py $(BASES)

test-cluster: setup ## kill a container in the middle of training, and more; needs a Docker engine
	@$(BIN)/pytest --durations=10 -m cluster -o timeout=900 $(PYTEST_ARGS)

bench: export TF_CPP_MIN_LOG_LEVEL := 3
bench: export TF_ENABLE_ONEDNN_OPTS := 0
bench: setup ## measure codecs, TensorFlow ops and exchange; results in build/bench
	@$(BIN)/python scripts/bench_codecs.py
	@$(BIN)/python scripts/bench_tensorflow.py
	@$(BIN)/python scripts/bench_exchange.py

gpu-check: ## on a machine with a GPU, a CUDA toolkit and PyTorch: build, test and measure the kernels
	@$(PYTHON) scripts/gpu_check.py $(GPU_CHECK_ARGS)

lint: setup ## check style with ruff and types with mypy
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

sanitize: setup ## run the native tests under AddressSanitizer and UBSan
	@$(BIN)/python scripts/sanitize.py $(PYTEST_ARGS)

clean: ## remove what was built here; .venv and the cache stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis pqasgd_horovod/*/*.so
	find pqasgd_horovod scripts tests -name __pycache__ -prune -exec rm -rf {} +

clean-all: clean ## remove .venv too; the cache in ~/.cache/pqasgd_horovod stays
	rm -rf .venv
