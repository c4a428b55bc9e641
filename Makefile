# `make demo` and `make test` set everything up first; what is done is not done again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo docs notebooks test test-long test-versions trust fuzz fuzz-files bench evidence lock clean

setup: $(VENV)/.installed

# mmcv has no wheels for current versions of torch: pip compiles it against the torch installed before it.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || \
		(echo "mmcv 2.1.0 builds on Python 3.10 to 3.12: name one, as in make $(MAKECMDGOALS) PYTHON=python3.12"; false)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch torchvision "setuptools<81" wheel ninja
	PATH="$(abspath $(BIN)):$$PATH" CFLAGS="-O2 -g0" \
		$(BIN)/python -m pip install --no-build-isolation --constraint constraints.txt mmcv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cli,docs,generation,interop,mmdet,study,sweep,test,viz]"
	touch $@

demo: setup
	$(BIN)/coconv demo --detection

test: setup docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --all-extras -n 2 --dist worksteal

# Into docs/_build/html; a warning is an error.
docs: setup
	$(BIN)/sphinx-build -W --keep-going -q -j auto docs docs/_build/html

# Run the notebooks of docs/notebooks/ anew, and keep what they print and draw: ten minutes on two cores.
notebooks: setup
	PYTHONPATH=tests $(BIN)/python -m notebooks

# What takes minutes alone.
test-long: setup
	$(BIN)/pytest --all-extras -m long

# The core on the lowest and the newest torch and timm, in .venv-lowest and .venv-newest: docs/versions.md.
test-versions: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/versions.py

# What is promised, with the number of cases that passed: docs/trust.md.
trust: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest --all-extras -n 2 --dist worksteal --junitxml=.report.xml
	PYTHONPATH=tests $(BIN)/python -m trust .report.xml

# Two thousand random networks, or as many as 30 minutes allow; it prints what it did.
fuzz: setup
	PYTHONPATH=tests $(BIN)/python -m fuzz --networks 2000 --minutes 30

# A hundred thousand damaged and hostile files, in two processes; it prints what reading them cost at most.
fuzz-files: setup
	PYTHONPATH=tests $(BIN)/python -W ignore -m fuzz.files --files 100000

# On an idle machine; two hours on two cores.
bench: setup
	$(BIN)/coconv bench surgery
	$(BIN)/coconv bench calibration
	$(BIN)/coconv bench deploy
	$(BIN)/coconv bench layers --engine eager
	$(BIN)/coconv bench layers --engine compile
	$(BIN)/coconv bench networks --engine eager
	$(BIN)/coconv bench networks --engine compile

# What calibration keeps, and what else was tried: ninety minutes on two cores, and resumable.
evidence: setup
	PYTHONPATH=benchmarks $(BIN)/python -m evidence

# Resolve the pins anew, for every Python version at once.
lock:
	uv pip compile pyproject.toml --all-extras --group build-mmcv --universal --python-version 3.10 --upgrade \
		--no-emit-index-url --no-annotate --custom-compile-command "make lock" --output-file constraints.txt

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest
