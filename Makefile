# One entry for each thing that one does with this tree. Everything that runs code sets up first; when
# nothing changed since, that takes no time.

PYTHON := .venv/bin/python

.PHONY: help setup demo test check bench simulate faults docs man deb

help:
	@echo "make demo               set up, then move a running VM between two hosts and back, by each engine"
	@echo "make test [ARGS=...]    set up, then run the tests (ARGS go to pytest)"
	@echo "make check              set up, then lint, check the formatting and the types"
	@echo "make bench [ONLY=...]   set up, then measure both engines (ONLY: one group of figures)"
	@echo "make faults             set up, then try each fault in each phase and order of transfer"
	@echo "make simulate [ARGS=..] set up, then run the simulated farm from 100,000 seeds (ARGS='--seeds 1000': fewer)"
	@echo "make docs               set up, then write docs/API.md anew"
	@echo "make man                write the man pages into build/man"
	@echo "make deb                make a Debian package in build/"
	@echo "make setup              install what is missing, and .venv/bin/transhume"

setup:
	@scripts/setup $(MAKECMDGOALS)

demo: setup
	.venv/bin/transhume demo

test: setup
	$(PYTHON) -m pytest $(ARGS)

check: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: setup
	$(PYTHON) -m transhume.bench $(if $(ONLY),--only $(ONLY))

simulate: setup
	$(PYTHON) -m transhume.sim --seeds 100000 $(ARGS)

faults: setup
	FAULTS=all $(PYTHON) -m pytest tests/e2e/test_fault_matrix.py $(ARGS)

docs: setup
	$(PYTHON) -m transhume.api.document docs/API.md

man: setup
	$(PYTHON) -m transhume.cli.man_pages build/man

deb: setup
	@$(PYTHON) scripts/deb.py
