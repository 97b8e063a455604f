# Two commands: `make report` and `make test`. `make help` lists the others.
PYTHON ?= python3
PY := .venv/bin/python
PROTOCOL ?=
SEEDS ?= 0
BUDGET ?= 11m
READY := .venv/.installed

.PHONY: help env report figure2 publish test lab chapters clean-env
.DEFAULT_GOAL := help

help:                     ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):[^#]*## /  make \1\t/' | expand -t 18

env: $(READY)             ## create .venv with the pinned environment (a few GB, some minutes)

$(READY): requirements.txt requirements-3.10.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else f"Python {sys.version.split()[0]} is too old: 3.10 or newer is needed; try make PYTHON=python3.11 $(MAKECMDGOALS)")'
	@echo "environment: installing the pinned packages into .venv (a few GB; 2 to 10 minutes)"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m pip install -q --disable-pip-version-check -r $$($(PY) -c 'import sys; print("requirements.txt" if sys.version_info >= (3, 11) else "requirements-3.10.txt")')
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(PY) -c "import nbdev.export, nbdev.test, nbdev.clean, nbdev.showdoc, uvit_repro.config"
	@touch $@

report: $(READY)          ## train the headline model and cells of Figure 2 inside BUDGET, write results/report.html
	@$(PY) -m uvit_repro.report --budget $(BUDGET) $(if $(PROTOCOL),--protocol $(PROTOCOL)) --seeds $(SEEDS)

figure2: $(READY)         ## the rest of Figure 2 (PROTOCOL=laptop|gpu|paper, SEEDS=0,1,2), then the report
	@$(PY) -m uvit_repro.report --budget none $(if $(PROTOCOL),--protocol $(PROTOCOL)) --seeds $(SEEDS)

publish: $(READY)         ## copy the evidence of finished cells (PROTOCOL, SEEDS) to results/published
	@$(PY) -m uvit_repro.report --budget 0 --publish $(if $(PROTOCOL),--protocol $(PROTOCOL)) --seeds $(SEEDS)

test: export OMP_NUM_THREADS = 1
test: $(READY)            ## import check, style, chapters at protocol smoke, pytest
	@echo "test: the notebook stack imports"; $(PY) -c "import nbdev.export, nbdev.test, nbdev.clean, nbdev.showdoc"
	@echo "test: style"; $(PY) -m ruff format --check --quiet . && $(PY) -m ruff check --quiet uvit_repro nbs tests
	@echo "test: chapters run at protocol smoke"; .venv/bin/nbdev_test --n_workers 2
	@echo "test: pytest, with export and clean on a copy"; $(PY) -m pytest

lab: $(READY)             ## open the chapters in JupyterLab
	@.venv/bin/jupyter lab nbs

chapters: $(READY)        ## execute all chapters and write the copies in results/published/chapters
	@$(PY) -m uvit_repro.report --chapters

clean-env:                ## remove .venv
	rm -rf .venv
