# Each target sets up all it needs in .venv; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-slow test-arm64 test-x86 test-clients soak check bench docs-figures clean

demo: $(READY)
	$(BIN)/cyclewise run smollm2 "Why is the sky blue?" --max-tokens 128

test: $(READY)
	$(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m ""

# The kernels' tests on an emulated AArch64 processor (Debian; needs qemu-user-static).
test-arm64: $(READY)
	PYTHON=$(BIN)/python tests/arm64.sh

# The same on emulated x86-64 processors with AVX-512 or AVX-VNNI (on Linux for x86-64).
test-x86: $(READY)
	PYTHON=$(BIN)/python tests/x86.sh

# Suites that others wrote, against a server of ours (docs/compatibility.md); downloads them.
test-clients: $(READY)
	$(BIN)/python -m tests.clients.run

# 500 requests of all kinds over ten minutes, some of which nobody waits for.
soak: $(READY)
	$(BIN)/python -m tests.soak smollm2

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/formats.py

docs-figures: $(READY)
	$(BIN)/python benchmarks/docs_figures.py

clean:
	rm -rf .venv .arm64 .x86 .clients

# Made anew whenever the dependencies may have changed. The stamp comes last, so that an interrupted
# installation starts over.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.11"; exit 1; }
	@echo "setting up .venv"
	@rm -rf .venv
	@$(PYTHON) -m venv .venv
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq --editable '.[test]'
	@touch $@
