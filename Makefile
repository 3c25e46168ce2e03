# Two commands do everything on a fresh machine: `make picture` and `make test`.
# PYTHON chooses the interpreter (3.10 or later), VENV the folder of the virtual environment.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PROMPT ?= a red circle on a blue background
SEED ?= 1

.PHONY: picture test test-slow lint check-data docs clean

# A picture from the embedded model; its path is printed last.
picture: $(VENV)/installed
	$(RUN) -m sd txt2img "$(PROMPT)" --seed $(SEED)

# Narrow networks, no downloads. An idle process takes over half of what another still has to do.
test: $(VENV)/installed-for-tests
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Full-size networks and multi-gigabyte files: 12 GB of memory, 10 GB of disk.
test-slow: $(VENV)/installed-for-tests
	$(RUN) -m pytest -m slow

lint: $(VENV)/installed-for-tests
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Rebuild the tokenizer's table from its published source and compare.
check-data: $(VENV)/installed
	$(RUN) scripts/checks/build_merges.py --check

# Draw every figure of the docs again.
docs: $(VENV)/installed-for-plots
	$(RUN) scripts/figures/draw_architecture.py docs/architecture.svg
	$(RUN) scripts/figures/draw_course.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-for-plots: $(VENV)/installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[plots]'
	touch $@

$(VENV)/installed-for-tests: $(VENV)/installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
