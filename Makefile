# make demo   sets up .venv; trains, dumps and compares students on handwritten digits
# make test   sets up .venv and runs the tests
# make lint   sets up .venv and runs ruff and mypy

PYTHON ?= python3
RUNS ?= runs/digits
RUN := .venv/bin/python cli.py
DIGITS := --config configs/digits.yaml --resume

.PHONY: demo test lint clean

demo: .venv/installed
	$(RUN) train-teacher $(DIGITS) --seeds 0,1,2 --out $(RUNS)/teacher
	$(RUN) dump-logits $(DIGITS) --teacher $(RUNS)/teacher-0 --out $(RUNS)/cache.zarr
	$(RUN) train-student $(DIGITS) --seeds 0,1,2 --cache $(RUNS)/cache.zarr --out $(RUNS)/kd -o student.method.name=kd
	$(RUN) train-student $(DIGITS) --seeds 0,1,2 --cache $(RUNS)/cache.zarr --out $(RUNS)/bkd
	$(RUN) report $(RUNS)/teacher-? $(RUNS)/kd-? $(RUNS)/bkd-? --out $(RUNS)/report

test: .venv/testing
	.venv/bin/python -m pytest

# mypy finds offline_bkd by a folder of that name
lint: .venv/testing
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	mkdir -p .venv/typed && ln -sfn "$(CURDIR)" .venv/typed/offline_bkd
	MYPYPATH=.venv/typed .venv/bin/mypy

# A Debian without python3-venv makes environments only after it is installed, which root can do.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv 2>/dev/null || { rm -rf .venv; \
	  [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -q -y python3-venv && $(PYTHON) -m venv .venv; } || \
	  { echo "cannot make a virtual environment; run: sudo apt-get install python3-venv"; exit 2; }
	.venv/bin/python -m pip install --quiet --editable .
	touch $@

.venv/testing: .venv/installed
	.venv/bin/python -m pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf .venv runs/digits
