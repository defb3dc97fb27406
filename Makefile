# Each command of llm-align is a target:  make sft RECIPE=alpaca BASE=llama-2-7b ARGS="train.epochs=1"
# Each target builds the environment that it needs. VENV= names another environment than .venv.

VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
RECIPE ?=
PIPELINE ?=
BASE ?=
DATA ?=
ADAPTER ?=
FROM ?=
REWARD ?=
OUT ?=
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
STAGES := $(subst _,-,$(filter-out __init__,$(notdir $(basename $(wildcard finetune/stages/*.py align/stages/*.py)))))
PLANNED = $(if $(BASE),--base $(BASE)) $(if $(DATA),--data $(DATA)) $(if $(ADAPTER),--adapter $(ADAPTER)) \
          $(if $(FROM),--from $(FROM)) $(if $(REWARD),--reward $(REWARD))
OPTIONS = $(PLANNED) $(if $(OUT),--out $(OUT))

.DEFAULT_GOAL := help
.PHONY: help venv $(STAGES) run rlhf list show data plan chat generate finish eval merge test test-all test-gpu check docs tiny-base tiny-data compare clean

help:  ## show this help
	@echo "make TARGET [RECIPE=r] [BASE=b] [DATA=d] [ADAPTER=a] [FROM=run] [REWARD=run] [OUT=dir] [ARGS=\"section.key=value ...\"]"
	@echo
	@echo "  $(STAGES)   run a stage; without RECIPE, its quickstart: bundled model and data, offline, on the CPU"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  %-12s %s\n", $$1, $$2}'

$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[dev]"
	@touch $@

venv: $(READY)  ## build the environment

$(STAGES): $(READY)
	$(BIN)/llm-align $@ $(RECIPE) $(OPTIONS) $(ARGS)

run: $(READY)  ## run a pipeline, several stages in one file: make run PIPELINE=zephyr BASE=mistral-7b
	$(BIN)/llm-align run $(PIPELINE) $(if $(BASE),--base $(BASE)) $(if $(OUT),--out $(OUT)) $(ARGS)

rlhf: $(READY)  ## run InstructGPT's pipeline on the bundled model: SFT, reward model, PPO
	$(BIN)/llm-align run instructgpt $(if $(BASE),--base $(BASE)) $(if $(OUT),--out $(OUT)) $(ARGS)

list: $(READY)  ## list recipes, pipelines, adapters, templates, losses, bases, stages, runs
	$(BIN)/llm-align list $(ARGS)

show: $(READY)  ## show every value of a recipe with its origin
	$(BIN)/llm-align show $(RECIPE) $(PLANNED) $(ARGS)

data: $(READY)  ## preview tokenized data and loss mask: make data RECIPE=alpaca ARGS="--rows 5 --html data.html"
	$(BIN)/llm-align data $(RECIPE) $(PLANNED) $(ARGS)

plan: $(READY)  ## estimate memory, time and disk before anything is loaded: make plan RECIPE=alpaca BASE=llama-2-7b ARGS="--gpu 24GB"
	$(BIN)/llm-align plan $(RECIPE) $(PLANNED) $(ARGS)

chat: $(READY)  ## chat with a finished run: make chat RUN=runs/...
	$(BIN)/llm-align chat $(RUN) $(ARGS)

generate: $(READY)  ## answer every row of a file: make generate RUN=runs/... DATA=questions.jsonl OUT=answers.jsonl
	$(BIN)/llm-align generate $(RUN) $(DATA) $(if $(OUT),--out $(OUT)) $(ARGS)

compare: $(READY)  ## compare runs: make compare RUNS="runs/... runs/..." ARGS="--html compare.html"
	$(BIN)/llm-align compare $(RUNS) $(ARGS)

finish: $(READY)  ## make a finished run of an interrupted one at its last checkpoint: make finish RUN=runs/...
	$(BIN)/llm-align finish $(RUN) $(ARGS)

eval: $(READY)  ## evaluate a run on suites, against its base: make eval RUN=runs/... SUITE=truthfulqa
	$(BIN)/llm-align eval $(RUN) $(if $(SUITE),--suite $(SUITE)) $(ARGS)

merge: $(READY)  ## merge a run's adapter into its base: make merge RUN=runs/...
	$(BIN)/llm-align merge $(RUN) $(ARGS)

test: $(READY)  ## run the tests, about 10 minutes
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-all: $(READY)  ## run all tests, including the slow ones
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "slow or not slow" $(ARGS)

test-gpu: $(READY)  ## run the tests that need a GPU; they skip without one
	$(BIN)/python -m pytest -n 0 -m gpu -rs tests/gpu $(ARGS)

check: $(READY)  ## run ruff, mypy and the tests, as in CI
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

$(VENV)/.docs: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[docs]"
	@touch $@

docs: $(VENV)/.docs  ## build the documentation site: build/site/index.html
	$(BIN)/zensical build --strict

tiny-base: $(READY)  ## train the bundled base model from scratch (about 40 minutes on two cores)
	$(BIN)/python -m tools.tiny.train_base --out recipes/tiny/model

tiny-data: $(READY)  ## regenerate the bundled data
	$(BIN)/python -m tools.tiny.data --out recipes/tiny/data

bench-%: $(READY)  ## run a benchmark: make bench-sft, against another program; make bench-compare, all adapters
	$(BIN)/python -m benchmarks.$* $(ARGS)

clean:  ## delete the environment and caches, not the runs
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
