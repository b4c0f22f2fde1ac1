# The two commands to know are `make demo` and `make test`; both set up what they need in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN = .venv/bin
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2
TRAIN = $(BIN)/python train.py --data out/latents --resume
GUIDED = $(BIN)/python -m paper.variants --data out/latents --resume --teacher weights/miniature --teacher-guidance 3

.PHONY: demo test check lint parity bench walkthrough miniature train guided tables clean

demo: .venv/ready  ## images from prompts, in out/demo/sheet.png
	$(BIN)/python sample.py --prompts docs/demo_prompts.txt --steps 4 --out out/demo

test: .venv/ready-dev lint  ## all tests, in two processes of one thread each
	$(PYTEST) --dist loadscope

check: .venv/ready-dev lint  ## the fast tests: no process, no official size, no training, no compiling, no figures
	$(PYTEST) --dist loadscope -m "not slow"

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

parity: .venv/ready-dev  ## compare every network with diffusers and transformers, SDXL at full size included
	PYTHONPATH=. $(BIN)/python tests/parity.py

miniature: .venv/ready  ## train the miniature again, from nothing
	$(BIN)/python -m miniature.train

bench: .venv/ready-dev  ## speed against diffusers, transformers, scipy
	for what in networks pipeline frechet step; do \
	  $(BIN)/python -m tools.bench $$what --json docs/speed/$$what.json || exit; done

walkthrough: .venv/ready  ## run docs/walkthrough.md again
	$(BIN)/python -m tools.walkthrough

out/latents/made_of.json: | .venv/ready
	$(BIN)/python -m tools.cache --out out/latents

train: out/latents/made_of.json  ## all stages of ProReflow on the miniature, into out/train; may be interrupted and repeated
	for stage in 1 2 3 4; do $(TRAIN) --stage $$stage || exit; done

guided: out/latents/made_of.json  ## flows of guided trajectories (not in the paper): half the NFE; an hour and a half
	$(GUIDED) --windows 8 --reuse 4 --iters 1500 --name guided-8
	$(GUIDED) --windows 4 --reuse 8 --iters 3600 --name guided-4 --student out/train/guided-8
	$(GUIDED) --windows 2 --reuse 8 --iters 1300 --name guided-2 --student out/train/guided-4

tables: .venv/ready-dev out/latents/made_of.json  ## the paper's tables in miniature; may be interrupted, too
	$(BIN)/python -m paper.tables
	$(BIN)/python -m paper.tables --table

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv out
