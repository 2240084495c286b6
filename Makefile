# make demo         train the digits VAE, answer the question, prevent a collapse, say where the figures are; EPOCHS=3
#                   trains for so many
# make test         the test suite, of long sweeps some cases; LANE=ci takes all that show something of their own, and
#                   adds the doctests, the wheel, and every benchmark, example and command in short
# make test-all     the same with what is recorded computed anew, what repeats other tests, an empty environment
# make references   record anew what tests/references takes long to compute
# make test-oldest  formulas, methods, losses and callbacks with the oldest torch and Lightning that are supported, in
#                   an environment of its own (which may take several GB); make test-newest with the newest there are
# make tutorial     write examples/tutorial.ipynb and the figures of docs/tutorial.md, which it runs
# make docs         build the documentation into site/, and say where it begins
# make lint         format, lint, types
# make bench        every benchmark in full

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs
SITE ?= site
RUN := $(VENV)/bin/python
# What is imported is compiled then; all that torch brings would take a minute.
PIP := $(RUN) -m pip install --quiet --no-compile --constraint constraints.txt
# Workers take from each other's rest, since items take between a millisecond and a minute.
TEST := $(RUN) -m pytest --numprocesses auto --dist worksteal
# Set, as in many containers, it would make every process compile anew what it imports.
unexport PYTHONDONTWRITEBYTECODE
TRAINING := $(if $(EPOCHS),--epochs $(EPOCHS))
DOCTESTS := --doctest-modules --doctest-glob '*.md' torch_klloss README.md docs

LANE ?= quick
SELECT_quick := -m "not scripts and not exhaustive and not long" --cases 3
SELECT_ci := -m "not exhaustive" --durations 15 $(DOCTESTS) tests

LANES := test-oldest test-newest
# All but the test that the draws are those of which references are recorded: another torch rounds some otherwise.
IN_LANES := tests/closed_forms tests/methods tests/test_losses.py tests/callbacks \
	--ignore tests/closed_forms/test_recorded_references.py

.PHONY: demo docs tutorial test test-all $(LANES) references lint bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(RUN) examples/vae_digits.py --out $(OUT)/vae_digits $(TRAINING)
	$(RUN) -m torch_klloss demo --out $(OUT)/question
	$(RUN) examples/vae_collapse.py --out $(OUT)/vae_collapse $(TRAINING)
	@echo "figures: $(OUT)/vae_digits/images.png $(OUT)/vae_digits/kl_gap.png $(OUT)/question/question.png \
	$(OUT)/vae_collapse/annealing.png $(OUT)/vae_collapse/collapse_plain.png $(OUT)/vae_collapse/collapse_annealing.png"

test: $(VENV)/.dev
	$(TEST) $(SELECT_$(LANE))

test-all: $(VENV)/.dev
	REFERENCES=anew HYPOTHESIS_PROFILE=all $(TEST) $(DOCTESTS) tests
	.ci/wheel_alone $(VENV)

$(LANES): test-%: $(VENV)-%/.lane
	$(VENV)-$*/bin/python -c "import torch; print('torch', torch.__version__)"
	$(VENV)-$*/bin/python -m pytest --numprocesses auto --dist worksteal $(SELECT_quick) $(IN_LANES)

references: $(VENV)/.dev
	REFERENCES=record $(RUN) -m pytest $(shell grep -lrE 'errors_at|measure\(|evaluate\(' --include='test_*.py' tests/closed_forms)

docs:
	@$(RUN) -c "import latex2mathml, material, mkdocs, mkdocstrings_handlers.python" 2>/dev/null || { \
	echo "make docs needs the group docs: make $(VENV)/.dev, or $(RUN) -m pip install --group docs" >&2; exit 1; }
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --site-dir $(SITE)
	@echo "documentation: $(SITE)/index.html"

tutorial: $(VENV)/.dev
	MPLBACKEND=agg $(RUN) docs/tutorial.py --figures

lint: $(VENV)/.dev
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(VENV)/.dev
	for script in $(filter-out benchmarks/common.py,$(wildcard benchmarks/*.py)); do $(RUN) $$script || exit 1; done

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(OUT) $(SITE) dist

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade "pip>=25.1"
	@touch $@

$(VENV)/.demo: $(VENV)/.venv pyproject.toml constraints.txt
	@echo "setting up $(VENV): a minute or two"
	$(PIP) --editable ".[examples]"
	@touch $@

# All at once, which also makes what `make demo` needs.
$(VENV)/.dev: $(VENV)/.venv pyproject.toml constraints.txt
	@echo "setting up $(VENV): a minute or two"
	$(PIP) --editable ".[examples]" --group dev
	@touch $(VENV)/.demo $@

$(VENV)-%/.lane: constraints-%.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(@D)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --constraint $< --editable ".[examples]" --group test
	@touch $@
