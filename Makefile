# `make demo` and `make test` need nothing but Python 3.10 or newer: they set up $(VENV) themselves.
PYTHON  ?= python3
VENV    ?= .venv
IMAGE   ?=
BENCH   ?=
COMPAT  ?=
GRID    ?= evidence_cpu_112
EVIDENCE ?=
WORKERS ?= 2

BIN     := $(VENV)/bin
# The tests never reach for the network, and each worker keeps to one core.
PYTEST  := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo cards test quick check compat bench evidence tables clean

help:  ## List the targets
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.has-demo  ## Look at a radiograph (IMAGE=path for your own)
	$(BIN)/spcxr demo $(if $(IMAGE),"$(IMAGE)")

cards: $(VENV)/.has-demo  ## Put the code beside the weights in model_cards/, for trust_remote_code
	$(BIN)/python -m spcxr_hf.hub.folder

test: $(VENV)/.has-test  ## Run every test
	$(PYTEST)

quick: $(VENV)/.has-test  ## Run the tests that take no time
	$(PYTEST) -m "not slow"

check: $(VENV)/.has-check  ## Style, types, import rules, model conventions
	@.ci/check $(BIN)

compat: $(VENV)/.has-test  ## Run tests on the oldest and newest versions (COMPAT="--environments oldest" for some)
	$(BIN)/python -m training_scripts.benchmarks.compat $(COMPAT); status=$$?; \
		$(BIN)/python -m training_scripts.benchmarks.compat --render CONTRIBUTING.md && exit $$status

bench: $(VENV)/.has-test  ## Measure speed and memory (BENCH="--gmml_release CHECKOUT" for that peer too)
	$(BIN)/python -m training_scripts.benchmarks.speed --output training_scripts/benchmarks/results/benchmark_cpu.json $(BENCH)

evidence: $(VENV)/.has-test  ## Run a grid of comparisons, where it stopped (EVIDENCE="--data DATA"; GRID=evidence_gpu_224)
	$(BIN)/python -m training_scripts.benchmarks.evidence --grid training_scripts/recipes/$(GRID).yaml --output runs/$(GRID) \
		--kept training_scripts/benchmarks/results/$(GRID) --results training_scripts/benchmarks/results/$(GRID).json $(EVIDENCE)

# Each table of the pages stands between markers and comes from a results file; nothing is measured here.
tables: $(VENV)/.has-test  ## Render the tables of the pages from the results files
	$(BIN)/python -m training_scripts.benchmarks.checkpoint_table
	$(BIN)/python -m training_scripts.benchmarks.speed --render training_scripts/benchmarks/README.md
	$(BIN)/python -m training_scripts.benchmarks.evidence \
		--results training_scripts/benchmarks/results/evidence_cpu_112.json --render training_scripts/benchmarks/README.md
	$(BIN)/python -m training_scripts.benchmarks.compat --render CONTRIBUTING.md
	$(BIN)/python -m training_scripts.benchmarks.probes --render training_scripts/benchmarks/README.md
	for script in speed_cli speed_onnx explanations; do \
		$(BIN)/python -m training_scripts.benchmarks.$$script --render training_scripts/GUIDES.md || exit 1; done

clean:  ## Remove the environment, the builds and the caches
	rm -rf $(VENV) .compat build dist *.egg-info .*_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(VENV)/.has-test: the package is installed with its `test` extra. Made again when pyproject.toml changes.
$(VENV)/.has-%: pyproject.toml
	@.ci/install "$(PYTHON)" "$(VENV)" "$*"
	@touch $@
