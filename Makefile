# Two commands matter: `make lab` opens the tour, `make test` checks everything. Both build ./.venv
# first, which needs the network once; afterwards nothing does. `make help` lists the rest.

.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
LAB_EXTRAS := notebooks,labels-xtb,md
TEST_EXTRAS := notebooks,labels-xtb,md,labels,torch-sim,cluster,site,parity,test

# The first Python on the path that is new enough; `make PYTHON=/path/to/python3.12 lab` overrules.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)

# Parallel test processes, one thread each: more threads a process would fight over the cores.
JOBS ?= 2
# Jupyter refuses to run as root unless told.
JUPYTERLAB = $(PY) -m jupyterlab $$([ "$$(id -u)" = 0 ] && echo --allow-root)
PYTEST = $(PY) -m pytest -n $(JOBS) --dist worksteal
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
UNIT_ARGS ?=
NOTEBOOK_ARGS ?=
LAB_ARGS ?=
BENCH_ARGS ?=
CLASS_ARGS ?=

# The lessons run as copies with solutions, so that the sources stay as they are.
EXECUTED := build/lessons

# A stamp says which extras are in .venv; it is older than the files that decide the versions when
# these have changed, and make then installs again.
LAB_READY := $(VENV)/lab-ready
TEST_READY := $(VENV)/test-ready
VERSIONS := pyproject.toml constraints.txt

PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip install --no-input --prefer-binary --constraint constraints.txt

.PHONY: help lab lab-teacher check style types imports quick-tests test test-units test-notebooks
.PHONY: class site bench clean

help:
	@echo "make lab     install what the notebooks need into $(VENV), open JupyterLab on the tour, in"
	@echo "             lab/, where your own copies of the lessons are; they are never written over"
	@echo "             LAB_ARGS='--no-browser --port 8899' is passed on to JupyterLab"
	@echo "make lab-teacher  the same with the lessons' sources, which hold the solutions"
	@echo "make check   install everything the tests need into $(VENV); style, types, import rules and"
	@echo "             the quick tests, in less than three minutes"
	@echo "make test    the same, and then the slow tests and all notebooks"
	@echo "             JOBS=$(JOBS) processes; UNIT_ARGS, NOTEBOOK_ARGS are passed on to pytest"
	@echo "make class   student and instructor copies of the notebooks, in class/; CLASS_ARGS='--check'"
	@echo "             also runs them all"
	@echo "make site    documentation, API reference and course as static pages, in site/;"
	@echo "             SITE_EXECUTE=1 runs the lessons first, so that their pages have outputs"
	@echo "make bench   time the model beside the reference; BENCH_ARGS are passed on"
	@echo "make clean   remove $(VENV), caches and build products (data and runs stay)"
	@echo "PYTHON=python3.12 in front of any of them picks the Python (3.11 or newer)"

# Students work in lab/, on copies without solutions; work in them is never written over.
lab: $(LAB_READY)
	@$(PY) -m notebooks.tools.lab_copies --out lab
	@$(JUPYTERLAB) --ServerApp.root_dir=lab --LabApp.default_url=/lab/tree/00_tour.ipynb $(LAB_ARGS)

lab-teacher: $(LAB_READY)
	@$(JUPYTERLAB) --LabApp.default_url=/lab/tree/notebooks/00_tour.ipynb $(LAB_ARGS)

# Style, types and import rules are those of pyproject.toml; tests/conftest.py says which are slow.
check: style types imports quick-tests

style: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TEST_READY)
	$(BIN)/mypy

imports: $(TEST_READY)
	$(BIN)/lint-imports

quick-tests: $(TEST_READY)
	@mkdir -p build
	$(ONE_THREAD) $(PYTEST) -m "not slow" $(if $(COVERAGE),$(COVERAGE) --cov-report=) tests

test: COVERAGE := --cov
test: check test-units test-notebooks

test-units: $(TEST_READY)
	@mkdir -p build
	$(ONE_THREAD) $(PYTEST) -m slow $(if $(COVERAGE),$(COVERAGE) --cov-append --cov-report=term:skip-covered) \
		$(UNIT_ARGS) tests

test-notebooks: $(TEST_READY)
	rm -rf $(EXECUTED)
	$(PY) notebooks/tools/class_copies.py --out $(EXECUTED) >/dev/null
	@$(ONE_THREAD) $(PYTEST) --nbmake --overwrite --nbmake-timeout=900 $(NOTEBOOK_ARGS) \
		$(EXECUTED)/instructor/*.ipynb; status=$$?; \
		$(PY) -m notebooks.tools.slowest_cells $(EXECUTED)/instructor; exit $$status

class: $(LAB_READY)
	$(ONE_THREAD) $(PY) notebooks/tools/class_copies.py $(CLASS_ARGS)

site: $(TEST_READY)
	rm -rf site
	$(ONE_THREAD) $(PY) -m sphinx -q -E -W --keep-going -c docs -d build/doctrees . site
	@echo "open site/index.html"

bench: $(TEST_READY)
	$(PY) docs/studies/speed/run.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist class site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} + -o -name .ipynb_checkpoints -prune -exec rm -rf {} +

# py3Dmol draws without a network where 3Dmol.js is at hand (allscaip_lite/notebook/viewer.py).
VIEWER := 3dmol@2.5.5
VIEWER_FOLDER := $(VENV)/share/allscaip-lite

$(LAB_READY): $(VERSIONS)
	$(call prepare)
	$(PIP) --editable ".[$(LAB_EXTRAS)]"
	$(call finish)
	@touch $@

# The test extras contain the lab's, so both stamps are good afterwards.
$(TEST_READY): $(VERSIONS)
	$(call prepare)
	$(PIP) --editable ".[$(TEST_EXTRAS)]"
	$(call finish)
	@touch $(LAB_READY) $@

# An interrupted set-up is taken up again here: an environment without a working pip is made anew,
# and a distribution without RECORD, which pip writes last, is installed once more.
# torch goes first and alone, so that no other requirement can choose its build.
define prepare
	@[ -n "$(PYTHON)" ] || { echo "allscaip-lite needs Python 3.11 or newer; found: $$(python3 --version 2>&1)." \
		"Install one, or say where it is: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "allscaip-lite needs Python 3.11" \
		"or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments." \
		"On Debian and Ubuntu: apt install python3-venv." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "Making $(VENV) with $$($(PYTHON) --version)"; \
		$(PYTHON) -m venv --clear $(VENV); }
	@for d in $(VENV)/lib/python3*/site-packages/*.dist-info; do \
		[ ! -d "$$d" ] || [ -f "$$d/RECORD" ] || rm -rf "$$d"; done
	@echo "Installing into $(VENV); the first time takes some minutes."
	$(PIP) torch
endef

# Neither line may fail the set-up: without npm py3Dmol loads its script from the network, and the
# other only spares the reader a question about news.
define finish
	@$(PY) -m jupyter labextension disable --level=sys_prefix \
		"@jupyterlab/apputils-extension:announcements" >/dev/null 2>&1 || true
	@[ -f $(VIEWER_FOLDER)/3Dmol-min.js ] || { mkdir -p $(VIEWER_FOLDER) && cd $(VIEWER_FOLDER) && \
		npm pack $(VIEWER) --silent --fetch-retries=0 --fetch-timeout=20000 >/dev/null 2>&1 && \
		tar -xzf 3dmol-*.tgz --strip-components=2 package/build/3Dmol-min.js; rm -f 3dmol-*.tgz; } || true
endef
