# A fresh machine needs Python >= 3.11 with venv, GCC or Clang with C++17, and make; the rest comes from
# requirements/dev.txt.
PYTHON ?= python3
OUT ?= runs/demo

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
BUILT := $(VENV)/built
ORIGIN := $(VENV)/origin
CXX_SOURCES := $(shell find csrc bindings -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.PHONY: demo test lint format bench clean

# --resume: an interrupted demo goes on where it was, a finished one is evaluated again; remove $(OUT) to start anew.
demo: $(BUILT)
	$(BIN)/biflow demo --out $(OUT) --resume

test: $(BUILT)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(INSTALLED)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(BUILT)
	$(BIN)/biflow bench

clean:
	rm -rf $(VENV) build dist *.egg-info biflow/*.so

# A virtual environment holds absolute paths: one made elsewhere, or by another Python, is made anew.
ifneq ($(shell cat $(ORIGIN) 2>/dev/null),$(CURDIR) $(PYTHON))
.PHONY: $(INSTALLED)
endif

$(INSTALLED): requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("expected Python >= 3.11 (the pinned versions need it), got " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/dev.txt
	echo "$(CURDIR) $(PYTHON)" > $(ORIGIN)
	touch $@

# The package is installed in place: changes in biflow/ need no rebuild.
$(BUILT): $(INSTALLED) $(CXX_SOURCES) CMakeLists.txt setup.py pyproject.toml
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e .
	touch $@
