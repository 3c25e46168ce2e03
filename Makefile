# Three commands do everything on a fresh machine: `make picture`, `make serve` and `make test`.
# PYTHON chooses the interpreter (3.10 or later), VENV the folder of the virtual environment.
# TORCH is what pip installs as PyTorch: the version in constraints.txt, which on Linux comes with gigabytes of GPU
# libraries. TORCH=cpu takes PyTorch's CPU build instead.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
CPU_BUILD := --index-url https://download.pytorch.org/whl/cpu torch
RUN := $(VENV)/bin/python
PROMPT ?= a red circle on a blue background
SEED ?= 1
PORT ?= 7860

.PHONY: picture serve play test test-slow lint check-data docs notebooks site clean

# A picture from the embedded model; its path is printed last.
picture: $(VENV)/installed
	@echo "Drawing with the embedded model, which takes seconds on two CPU cores."
	$(RUN) -m sd txt2img "$(PROMPT)" --seed $(SEED)

# The page and the APIs, with the embedded model; Ctrl+C ends it.
serve: $(VENV)/installed-for-serving
	$(RUN) -m sd serve --port $(PORT)

# The live model as a folder for any web server, docs/play/. The first time, it downloads the runtime for browsers.
play: $(VENV)/installed-for-export
	$(RUN) -m sd play -o docs/play

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

# Redraw the figures that need only the embedded model and the log of its training.
docs: $(VENV)/installed-for-plots
	$(RUN) scripts/figures/draw_architecture.py
	$(RUN) scripts/figures/draw_denoising.py docs/denoising.png
	$(RUN) scripts/figures/draw_course.py

# The course as Jupyter notebooks, in build/notebooks.
notebooks:
	$(PYTHON) scripts/site/make_notebooks.py

# The documentation as a web site, in site/.
site: $(VENV)/installed-for-site
	$(RUN) scripts/site/make_site.py

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a virtual environment, PyTorch and six small packages."
	$(PYTHON) -m venv $(VENV)
	@$(announce_torch)
	$(RUN) -m pip install --quiet --constraint constraints.txt $(if $(filter cpu,$(TORCH)),$(CPU_BUILD),$(TORCH))
	@echo "Installing the other packages and this one."
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

has_torch = $(RUN) -c 'import sys; from importlib.util import find_spec; sys.exit(find_spec("torch") is None)'
has_gpu = command -v nvidia-smi > /dev/null || test -e /proc/driver/nvidia || test -e /dev/dxg
define announce_torch
if $(has_torch); then echo "PyTorch is already installed."; \
elif test "$(TORCH)" != torch; then echo "Installing PyTorch ($(TORCH))$(if $(filter cpu,$(TORCH)),: about 200 MB)."; \
elif test "$$(uname -s)" = Linux && ! { $(has_gpu); }; then \
	echo "Installing PyTorch with GPU libraries, several gigabytes, though this machine seems to have no NVIDIA GPU."; \
	echo "To get the CPU build of about 200 MB, stop (Ctrl+C) and run: make $(or $(MAKECMDGOALS),picture) TORCH=cpu"; \
else echo "Installing PyTorch, the largest download: several gigabytes with GPU libraries on Linux."; fi
endef

$(VENV)/installed-for-plots: $(VENV)/installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[plots]'
	touch $@

$(VENV)/installed-for-serving: $(VENV)/installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[server]'
	touch $@

$(VENV)/installed-for-export: $(VENV)/installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[onnx]'
	touch $@

$(VENV)/installed-for-site: $(VENV)/installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[site]'
	touch $@

$(VENV)/installed-for-tests: $(VENV)/installed
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
