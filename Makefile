PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
SANITIZED := build/sanitized
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu')

.PHONY: install demo test test-slow test-matrix docs bench lint sanitize clean

install: $(STAMP)

# The compiled module is rebuilt whenever a C++ file changes.
$(STAMP): pyproject.toml setup.py CMakeLists.txt constraints.txt $(CPP)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_BUILD_CONSTRAINT=$(CURDIR)/constraints.txt \
	$(BIN)/pip install -q --disable-pip-version-check -e '.[test]'
	touch $@

demo: install
	$(BIN)/python -m fastadv.train

test: install
	$(BIN)/python -m pytest -m 'not slow and not gpu' -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: install
	$(BIN)/python -m pytest -m 'slow and not gpu' --timeout 3600 -n auto --maxprocesses 4 --dist worksteal

# The tests again with the oldest Python and torch that pyproject.toml promises and with the newest
# torch that installs, each in an environment of its own.
PYTHON_oldest ?= python3.10
PYTHON_newest ?= $(PYTHON)
TORCH_oldest := torch==2.8.0
TORCH_newest := torch
test-matrix: matrix-oldest matrix-newest

matrix-%:
	test -d build/matrix/$* || $(PYTHON_$*) -m venv build/matrix/$*
	build/matrix/$*/bin/pip install -q --disable-pip-version-check '$(TORCH_$*)' -e '.[test]'
	build/matrix/$*/bin/python -c 'import sys, torch; print(sys.version.split()[0], torch.__version__)'
	build/matrix/$*/bin/python -m pytest -m 'not slow and not gpu' -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The pages of docs/ as build/docs/index.html; a warning is an error.
docs: install
	$(BIN)/sphinx-build -W --keep-going -q -E docs build/docs

bench: install
	$(BIN)/python -m pytest $(filter-out %attack.py %networks.py %train_step.py %teacher_cache.py %evaluate.py,$(wildcard benchmarks/bench_*.py)) --benchmark-autosave

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/clang-format --dry-run --Werror $(CPP) tests/kernels/*.cpp

# The tests of the ops and of the CUDA kernels' emulation again, with the C++ under AddressSanitizer
# and UndefinedBehaviorSanitizer.
sanitize: install
	rm -rf $(SANITIZED)
	CMAKE_ARGS=-DFASTADV_SANITIZE=ON $(BIN)/pip install -q --no-deps --target $(SANITIZED) .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) $(BIN)/pytest \
	tests/ops tests/kernels/test_cuda_emulate.py -m 'not slow and not gpu'

clean:
	rm -rf $(VENV) build *.egg-info fastadv/*.so
