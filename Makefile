# make demo, make test, make test-oldest, make lint, make docs, make wheel. PYTHON= is the interpreter to build on, VENV= where the virtual environment goes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
METHODS := linear_probe layer scl full
SEEDS := 0 1 2
# A process of tests for each core; what is left over in one is taken by another.
PARALLEL := --numprocesses auto --maxprocesses 8 --dist worksteal

# What touches most of torch, Lightning, torchmetrics, timm and jsonargparse for the time it takes.
OLDEST_TESTS := $(addprefix tests/test_,metrics.py tracker.py cli.py datamodules.py delta.py doctests.py finetune.py report.py scan.py)

# What a user imports; the pages of all other modules would hide it.
API := $(addprefix ncfinetune.,backbone supervised contrastive finetune callbacks datamodules metrics collapse moments \
	probes skips linearised transferability losses)

.PHONY: demo test test-slow test-oldest test-gpu soak lint docs wheel

# Pre-train on the digits 0-4, fine-tune on 5-9 in four ways, compare. Each command can be run again by itself.
# One thread: on matrices this small two are no faster, and many times slower where something else runs too.
demo: export OMP_NUM_THREADS = 1
demo: $(VENV)/installed-package
	rm -rf runs/demo
	$(BIN)/ncfinetune fit --config experiments/digits/pretrain.yaml
	$(foreach method,$(METHODS),$(foreach seed,$(SEEDS),$(call finetune,$(method),$(seed))))
	$(BIN)/ncfinetune report runs/demo

define finetune
$(BIN)/ncfinetune fit --config experiments/digits/downstream.yaml --config experiments/digits/$(1).yaml \
	--seed_everything $(2) --data.init_args.seed $(2) --trainer.logger.init_args.version $(1)-seed$(2)

endef

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not slow"

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -q $(PARALLEL) -m slow

# On the lower bounds of setup.cfg. Old releases warn of each other, so that warnings are no errors here.
test-oldest: $(VENV)-oldest/installed
	$(VENV)-oldest/bin/python -m pytest -q $(PARALLEL) -W default -m "not slow" $(OLDEST_TESTS)

$(VENV)-oldest/installed: setup.cfg
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	sed -nE 's/^ +([A-Za-z-]+)(\[.*\])?>=([0-9.]+).*/\1==\3/p' setup.cfg > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --no-compile --constraint $(@D)/constraints.txt --editable ".[test]"
	@touch $@

# On a machine with a CUDA device; without one every test is skipped, and says why.
test-gpu: $(VENV)/installed-test
	$(BIN)/python -m pytest -q -rs -m gpu

# Some 250 kills of some 90 runs, for half an hour and more; goes on where it was stopped, with what is in soak.csv.
soak: export OMP_NUM_THREADS = 1
soak: $(VENV)/installed-test
	nice $(BIN)/python experiments/benchmarks/soak.py $(SOAK)

# The API page, from the docstrings: open docs/api/index.html.
docs: $(VENV)/installed-docs
	$(BIN)/python -m pdoc --docformat google --output-directory docs/api $(API)

# What is released, checked as the package index will check it.
wheel: $(VENV)/installed-release
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ncfinetune callbacks datamodules

# What is installed is remembered by a stamp and installed again only when the package's needs change.
$(VENV)/installed-package: EXTRA :=
$(VENV)/installed-test: EXTRA := [test]
$(VENV)/installed-lint: EXTRA := [lint]
$(VENV)/installed-docs: EXTRA := [docs]
$(VENV)/installed-release: EXTRA := [release]
$(VENV)/installed-%: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, and $(PYTHON) is not; name one with PYTHON=."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "$(PYTHON) cannot make a virtual environment; install its venv module, or name another with PYTHON=."; exit 1; }
	$(BIN)/python -m pip install --quiet --editable ".$(EXTRA)" || \
		{ echo "The packages could not be installed; is there a network, and a package index that pip reaches?"; exit 1; }
	@touch $@
