# make demo, make test, make lint. PYTHON= chooses the interpreter, VENV= the folder of the virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := $(BIN)/ncfinetune
FIT := $(RUN) fit --config experiments/digits/downstream.yaml --config experiments/digits
METHODS := linear_probe layer scl full
SEEDS := 0 1 2

.PHONY: demo test test-all lint
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-base
	rm -rf runs/demo
	$(RUN) fit --config experiments/digits/pretrain.yaml
	$(foreach method,$(METHODS),$(foreach seed,$(SEEDS),$(call finetune,$(method),$(seed))))
	$(RUN) report runs/demo

# A command a line, so that make shows each as it runs.
define finetune
$(FIT)/$(1).yaml --seed_everything $(2) --data.seed $(2) --trainer.logger.version $(1)-seed$(2)

endef
