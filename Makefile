# A fresh machine needs Python >= 3.11 with venv, GCC or Clang with C++17, and make; the rest comes from
# requirements/dev.txt and requirements/no-deps.txt.
PYTHON ?= python3
OUT ?= runs/demo

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
BUILT := $(VENV)/built
ORIGIN := $(VENV)/origin
EMULATOR := build/emulator
# nvcc: the machine's, else the one that `make nvcc` installs into .venv; without either there are no CUDA kernels.
NVCC = $(firstword $(shell command -v nvcc) $(wildcard $(VENV)/lib/python3*/site-packages/nvidia/cu13/bin/nvcc))
CXX_SOURCES := $(shell find csrc bindings -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.PHONY: demo test lint format bench clean nvcc emulator emulator-test mutants cuda-table gpu-check

# --resume: an interrupted demo goes on where it was, a finished one is evaluated again; remove $(OUT) to start anew.
demo: $(BUILT)
	$(BIN)/biflow demo --out $(OUT) --resume

test: $(BUILT)
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(INSTALLED)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# Whole decodes, minutes to an hour: rows, plot and table in build/. `biflow bench` times every op as well.
bench: $(BUILT)
	mkdir -p build
	$(BIN)/biflow bench --op decode --json build/decode.json --plot build/decode.png --markdown build/decode.md

# A CUDA compiler into .venv, where the machine has none. The packages put libraries where nvcc does not look.
nvcc: $(INSTALLED)
	command -v nvcc || { \
	  $(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/cuda.txt && \
	  for cuda in $(VENV)/lib/python3*/site-packages/nvidia/cu13; do ln -sfn lib $$cuda/lib64; done; }

# The CUDA kernels' source as CPU libraries over the emulator (tests/emulator).
emulator: $(BUILT)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S tests/emulator -B $(EMULATOR) -G Ninja \
	  -DTORCH_INCLUDE="$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')/include" \
	  $(if $(NVCC),-DCMAKE_PREFIX_PATH="$(abspath $(dir $(NVCC))..)") > $(EMULATOR).log || { cat $(EMULATOR).log; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(EMULATOR)

emulator-test: emulator
	$(BIN)/python -m pytest tests/kernels

# MUTANTS: how many are drawn (60); SURVIVORS: how many of them may survive (0); SEED: which are drawn (1)
mutants: emulator
	PYTHONPATH="$(CURDIR)/tests" $(BIN)/python -m emulator.mutants $(if $(MUTANTS),--count $(MUTANTS)) $(if $(SURVIVORS),--survivors $(SURVIVORS)) \
	  $(if $(SEED),--seed $(SEED))

# Registers, shared memory and instructions of every CUDA kernel, Triton's too.
cuda-table: $(BUILT)
	$(BIN)/python tests/cuda_binary.py

# On a machine with a GPU: builds with what is installed there, checks and measures everything, within nine minutes.
# OUT_DIR: folder of the results; COMMIT: name of what is measured, where there is no git.
gpu-check:
	$(PYTHON) -m benchmarks.gpu $(if $(ONLY),--only $(ONLY)) $(if $(PEER),--peer-ml-tarflow $(PEER)) \
	  $(if $(OUT_DIR),--out $(OUT_DIR)) $(if $(COMMIT),--commit $(COMMIT))

clean:
	rm -rf $(VENV) build dist *.egg-info biflow/*.so

# A virtual environment holds absolute paths: one made elsewhere, or by another Python, is made anew.
ifneq ($(shell cat $(ORIGIN) 2>/dev/null),$(CURDIR) $(PYTHON))
.PHONY: $(INSTALLED)
endif

$(INSTALLED): requirements/dev.txt requirements/no-deps.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("expected Python >= 3.11 (the pinned versions need it), got " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -r requirements/no-deps.txt
	echo "$(CURDIR) $(PYTHON)" > $(ORIGIN)
	touch $@

# The package is installed in place: changes in biflow/ need no rebuild.
$(BUILT): $(INSTALLED) $(CXX_SOURCES) CMakeLists.txt setup.py pyproject.toml
	PATH="$(CURDIR)/$(BIN):$$PATH" CUDACXX="$(abspath $(NVCC))" $(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e .
	touch $@
