# hiera-train. Every target runs one plain command; `make` lists the targets. ARGS="--flag value" adds flags.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python

IMAGES ?= data/imagenet
FRAMES ?= data/tiny-kinetics-400
BENCH ?= all
NODE_RANK ?= 0
WORKERS ?= 2
MASTER ?= localhost:29500

# Flags of a training command. If a variable is empty, the value of the preset is used.
SETTINGS = $(if $(RUN),--run.name '$(RUN)') $(if $(DATA),--data.path '$(DATA)') $(if $(MODEL),--model.name $(MODEL)) \
	$(if $(INIT),--model.init '$(INIT)') $(if $(DEVICE),--speed.device $(DEVICE)) \
	$(if $(TUNED),$(shell cat '$(TUNED)'))
NAMED = $(or $(RUN),$(error name a folder in runs/ with RUN=))
OTHER = $(if $(WEIGHTS),--weights '$(WEIGHTS)') $(if $(DEVICE),--device $(DEVICE))
PACKED = $(if $(TARS),tars --train '$(TARS)' $(if $(VAL_TARS),--val '$(VAL_TARS)'),all --images '$(IMAGES)' \
	--frames '$(FRAMES)' $(if $(VIDEOS),--videos '$(VIDEOS)') $(if $(TRAIN_LIST),--train-list '$(TRAIN_LIST)') \
	$(if $(VAL_LIST),--val-list '$(VAL_LIST)'))
PACKING = $(if $(OUT),--out '$(OUT)') \
	$(if $(EXECUTOR),--executor $(EXECUTOR)) $(if $(RAY),--ray '$(RAY)')
# Without SIGHUP: torchrun would also handle it under nohup. 240 s to save: torchrun's default of 30 is too short.
TORCHRUN := .venv/bin/torchrun --signals-to-handle SIGTERM,SIGINT,SIGQUIT --shutdown-timeout 240
# On one machine the command itself starts GPUS processes. On several, torchrun's rendezvous connects them.
START = $(if $(NODES),TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 $(TORCHRUN) --nnodes $(NODES) --nproc-per-node $(or $(GPUS),1) --node-rank $(NODE_RANK) \
	--rdzv-backend c10d --rdzv-endpoint $(MASTER) --rdzv-id hiera-train -m,$(PY) -m)
COUNT = $(if $(NODES),,$(if $(GPUS),--speed.processes $(GPUS)))

.PHONY: help demo shards verify stage train-mae train-ft eval probe plot report predict bench gpu-check test faults check audit lock env env-ray clean

help:  ## print this list
	@echo "make TARGET [VARIABLE=value ...]   (ARGS=\"...\" adds flags to the command)"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  \1\t/' | expand -t 14

demo: env  ## generate pictures and clips, pack, pretrain, finetune, evaluate and plot; needs no GPU
	$(PY) -m tools.demo $(ARGS)

shards: env  ## pack IMAGES=DIR and FRAMES=DIR or VIDEOS=DIR (TRAIN_LIST= VAL_LIST=FILE) into OUT=shards, or index TARS='a-{0..9}.tar' VAL_TARS=; EXECUTOR=ray RAY=HOST:PORT
	$(PY) -m tools.pack $(PACKED) $(PACKING) $(ARGS)

verify: env  ## check all checksums, indexes and labels of DATA=shards/imagenet, and decode every frame
	$(PY) -m tools.verify '$(or $(DATA),shards/imagenet)' $(ARGS)

stage: env  ## copy the packed dataset DATA=FOLDER or DATA=s3://... to the local folder TO=, and check it
	$(PY) -m tools.stage '$(or $(DATA),$(error name the packed dataset with DATA=))' '$(or $(TO),$(error name a local folder with TO=))' $(ARGS)

train-mae: env  ## pretrain: RECIPE=image-mae-base GPUS= NODES= RUN= MODEL= DATA= INIT= TUNED=FILE DEVICE=cpu|cuda
	$(START) train.mae $(or $(RECIPE),image-mae-base) $(SETTINGS) $(COUNT) $(ARGS)

