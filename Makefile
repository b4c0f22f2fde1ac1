# The two commands to know are `make demo` and `make test`; both set up what they need in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN = .venv/bin
TRAIN = $(BIN)/python train.py --data out/latents --resume

.PHONY: demo test lint parity bench walkthrough miniature train guided experiments clean

demo: .venv/ready  ## images from prompts, in out/demo/sheet.png
	$(BIN)/python sample.py --prompts docs/demo_prompts.txt --steps 4 --out out/demo

test: .venv/ready-dev lint  ## all tests, in two processes of one thread each: two thirds of the time of one of two
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

parity: .venv/ready-dev  ## compare every network with diffusers and transformers, SDXL at full size included
	PYTHONPATH=. $(BIN)/python tests/parity.py --full

miniature: .venv/ready  ## train the miniature again, from nothing
	$(BIN)/python miniature.py

bench: .venv/ready-dev  ## speed against diffusers, transformers, scipy; then the README's table anew
	for what in networks decode text pipeline start frechet step; do \
	  $(BIN)/python bench.py $$what --json docs/results/bench-$$what.json || exit; done
	for what in growth limit; do $(BIN)/python bench.py $$what --json docs/results/$$what.json || exit; done
	$(BIN)/python bench.py table

walkthrough: .venv/ready  ## run docs/walkthrough.md again
	$(BIN)/python docs/walkthrough.py

train: .venv/ready  ## all stages of ProReflow on the miniature, into out/train; may be interrupted and repeated
	$(BIN)/python data.py cache --out out/latents
	for stage in 1 2 3 4; do $(TRAIN) --stage $$stage || exit; done

guided: .venv/ready  ## flows of guided paths, see the README: twice as fast to sample; hours on two cores, as `train`
	$(BIN)/python data.py cache --out out/latents
	$(TRAIN) --windows 32 --teacher weights/miniature --teacher-guidance 3 --starts 1 --iters 2500 --name guided-32
	$(TRAIN) --windows 8 --teacher out/train/guided-32 --iters 1200 --name guided-8
	$(TRAIN) --windows 4 --teacher out/train/guided-8 --iters 1500 --name guided-4
	$(TRAIN) --windows 4 --teacher weights/miniature --teacher-guidance 3 --solver-steps 4 --own-starts 0.5 \
	  --student out/train/guided-4 --iters 2600 --name guided-4-own
	$(TRAIN) --windows 2 --teacher out/train/guided-4-own --own-starts 0.5 --iters 1000 --name guided-2
	$(TRAIN) --windows 1 --teacher out/train/guided-2 --iters 700 --name guided-1

experiments: .venv/ready-dev  ## the paper's tables in miniature, and the README's table anew; may be interrupted, too
	$(BIN)/python data.py cache --out out/latents
	$(BIN)/python experiments.py
	$(BIN)/python experiments.py --table

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv out
