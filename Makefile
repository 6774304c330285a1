# Every target sets up what it needs in .venv; the second run starts in seconds.
BIN := .venv/bin

# The Python of `make gpu-kernels`: needs torch with CUDA, Triton, pytest, hypothesis and typer.
GPU_PYTHON ?= python3

.PHONY: demo test check gpu-kernels setup clean

demo: setup
	$(BIN)/vllm-adainfer demo --output .demo

test: setup check
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On a GPU machine, with or without vLLM: the kernels' tests, then their benchmark into
# benchmarks/results/.
gpu-kernels: export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels
gpu-kernels:
	@$(GPU_PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || \
	  { echo 'make gpu-kernels needs a GPU that $(GPU_PYTHON) sees through torch: set GPU_PYTHON'; exit 1; }
	$(GPU_PYTHON) -m pytest tests/kernels
	$(GPU_PYTHON) benchmarks/bench_probe_kernel.py

setup: .venv/ready

.venv/ready: pyproject.toml setup.sh
	bash setup.sh
	touch $@

clean:
	rm -rf .venv .demo .cache
