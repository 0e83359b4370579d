# Everything lorakit needs is installed into .venv from pinned constraints by the first target used.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_OLDEST ?= torch==2.10.0
TORCH_NEWEST ?= torch
BIN = $(VENV)/bin

.PHONY: demo test test-oldest test-newest wheel-demo check docs fmt schema bench notebooks audit licenses models clean
.DEFAULT_GOAL = help

help:
	@echo "make demo    fine-tune a real small chat model on this CPU and show what changed"
	@echo "make test    run the tests"
	@echo "make test-oldest, make test-newest  the same with other versions of the dependencies"
	@echo "make wheel-demo  build the wheel, install it alone, and run the demo from it"
	@echo "make check   lint, types, layout rules, words, what no source may do"
	@echo "make docs    guides, concepts and reference as a site, into site/"
	@echo "make audit   ask the advisory service of the package index about every pinned package"
	@echo "make fmt     format the code"
	@echo "make notebooks  build and execute both notebooks"
	@echo "make bench   measure this machine (SHAPE=llama-2-7b METHOD=lora)"

# torch comes first and by exact version: asked for by a range, pip may choose another build.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lorakit needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/lorakit demo

# A file's tests stay together: what they share is made once. Two processes took 6 GB, hence at most 4.
# Files are begun in the order of tests/conftest.py, the longest first.
test: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The same suite with the lowest and with the newest versions that pyproject.toml allows; TORCH_OLDEST
# and TORCH_NEWEST choose the build of torch, TESTS a part: make test-oldest TESTS=tests/recipe
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check
.venv-oldest/.ready: pyproject.toml tests/lowest_versions.py
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python tests/lowest_versions.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/python $(PIP_INSTALL) $(TORCH_OLDEST)
	.venv-oldest/bin/python $(PIP_INSTALL) -c .venv-oldest/constraints.txt -e '.[dev]'
	@touch $@

.venv-newest/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python $(PIP_INSTALL) $(TORCH_NEWEST)
	.venv-newest/bin/python $(PIP_INSTALL) -e '.[dev]'
	@touch $@

test-oldest test-newest: test-%: .venv-%/.ready
	.venv-$*/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(TESTS)

# An environment with nothing but the wheel and its dependencies, and a folder outside the sources.
wheel-demo:
	rm -rf build dist .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python $(PIP_INSTALL) $(TORCH)
	.venv-wheel/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	.venv-wheel/bin/python $(PIP_INSTALL) -c constraints.txt dist/lorakit-*.whl
	folder=$$(mktemp -d) && cd $$folder && $(CURDIR)/.venv-wheel/bin/lorakit demo

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layout.py tests/test_security_lint.py tests/test_prose.py

# --strict: a broken link or anchor ends the build. No page asks a network for anything.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

fmt: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(VENV)/.ready
	$(BIN)/lorakit schema > configs/recipe.schema.json
	cp configs/recipe.schema.json src/lorakit/assets/recipe.schema.json

bench: $(VENV)/.ready
	$(BIN)/lorakit bench --shape $(or $(SHAPE),smollm2-135m) --method $(or $(METHOD),lora)

notebooks: $(VENV)/.ready
	$(BIN)/python notebooks/build.py

licenses: $(VENV)/.ready
	$(BIN)/python docs/make_licenses.py > docs/licenses.md

models: $(VENV)/.ready
	$(BIN)/python docs/make_models.py > docs/reference/models.md

# Apart from `check`: it needs the service, and an answer of today. --strict, since pip-audit ends
# with 0 where the index gave no answer at all.
AUDIT = .venv-audit/bin
audit:
	test -x $(AUDIT)/pip-audit || { $(PYTHON) -m venv .venv-audit && \
	  $(AUDIT)/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1; }
	@$(AUDIT)/pip-audit --strict --progress-spinner off --no-deps --disable-pip -r constraints.txt || \
	  { echo "make audit: a known vulnerability is listed above; or, where it says 'could not be audited' or" \
	    "'connection', the advisory service was not reached and NOTHING was checked"; exit 1; }

clean:
	rm -rf $(VENV) .venv-audit .venv-oldest .venv-newest .venv-wheel build dist site .pytest_cache .ruff_cache .mypy_cache
