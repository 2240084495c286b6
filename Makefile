# make demo   train the digits VAE, answer the question, prevent a collapse, say where the figures are
# make test   the whole test suite
# make lint   format, lint, types
# make bench  every benchmark in full

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --constraint constraints.txt

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(RUN) examples/vae_digits.py --out $(OUT)/vae_digits
	$(RUN) -m torch_klloss demo --out $(OUT)/question
	$(RUN) examples/vae_collapse.py --out $(OUT)/vae_collapse
	@echo "figures: $(OUT)/vae_digits/images.png $(OUT)/vae_digits/kl_gap.png $(OUT)/question/question.png \
	$(OUT)/vae_collapse/annealing.png $(OUT)/vae_collapse/collapse_plain.png $(OUT)/vae_collapse/collapse_annealing.png"

test: $(VENV)/.dev
	$(RUN) -m pytest --numprocesses auto

lint: $(VENV)/.dev
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(VENV)/.dev
	for script in $(filter-out benchmarks/common.py,$(wildcard benchmarks/*.py)); do $(RUN) $$script || exit 1; done

clean:
	rm -rf $(VENV) $(OUT) dist

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade "pip>=25.1"
	@touch $@

$(VENV)/.demo: $(VENV)/.venv pyproject.toml constraints.txt
	@echo "setting up $(VENV): a minute or two"
	$(PIP) --editable ".[examples]"
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --group dev
	@touch $@
