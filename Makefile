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

.PHONY: help install lock newest reproduce results list test verify render lint check-method

help:
	@echo 'make reproduce            experiments 03, 21 and 22 at laptop scale, beside the committed numbers (about 22 minutes, 2 cores)'
	@echo 'make results SCALE=…      every experiment at a scale: smoke, laptop, workstation or paper'
	@echo 'make list                 every experiment: its table or figure, its state and time at each scale, its cost'
	@echo 'make test                 the tests'
	@echo 'make verify               derive every committed table, verdict and index again and compare'
	@echo 'make render               write tables and figures again from the committed data'
	@echo 'make check-method NAME=…  what a new merger or activation still lacks'
	@echo 'make newest               the tests with the newest packages that pyproject.toml allows, in .venv-newest'
	@echo 'make lock                 write the versions in .venv to requirements.lock'
	@echo 'make lint                 ruff: rules and format; mypy: types'
	@echo 'Targets use .venv (made when there is none), or make … PYTHON=… for an interpreter that has everything.'

install: $(READY)

.venv/installed: pyproject.toml requirements.lock
	@test -x .venv/bin/python || { $(FIND_PYTHON); $$python -m venv .venv; }
	.venv/bin/python -m pip install -r requirements.lock
	.venv/bin/python -m pip install --no-deps -e .
	@touch $@

# What a new release elsewhere would break is seen here first.
newest:
	@rm -rf .venv-newest; $(FIND_PYTHON); $$python -m venv .venv-newest
	.venv-newest/bin/python -m pip install --upgrade -r requirements.txt
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n $(TEST_JOBS) --dist worksteal

# Other machines than Linux on x86-64 keep their lines, and have no CUDA packages.
X86 = platform_machine == 'x86_64' and sys_platform == 'linux'
lock: $(READY)
	@{ grep -E "^#|!= 'x86_64'" requirements.lock; $(PYTHON) -m pip freeze --all --exclude-editable \
	| sed -E "s/^((torch|torchvision)==[^+]*).*/\1; $(X86)/; /^(nvidia|cuda)-|^triton==/ s/$$/; $(X86)/; /^pip==/ d"; } > .lock
	@mv .lock requirements.lock

# Beside the committed results, which stay as they are.
REPRODUCED = 03_vit_from_scratch 21_over_accumulation 22_vision_merging
reproduce: $(READY)
	set -e; for name in $(REPRODUCED); do \
		$(PYTHON) experiments/$$name.py --scale laptop --results-dir .reproduced; done
	set -e; for name in $(REPRODUCED); do \
		$(PYTHON) -m common.lab.results headline $$name laptop --measured-dir .reproduced; done

results: $(READY)
	@case '$(SCALE)' in smoke | laptop | workstation | paper) ;; *) \
		echo "error: SCALE=$(SCALE) is none of smoke, laptop, workstation and paper" >&2; exit 2;; esac
	@failed=; for script in experiments/[0-9]*.py; do \
		echo "== $$script --scale $(SCALE)"; \
		$(PYTHON) $$script --scale $(SCALE) || failed="$$failed $$script"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

list: $(READY)
	@$(PYTHON) -m common.lab.results list

test: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(TEST_JOBS) --dist worksteal

verify: $(READY)
	$(PYTHON) -m common.lab.results verify

render: $(READY)
	$(PYTHON) -m common.lab.results render

check-method: $(READY)
	@PYTHONPATH=. OMP_NUM_THREADS=1 $(PYTHON) tests/check_method.py $(NAME)

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
