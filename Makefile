# make demo      the quickstart, from nothing to a converted model and its report
# make test      lint, format, types, import contracts and the fast tests, from nothing
# make test-all  the same with the slow tests, and with tests against other programs' files
# make test-hosts  those files, a download of 39 MB into build/test-hosts
# make docs      the documentation as HTML in docs/_build/html, warnings as errors, from nothing
# make faults    the long fault suite, which writes tests/faults/RESULTS.md, in the environment that is there
# make check     as `make test`, in the environment that is already there

PYTHON ?= python3
OUT ?= runs/quickstart
# Which tests `make check` runs.
SELECT ?= not slow

BIN := .venv/bin
# One pin, written in the [dev] extra: pip then never fetches a second build of torch.
TORCH := $(shell grep -o 'torch==[0-9.]*' pyproject.toml)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Files of programs that are not installed, because their dependencies take many GB.
HOSTS := build/test-hosts
# The files are the same for every machine; pip downloads those of one of them.
HOSTS_PLATFORM := --only-binary=:all: --python-version 3.11 --platform manylinux_2_34_x86_64

.PHONY: demo test test-all test-hosts docs check format

demo: .venv/.installed-demo
	$(BIN)/vmla run recipes/quickstart.toml -o $(OUT)

test: .venv/.installed-dev
	$(MAKE) check

test-all: .venv/.installed-dev test-hosts
	$(MAKE) check SELECT=""

test-hosts: $(HOSTS)/.downloaded

$(HOSTS)/.downloaded: tests/interop/hosts.txt | $(BIN)/python
	rm -rf $(HOSTS)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
	$(HOSTS_PLATFORM) -r $< -d $(HOSTS)
	touch $@

# The pages in docs/api are made from the modules; pages of modules that are gone would not build.
docs: .venv/.installed-dev
	rm -rf docs/_build docs/api
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs docs/_build/html

# The names under which a browser is looked for are those of tests/test_browser.py.
# Two test workers, so one thread of torch each: more would only compete.
check:
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null \
	|| echo "no chromium found: browser tests of the report are left out;" \
	"install: apt-get install chromium"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "$(SELECT)"

# The folder tests holds the models that the suite damages and kills.
faults:
	cd tests && PYTHONPATH=..:. OMP_NUM_THREADS=1 ../$(BIN)/python -m faults

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -m venv .venv

# A stamp is newer than the pyproject.toml that it installed; the interpreter only has to be there.
.venv/.installed-demo: pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) -e ".[demo]" "$(TORCH)"
	touch $@

# The [dev] extra contains [demo], so both are done.
.venv/.installed-dev: pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) -e ".[dev]"
	touch $@ .venv/.installed-demo
