# Self-contained: the first target run on a fresh clone makes .venv and installs the project there.
#   make demo | test | test-all | test-cpp | test-emulated | test-interpreted | test-triton-launch |
#        test-newest | races | mutants | lint | bench | bench-host | bench-curvature | bench-page |
#        reproduction | docs | docs-serve | gpu-gate | clean
# EIGENFILTER_CUDA=AUTO|ON|OFF and EIGENFILTER_WERROR=ON|OFF reach the build.

PYTHON ?= python3
# A build of the CUDA kernels takes minutes: by default, only where there is a GPU.
EIGENFILTER_CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),AUTO,OFF)
EIGENFILTER_WERROR ?= OFF

BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
VENV := .venv/.made
INSTALLED := .venv/.installed
TEST_TOOLS := .venv/.test-tools
DEV_TOOLS := .venv/.dev-tools
CSRC := $(wildcard csrc/*/*.*)
CPP_TESTS := $(wildcard tests/cpp/*.?pp)
# An editable installation knows the modules that were there: their list is newer where one is new.
MODULES := .venv/.modules
list_modules = find python -name '*.py' | LC_ALL=C sort
$(shell test ! -e $(MODULES) || $(list_modules) | cmp -s - $(MODULES) || $(list_modules) > $(MODULES))

.PHONY: install demo test test-all test-cpp emulated test-emulated test-interpreted test-triton-launch \
	test-newest races mutants lint bench host-extension bench-host bench-curvature bench-page reproduction docs \
	docs-serve gpu-gate clean

install: $(DEV_TOOLS)

$(VENV):
	@echo "Making .venv"
	@$(PYTHON) -m venv .venv
	@$(PIP) install --upgrade pip
	@touch $@

$(MODULES): | $(VENV)
	@$(list_modules) > $@

$(INSTALLED): $(VENV) pyproject.toml CMakeLists.txt $(CSRC) $(MODULES)
	@echo "Installing torch and building eigenfilter: about two minutes"
	@$(PIP) install --editable ".[demo]" \
		-C cmake.define.EIGENFILTER_CUDA=$(EIGENFILTER_CUDA) \
		-C cmake.define.EIGENFILTER_WERROR=$(EIGENFILTER_WERROR)
	@touch $@

$(TEST_TOOLS): $(INSTALLED)
	@echo "Installing what the tests need"
	@$(PIP) install --group test
	@touch $@

$(DEV_TOOLS): $(TEST_TOOLS)
	@echo "Installing the tools of development"
	@$(PIP) install --group dev
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/eigenfilter demo --out out/demo

# The essential tests: about five minutes on two processors. `make test-all` runs the slow ones, too.
# A file's tests stay in one process, whose fixtures they share; the slowest are printed.
PYTEST := -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile \
	--no-loadscope-reorder --durations 10
test: $(TEST_TOOLS)
	$(BIN)/python $(PYTEST) -m "not slow"

test-all: test
	$(BIN)/python $(PYTEST) -m slow

# The C++ unit tests, once for each instruction set. They need doctest: apt-get install doctest-dev.
CPP := build/cpp
test-cpp: $(DEV_TOOLS)
	PATH=$(CURDIR)/$(BIN):$$PATH cmake -G Ninja -S . -B $(CPP) \
		-DEIGENFILTER_CPP_TESTS=ON -DEIGENFILTER_CUDA=OFF \
		-DEIGENFILTER_WERROR=$(EIGENFILTER_WERROR) \
		-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
		-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/ninja -C $(CPP) cpp_tests
	PATH=$(CURDIR)/$(BIN):$$PATH ctest --test-dir $(CPP) --output-on-failure

# The CUDA kernels, run on the CPU by an emulator. SANITIZER=address and =thread take longer.
SANITIZER ?= none
EMULATED_TESTS ?= tests/kernels tests/optimizers
EMULATED := build/emulated/$(SANITIZER)
emulated: $(DEV_TOOLS)
	PATH=$(CURDIR)/$(BIN):$$PATH cmake -G Ninja -S tests/cuda_on_cpu -B $(EMULATED) \
		-DSANITIZER=$(SANITIZER) -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
		-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/ninja -C $(EMULATED)

test-emulated: emulated
	tests/cuda_on_cpu/run.sh $(SANITIZER) $(PYTEST) --capture=sys $(EMULATED_TESTS)

races:
	$(MAKE) emulated SANITIZER=thread
	tests/cuda_on_cpu/run.sh thread tests/cuda_on_cpu/races.py

mutants: $(DEV_TOOLS)
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python tests/cuda_on_cpu/mutants.py

# The Triton kernels, run on the CPU by Triton's interpreter.
test-interpreted: $(DEV_TOOLS)
	EIGENFILTER_TEST_BACKEND=interpreted $(BIN)/python $(PYTEST) tests/kernels

# Every launch of the Triton kernels, up to the launch itself, by another Triton than .venv has.
TRITON ?= 3.6.0
OTHER_TRITON := build/triton-$(TRITON)
$(OTHER_TRITON)/.installed: $(VENV)
	$(PIP) install --no-deps --upgrade --target $(@D) triton==$(TRITON)
	touch $@

test-triton-launch: $(DEV_TOOLS) $(OTHER_TRITON)/.installed
	PYTHONPATH=$(CURDIR)/$(OTHER_TRITON) EIGENFILTER_TEST_TRITON=$(TRITON) \
		$(BIN)/python -m pytest tests/kernels/test_triton_launch.py

# The integrations with the newest versions of all their frameworks, in an environment of their own.
NEWEST := build/newest
test-newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		--group newest ".[demo]" \
		-C build-dir=$(NEWEST)/{wheel_tag} -C cmake.define.EIGENFILTER_CUDA=OFF
	$(NEWEST)/bin/python -m pip list
	$(NEWEST)/bin/python $(PYTEST) tests/integrations

lint: $(DEV_TOOLS)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CSRC) $(CPP_TESTS)
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(DEV_TOOLS)
	$(BIN)/eigenfilter bench --out benchmarks/results
	$(BIN)/eigenfilter bench memory --out benchmarks/results
	$(BIN)/eigenfilter bench finite-differences --out benchmarks/results

# What a launch costs the host. Its extension has CUDA launches that run nothing; no GPU is needed.
HOST := build/host
host-extension: $(DEV_TOOLS)
	PATH=$(CURDIR)/$(BIN):$$PATH cmake -G Ninja -S tests/cuda_on_cpu/host -B $(HOST) \
		-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
		-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/ninja -C $(HOST)

bench-host: host-extension
	$(BIN)/eigenfilter bench host --out benchmarks/results

# Reads MNIST, Fashion-MNIST and CIFAR-10 from EIGENFILTER_DATA; the second takes some 20 minutes.
bench-curvature: $(DEV_TOOLS)
	$(BIN)/eigenfilter bench curvature --out benchmarks/results
	$(BIN)/eigenfilter bench curvature --only wide-cifar10 --only resnet-cifar10 --out benchmarks/results

# The newest results of each kind as a page with figures.
newest = $(lastword $(sort $(wildcard benchmarks/results/*-$(1).json)))
RESULTS ?= $(foreach kind,cpu cpu-host cpu-memory cpu-curvature cpu-curvature-large cuda cuda-memory,$(call newest,$(kind)))
bench-page: $(DEV_TOOLS)
	$(BIN)/eigenfilter bench page $(RESULTS) --out docs

# MNIST and Fashion-MNIST in full, from EIGENFILTER_DATA or downloaded; goes on where it was stopped.
reproduction: $(DEV_TOOLS)
	mkdir -p docs/reproduction
	for name in mnist fashion; do \
		$(BIN)/eigenfilter reproduce $$name --out out/reproduce-$$name || exit; \
		cp out/reproduce-$$name/summary.md docs/reproduction/$$name.md; \
		cp out/reproduce-$$name/spectra.png docs/figures/reproduction-$$name.png; \
	done

# The documentation, into build/site; without a network. A warning is an error.
docs: $(DEV_TOOLS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The same at http://127.0.0.1:8000, built again when a page changes.
docs-serve: $(DEV_TOOLS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --watch python

# Brings its own installation where the system's python has torch; see the script. STAGES="build smoke"
# runs these alone, AGAIN=1 also what has passed, WITHIN=540 ends by then.
gpu-gate:
	$(PYTHON) -m benchmarks.gpu_gate $(STAGES) $(if $(AGAIN),--again) $(if $(WITHIN),--within $(WITHIN))

# Keeps .venv, which is slow to make.
clean:
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find benchmarks python tests -name __pycache__ -type d -prune -exec rm -rf {} +
