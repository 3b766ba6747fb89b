# hiera-train. Every target is one plain command; `make` lists them. Pass anything on with ARGS="--flag value".
SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python

IMAGES ?= data/imagenet
FRAMES ?= data/tiny-kinetics-400
BENCH ?= all
NODE_RANK ?= 0
WORKERS ?= 2
MASTER ?= localhost:29500

# What a training command takes from the variables; those left empty keep the preset's value.
SETTINGS = $(if $(RUN),--run.name '$(RUN)') $(if $(DATA),--data.path '$(DATA)') $(if $(MODEL),--model.name $(MODEL)) \
	$(if $(INIT),--model.init '$(INIT)') $(if $(DEVICE),--speed.device $(DEVICE)) \
	$(if $(TUNED),$(shell cat '$(TUNED)'))
NAMED = $(or $(RUN),$(error name a run below runs/ with RUN=))
OTHER = $(if $(WEIGHTS),--weights '$(WEIGHTS)') $(if $(DEVICE),--device $(DEVICE))
PACKING = $(if $(VIDEOS),--videos '$(VIDEOS)') $(if $(OUT),--out '$(OUT)') \
	$(if $(EXECUTOR),--executor $(EXECUTOR)) $(if $(RAY),--ray '$(RAY)')
# Not SIGHUP: torchrun would handle it under nohup too, where it is ignored. 240 s to save; its own 30 are too few.
TORCHRUN := .venv/bin/torchrun --signals-to-handle SIGTERM,SIGINT,SIGQUIT --shutdown-timeout 240
# One machine: the command starts GPUS processes itself. Several: torchrun's rendezvous joins them.
START = $(if $(NODES),TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 $(TORCHRUN) --nnodes $(NODES) --nproc-per-node $(or $(GPUS),1) --node-rank $(NODE_RANK) \
	--rdzv-backend c10d --rdzv-endpoint $(MASTER) --rdzv-id hiera-train -m,$(PY) -m)
COUNT = $(if $(NODES),,$(if $(GPUS),--speed.processes $(GPUS)))

.PHONY: help demo shards verify stage train-mae train-ft eval probe plot report predict bench gpu-check test faults check audit lock env env-ray clean

help:  ## this list
	@echo "make TARGET [VARIABLE=value ...]   (ARGS=\"...\" is passed on to the command)"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  \1\t/' | expand -t 14

demo: env  ## draw data, pack, pretrain, finetune, evaluate and plot images and clips, on any machine
	$(PY) -m tools.demo $(ARGS)

shards: env  ## pack IMAGES=data/imagenet and FRAMES=data/tiny-kinetics-400, or VIDEOS=DIR, into OUT=shards/; EXECUTOR=ray RAY=HOST:PORT
	$(PY) -m tools.pack --images '$(IMAGES)' --frames '$(FRAMES)' $(PACKING) $(ARGS)

verify: env  ## check every byte, index and label of DATA=shards/imagenet
	$(PY) -m tools.verify '$(or $(DATA),shards/imagenet)' $(ARGS)

stage: env  ## copy DATA=FOLDER or DATA=s3://... to this machine's disk TO=FOLDER, checked
	$(PY) -m tools.stage '$(or $(DATA),$(error name the source with DATA=))' '$(or $(TO),$(error name a folder on this machine with TO=))' $(ARGS)

train-mae: env  ## pretrain: RECIPE=image-mae-base GPUS NODES RUN MODEL DATA INIT TUNED=FILE DEVICE=cpu|cuda
	$(START) train.mae $(or $(RECIPE),image-mae-base) $(SETTINGS) $(COUNT) $(ARGS)

train-ft: env  ## finetune: RECIPE=image-ft-base INIT=runs/NAME/model.safetensors GPUS NODES RUN MODEL DATA TUNED DEVICE
	$(START) train.finetune $(or $(RECIPE),image-ft-base) $(SETTINGS) $(COUNT) $(ARGS)

eval: env  ## evaluate RUN=NAME, or other WEIGHTS=FILE with its settings, or other DATA
	$(PY) -m train.evaluate 'runs/$(NAMED)' $(OTHER) $(if $(DATA),--data '$(DATA)') $(ARGS)

probe: env  ## kNN and linear probe of RUN=NAME, or its other WEIGHTS=FILE, on its shards or other DATA
	$(PY) -m train.probe 'runs/$(NAMED)' $(OTHER) $(if $(DATA),--data '$(DATA)') $(ARGS)

plot: env  ## draw the curves of RUN="NAME [NAME ...]"
	$(PY) -m tools.plot $(addprefix runs/,$(NAMED)) $(ARGS)

report: env  ## one page about RUN=NAME, with everything in it: runs/NAME/report.html
	$(PY) -m tools.report 'runs/$(NAMED)' $(ARGS)

predict: env  ## what RUN=NAME makes of INPUT="FILE [FOLDER ...]": pictures, videos, folders of frames
	$(PY) -m tools.predict 'runs/$(NAMED)' $(or $(INPUT),$(error name what to look at with INPUT=)) $(OTHER) $(ARGS)

bench: env  ## measure speed side by side: BENCH=all|loader|model|training|packing IMAGES=DIR
	$(PY) -m tools.bench $(BENCH) $(if $(filter all loader training packing,$(BENCH)),--images '$(IMAGES)') $(ARGS)

test: check  ## all tests, after check; WORKERS=2 tests at a time
	$(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

gpu-check: env  ## check and time this machine's GPU, ten minutes; DEVICE=cpu runs what the CPU can
	$(PY) -m tools.gpu_check $(if $(DEVICE),--device $(DEVICE)) $(if $(OUT),--out '$(OUT)') $(ARGS)

faults: env  ## what a hostile week does to a run, as a table; KILLS=50 per test at random moments
	$(PY) -m pytest -m fault --kills $(or $(KILLS),50) $(ARGS)

check: env  ## lint, format, types
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/pyrefly check

audit: env  ## known vulnerabilities of the locked packages, by pip-audit; needs the internet
	$(UV) tool run pip-audit --strict --disable-pip --require-hashes -r requirements.lock -r requirements-ray.lock

lock: env  ## requirements*.in -> requirements*.lock
	$(UV) pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url \
		requirements.in -o requirements.lock
	$(UV) pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url \
		requirements-ray.in -o requirements-ray.lock

clean:  ## remove the environment, caches and demo results; shards and runs of yours stay
	rm -rf .venv .uv .pytest_cache .ruff_cache data/demo shards/demo-images shards/demo-clips runs/demo-*

# ---- the environment: .venv from the lock, by uv, which is fetched when missing
# Compiled once here: otherwise each process compiles what it imports (15 s for torch and timm) where
# PYTHONDONTWRITEBYTECODE is set or .venv is read-only, and all ranks do so at once at the first start.
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
