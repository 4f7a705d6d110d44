# The two commands of this project are `make book` and `make test`. Each makes its own .venv when needed.
#
#   make book                        execute the chapters and build the site in _build/html
#   make serve                       build it and serve it on http://localhost:8000
#   make test                        lint, unit tests, notebooks, a warning-free site
#   make lint                        ruff and mypy
#   make survey                      run what is missing of all studies, at the lowest priority; stop it at any time
#   make repository URL=https://github.com/OWNER/NAME    change the address everywhere
#   make cells                       write the cells that all chapters share
#   make strangers                   run every chapter alone, from a foreign folder, with gi_lib installed and without
#   make clean                       remove what was built; the .venv stays
#
# PROFILE=smoke|quick|survey, DEVICE=cuda, DATA_ROOT=path, SEED=1 go to every chapter; JOBS chapters run at a time. A
# relative path counts from where make runs.
# PIP_ARGS goes to pip: with PIP_ARGS="--extra-index-url URL" and the URL that pytorch.org gives for CPU builds, a reader
# without a GPU saves some gigabytes.

SHELL := /bin/bash
PYTHON ?= python3
PIP_ARGS ?=
PROFILE ?= quick
DEVICE ?=
DATA_ROOT ?=
SEED ?= 0
JOBS ?= 2
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
PORT ?= 8000

BIN := .venv/bin
STAMP := .venv/installed
SMOKE := _build/smoke
NOTEBOOKS = $(wildcard book/*.ipynb tests/reference/*.ipynb)
CHAPTERS := $(PROFILE) --device "$(DEVICE)" --data-root "$(DATA_ROOT)" --seed $(SEED)

# Programs in .venv name the folder that they were installed in: in a copied or moved checkout they would run the old
# one's. And where Python comes without ensurepip, as Debian's, a .venv without pip is left behind.
OWN_VENV = grep -qsF "$(CURDIR)/.venv" .venv/bin/activate && $(BIN)/python -m pip --version > /dev/null 2>&1

# Text is UTF-8 under any locale.
export PYTHONUTF8 = 1
# One thread a process: two to three times faster than the default on the small networks of the chapters.
export OMP_NUM_THREADS ?= 1
# glibc gives a large block back to the system when it is freed, and every iteration faults its pages in again.
export MALLOC_TRIM_THRESHOLD_ ?= 1073741824
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824

# Tests that need real data run where GI_DATA says, or where it lies beside the checkout.
REAL := $(if $(GI_DATA),,$(if $(wildcard ../shared/data/SHA256SUMS),GI_DATA="$(abspath ../shared/data)"))

# What a reader's notebook shows as a bar would stay in a page as text.
book test: export TQDM_DISABLE = 1

.PHONY: book test lint serve clean repository cells survey strangers venv-anew
.DELETE_ON_ERROR:

book: $(STAMP)
	$(BIN)/python book/build.py site --jobs $(JOBS) --profile $(CHAPTERS)

test: lint
	$(REAL) $(BIN)/python -m pytest tests --ignore tests/test_book.py --ignore tests/test_browser.py
	$(BIN)/python book/build.py site --jobs $(JOBS) --profile smoke --root $(SMOKE)
	GI_SITE=$(SMOKE)/_build/html $(BIN)/python -m pytest tests/test_book.py tests/test_browser.py
	$(BIN)/python book/build.py copies --profile smoke --root $(SMOKE)
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env $(SMOKE)/_build/nbval
	$(BIN)/python -m pytest --nbval --nbval-current-env --nbval-sanitize-with tests/reference/sanitise.cfg tests/reference

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/ruff check --line-length 78 $(NOTEBOOKS)
	$(BIN)/ruff format --check --line-length 78 $(NOTEBOOKS)
	$(BIN)/mypy

serve: book
	$(BIN)/python -m http.server $(PORT) --directory _build/html

survey: $(STAMP)
	$(REAL) nice -n 19 $(BIN)/gi run experiments --workers $(WORKERS)

strangers: $(STAMP)
	$(BIN)/python tests/strangers.py

clean:
	rm -rf _build build .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

repository:
	@test -n "$(URL)" || { echo "make repository needs the address: make repository URL=https://github.com/OWNER/NAME" >&2; exit 2; }
	$(PYTHON) book/cells.py --repository "$(URL)"

cells:
	$(PYTHON) book/cells.py

$(STAMP): requirements.txt pyproject.toml $(if $(shell $(OWN_VENV) && echo yes),,venv-anew)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed, got " + sys.version.split()[0] + "; set PYTHON=python3.12, for example")'
	@if test -e .venv && ! { $(OWN_VENV); }; then echo ".venv was made in another folder, or not to its end: it is made again"; rm -rf .venv; fi
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	$(BIN)/python -m pip install $(PIP_ARGS) -r requirements.txt
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet -e .
	touch $@
