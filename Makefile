# Two commands that do all their own set-up: make demo, make test. They need Python 3.11+, and a C compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test clean

demo: $(VENV)/.installed
	$(BIN)/qcompile examples/digits.onnx --target arm-npu --calibration examples/digits_calibration.npz -o build/digits.qc
	$(BIN)/python examples/evaluate_digits.py build/digits.qc

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2

# Editable, so that the tests see the working tree.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("qcompiler needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name one with make PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,ethosu]'
	touch $@

clean:
	rm -rf $(VENV) build
