# Everything lorakit needs is installed into .venv from pinned constraints by the first target used.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

.PHONY: demo test check fmt schema bench clean
.DEFAULT_GOAL = help

help:
	@echo "make demo    fine-tune a real small chat model on this CPU and show what changed"
	@echo "make test    run the tests"
	@echo "make check   lint, types, layout rules, what no source may do"
	@echo "make fmt     format the code"
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

test: $(VENV)/.ready
	$(BIN)/python -m pytest

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layout.py tests/test_security_lint.py

fmt: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(VENV)/.ready
	$(BIN)/lorakit schema > configs/recipe.schema.json
	cp configs/recipe.schema.json src/lorakit/assets/recipe.schema.json

bench: $(VENV)/.ready
	$(BIN)/lorakit bench --shape $(or $(SHAPE),smollm2-135m) --method $(or $(METHOD),lora)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
