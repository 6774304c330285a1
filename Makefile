# Every target sets up what it needs in .venv; the second run starts in seconds.
BIN := .venv/bin

.PHONY: demo test check setup clean

demo: setup
	$(BIN)/vllm-adainfer demo --output .demo

test: setup check
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: .venv/ready

.venv/ready: pyproject.toml setup.sh
	bash setup.sh
	touch $@

clean:
	rm -rf .venv .demo .cache
