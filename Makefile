# `make` alone lists what there is to do. Every target that needs the environment sets it up first, and skips that when
# nothing has changed. PYTHON=python3.12 picks another interpreter; ARGS='…' goes on to the program that a target runs.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.NOTPARALLEL:

BIN  := .venv/bin
PINS := deploy/requirements
RUN  := .venv/.installed-run
DEV  := .venv/.installed-dev
ARGS ?=

##@ Use
.PHONY: run serve
run: $(RUN)  ## run the example batch through the service and show answers, pass map and report
	@$(BIN)/unisono run service/unisono/examples/batch.jsonl $(ARGS)

serve: $(RUN)  ## start the service on 127.0.0.1:50051
	$(BIN)/unisono serve $(ARGS)

##@ Prove
.PHONY: test check test-live test-clients faults bench bench-release bench-cancel bench-overhead bench-journal bench-passes bench-work soak
test: check  ## everything: check, then all tests, core/ at 100 % branch coverage
	$(BIN)/python -m pytest -ra --cov=unisono.core --cov-branch --cov-report=term-missing:skip-covered --cov-fail-under=100 $(ARGS)

check: $(DEV)  ## style, types, imports, generated code and the contract
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python protos/generate.py --check
	$(BIN)/python protos/generate.py --lint
	$(BIN)/python protos/generate.py --breaking

test-live: $(DEV)  ## the contract tests against a real Ollama (UNISONO_LIVE_OLLAMA, default 127.0.0.1:11434)
	UNISONO_LIVE_OLLAMA="$${UNISONO_LIVE_OLLAMA:-http://127.0.0.1:11434}" $(BIN)/python -m pytest -ra -m live $(ARGS)

test-clients: $(DEV)  ## the clients in other languages, built and run; those without a toolchain are named at the end
	$(BIN)/python -m pytest -ra -m clients tests/clients $(ARGS)

faults: $(DEV)  ## break everything: kills, outages, cuts, a full disk (half an hour); ARGS=--few, ARGS='--part cuts' less
	$(BIN)/python -m tests.faults $(ARGS)

bench: $(DEV)  ## all benches of the service's own parts
	$(BIN)/python -m tests.bench $(ARGS)

bench-release: $(DEV)  ## how close together a wave arrives, beside asyncio.gather over httpx
	$(BIN)/python -m tests.bench.release $(ARGS)

bench-cancel: $(DEV)  ## how soon a cancelled batch's connections are closed
	$(BIN)/python -m tests.bench.cancel $(ARGS)

bench-overhead: $(DEV)  ## how much longer one item takes through the service
	$(BIN)/python -m tests.bench.overhead $(ARGS)

bench-journal: $(DEV)  ## how fast 50,000 results go into the journal's file, and how soon a page comes out
	$(BIN)/python -m tests.bench.journal $(ARGS)

bench-passes: $(DEV)  ## forward passes of 16 questions on the embedded engine, beside its own counter
	$(BIN)/python -m pytest -q -s tests/acceptance -k sixteen_questions $(ARGS)

bench-work: $(DEV)  ## the workloads of `unisono bench` over a stand-in; ARGS='--workload W5 --runs 5' picks some
	$(BIN)/python -m tests.bench.work $(ARGS)

soak: $(DEV)  ## the backend service of the examples for ten minutes, with cuts; ARGS='--seconds 60 --cut-every 10'
	PYTHONPATH=clients/python/src $(BIN)/python -m tests.bench.soak $(ARGS)

##@ Change
.PHONY: fmt gen clients pins release-image
fmt: $(DEV)  ## format, and fix what ruff can fix
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

gen: $(DEV)  ## generate the code of protos/ anew
	$(BIN)/python protos/generate.py

clients: $(DEV)  ## generate the committed code of the clients anew
	$(BIN)/python protos/generate.py --clients
	@for each in clients/*/generate; do echo "$$each" && PYTHON="$(CURDIR)/$(BIN)/python" "$$each" || exit 1; done

pins: $(RUN)  ## compile the requirement files anew; ARGS=--upgrade takes the newest versions
	$(PINS)/compile $(ARGS)

release-image: $(DEV)  ## at a release: make today's contract the one that later changes are held against
	$(BIN)/python protos/generate.py --release-image

##@ House
.PHONY: setup clean help
setup: $(DEV)  ## make the environment for everything (the other targets do it by themselves)
	@echo "The environment in .venv is ready."

clean:  ## remove the environment and what the tools left
	rm -rf .venv dist htmlcov out .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -rf clients/java/target clients/rust/target clients/rust/Cargo.lock
	find service tests protos clients -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

help:  ## this list
	@awk 'BEGIN { FS = ":.*  ## "; print "make TARGET [PYTHON=python3.12] [ARGS=...]" } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*  ## / { printf "  %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# The environment. A Python named on the command line that is not the environment's own makes it anew.
$(RUN): pyproject.toml $(PINS)/install $(addprefix $(PINS)/,uv.txt build.txt runtime.txt embedded.txt model.txt)
	@$(PINS)/install run $(PYTHON)

$(DEV): pyproject.toml $(PINS)/install $(wildcard $(PINS)/*.txt)
	@$(PINS)/install dev $(PYTHON)

ifneq ($(PYTHON),)
about = $(shell $(1) -c 'import sys; print(sys.version, sys.base_prefix)' 2>/dev/null)
ifneq ($(call about,$(PYTHON)),$(call about,$(BIN)/python))
$(RUN) $(DEV): FORCE
FORCE:
endif
endif
