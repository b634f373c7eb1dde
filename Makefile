# Every target runs in .venv, made and filled on first use, or in the interpreter of `make … PYTHON=…`, which is only used.
SCALE ?= laptop
TEST_JOBS ?= 2

ifeq ($(origin PYTHON),command line)
READY :=
else
PYTHON := .venv/bin/python
READY := .venv/installed
endif

# the first interpreter that runs and is new enough
FIND_PYTHON = for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; done

.PHONY: help install reproduce results test verify render lint

help:
	@echo 'make reproduce            experiments 03, 21 and 22 at laptop scale, beside the committed numbers'
	@echo 'make results SCALE=…      every experiment at a scale: smoke, laptop, workstation or paper'
	@echo 'make test                 the tests'
	@echo 'make verify               derive every committed table, verdict and index again and compare'
	@echo 'make render               write tables and figures again from the committed data'
	@echo 'make lint                 ruff: rules and format'
	@echo 'Targets use .venv (made when there is none), or make … PYTHON=… for an interpreter that has everything.'

install: $(READY)

.venv/installed: pyproject.toml requirements.txt
	@test -x .venv/bin/python || { $(FIND_PYTHON); $$python -m venv .venv; }
	.venv/bin/python -m pip install -r requirements.txt
	@touch $@

reproduce: $(READY)
	$(PYTHON) experiments/03_vit_from_scratch.py --scale laptop
	$(PYTHON) experiments/21_over_accumulation.py --scale laptop
	$(PYTHON) experiments/22_vision_merging.py --scale laptop
	$(PYTHON) -m common.lab.results headline 03_vit_from_scratch laptop
	$(PYTHON) -m common.lab.results headline 21_over_accumulation laptop
	$(PYTHON) -m common.lab.results headline 22_vision_merging laptop

results: $(READY)
	@failed=; for script in experiments/[0-9]*.py; do \
		echo "== $$script --scale $(SCALE)"; \
		$(PYTHON) $$script --scale $(SCALE) || failed="$$failed $$script"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

test: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(TEST_JOBS) --dist worksteal

verify: $(READY)
	$(PYTHON) -m common.lab.results verify

render: $(READY)
	$(PYTHON) -m common.lab.results render

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