train-ft: env  ## finetune: RECIPE=image-ft-base INIT=runs/NAME/model.safetensors, and the variables of train-mae
	$(START) train.finetune $(or $(RECIPE),image-ft-base) $(SETTINGS) $(COUNT) $(ARGS)

eval: env  ## evaluate RUN=NAME; WEIGHTS=FILE evaluates other weights, DATA=DIR other shards
	$(PY) -m train.evaluate 'runs/$(NAMED)' $(OTHER) $(if $(DATA),--data '$(DATA)') $(ARGS)

probe: env  ## evaluate the frozen features of RUN=NAME with kNN and a linear classifier; WEIGHTS=FILE DATA=DIR
	$(PY) -m train.probe 'runs/$(NAMED)' $(OTHER) $(if $(DATA),--data '$(DATA)') $(ARGS)

plot: env  ## plot the curves of RUN="NAME [NAME ...]"
	$(PY) -m tools.plot $(addprefix runs/,$(NAMED)) $(ARGS)

report: env  ## write a page about RUN=NAME: runs/NAME/report.html; RUN="A B" compares runs: runs/report.html
	$(PY) -m tools.report $(addprefix runs/,$(NAMED)) $(ARGS)

predict: env  ## classify INPUT="FILE [FOLDER ...]" with RUN=NAME (MAE: reconstruct): pictures, videos, folders of frames
	$(PY) -m tools.predict 'runs/$(NAMED)' $(or $(INPUT),$(error name files or folders with INPUT=)) $(OTHER) $(ARGS)

bench: env  ## compare speed with other implementations: BENCH=all|loader|model|training|packing IMAGES=DIR
	$(PY) -m benchmarks $(BENCH) $(if $(filter all loader training packing,$(BENCH)),--images '$(IMAGES)') $(ARGS)

test: check  ## run check, then the tests, WORKERS=2 at a time, without the long ones of make faults
	$(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

gpu-check: env  ## check and measure this machine's GPU; DEVICE=cpu runs the checks that need none
	$(PY) -m benchmarks.gpu_check $(if $(DEVICE),--device $(DEVICE)) $(if $(OUT),--out '$(OUT)') $(ARGS)

faults: env  ## all reliability tests, over an hour: kill, pause, starve and corrupt runs; KILLS=50 random kills per test
	$(PY) -m pytest -m fault --kills $(or $(KILLS),50) $(ARGS)

check: env  ## check lint, format and types
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/pyrefly check

audit: env  ## check the pinned packages for known vulnerabilities with pip-audit; needs the internet
	$(UV) tool run pip-audit --strict --disable-pip --require-hashes -r requirements.lock -r requirements-ray.lock

lock: env  ## write requirements*.lock from requirements*.in
	$(UV) pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url \
		requirements.in -o requirements.lock
	$(UV) pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url \
		requirements-ray.in -o requirements-ray.lock

clean:  ## remove the environment, caches and demo results; your shards and runs are kept
	rm -rf .venv .uv .pytest_cache .ruff_cache data/demo shards/demo-images shards/demo-clips runs/demo-*

# ---- the environment: uv makes .venv from the lock file; uv is downloaded if it is missing
# Its files are byte-compiled once. Otherwise every process compiles what it imports (15 s for torch and timm)
# if PYTHONDONTWRITEBYTECODE is set or .venv is read-only, and all ranks do so at the first start.
UV := $(or $(shell command -v uv),.uv/bin/uv)

env: .venv/.ready  ## make .venv from requirements.lock

env-ray: env  ## add Ray to .venv, for make shards EXECUTOR=ray
	$(UV) pip install -q --compile-bytecode --require-hashes --python $(PY) -r requirements-ray.lock

.venv/.ready: requirements.lock | $(filter .uv/bin/uv,$(UV))
	$(UV) venv -q --clear --python '>=3.11,<3.14' .venv
	$(UV) pip sync -q --compile-bytecode --require-hashes --python $(PY) requirements.lock
	touch $@

.uv/bin/uv:
	python3 -m venv .uv && .uv/bin/python -m pip install -q 'uv>=0.9'
