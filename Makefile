# hiera-train. Every target runs one plain command; `make` lists the targets. ARGS="--flag value" adds flags.
SHELL := /bin/bash
.DEFAULT_GOAL := help
# The Python of all targets: that of the active conda environment of environment.yml, else .venv's. PY=python
# takes another one. Only .venv is made and updated here.
PY ?= $(if $(filter hiera-train,$(notdir $(CONDA_DEFAULT_ENV))),$(CONDA_PREFIX)/bin/python,.venv/bin/python)
UV := $(or $(shell command -v uv),.uv/bin/uv)
INSTALL_UV = python3 -m venv .uv && .uv/bin/python -m pip install -q 'uv>=0.9'

BENCH ?= all
NODE_RANK ?= 0
WORKERS ?= 4
MASTER ?= localhost:29500

# A value as one word of the shell.
quoted = '$(subst ','\'',$(1))'
# Flags of a training command. If a variable is empty, the value of the preset is used.
SETTINGS = $(if $(RUN),--run.name $(call quoted,$(RUN))) $(if $(DATA),--data.path $(call quoted,$(DATA))) $(if $(MODEL),--model.name $(MODEL)) \
	$(if $(INIT),--model.init $(call quoted,$(INIT))) $(if $(DEVICE),--speed.device $(DEVICE)) \
	$(if $(TUNED),$(or $(shell cat $(call quoted,$(TUNED))),$(error TUNED=$(TUNED) is empty or cannot be read)))
NAMED = $(or $(RUN),$(error name a folder in runs/ with RUN=))
OTHER = $(if $(WEIGHTS),--weights $(call quoted,$(WEIGHTS))) $(if $(DEVICE),--device $(DEVICE))
ALONE = $(if $(IMAGES)$(FRAMES)$(VIDEOS)$(TRAIN_LIST)$(VAL_LIST),$(error index TARS= alone, without IMAGES= FRAMES= VIDEOS= or lists))
PACKED = $(if $(TARS),$(ALONE)tars --train $(call quoted,$(TARS)) $(if $(VAL_TARS),--val $(call quoted,$(VAL_TARS))),all \
	$(if $(IMAGES),--images $(call quoted,$(IMAGES))) $(if $(FRAMES),--frames $(call quoted,$(FRAMES))) $(if $(VIDEOS),--videos $(call quoted,$(VIDEOS))) $(if $(TRAIN_LIST),--train-list $(call quoted,$(TRAIN_LIST))) \
	$(if $(VAL_LIST),--val-list $(call quoted,$(VAL_LIST))))
PACKING = $(if $(OUT),--out $(call quoted,$(OUT))) \
	$(if $(EXECUTOR),--executor $(EXECUTOR)) $(if $(RAY),--ray $(call quoted,$(RAY)))
# Without SIGHUP: torchrun would also handle it under nohup. 240 s to save: torchrun's default of 30 is too short.
TORCHRUN = $(PY) -m torch.distributed.run --signals-to-handle SIGTERM,SIGINT,SIGQUIT --shutdown-timeout 240
# On one machine the command itself starts GPUS processes. On several, torchrun's rendezvous connects them.
START = $(if $(NODES),TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 $(TORCHRUN) --nnodes $(NODES) --nproc-per-node $(or $(GPUS),1) --node-rank $(NODE_RANK) \
	--rdzv-backend c10d --rdzv-endpoint $(MASTER) --rdzv-id hiera-train -m,$(PY) -m)
COUNT = $(if $(NODES),,$(if $(GPUS),--speed.processes $(GPUS)))

.PHONY: help demo shards verify stage train-mae train-ft eval probe replay plot report predict preview embed bench gpu-check test faults check audit lock env env-ray clean

help:  ## print this list
	@echo "make TARGET [VARIABLE=value ...]   (ARGS=\"...\" adds flags to the command)"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  \1\t/' | expand -t 14

demo: env  ## generate pictures and clips, pack, pretrain, finetune, evaluate and report; needs no GPU
	$(PY) -m tools.demo $(ARGS)

shards: env  ## pack IMAGES=DIR and FRAMES=DIR or VIDEOS=DIR (TRAIN_LIST= VAL_LIST=FILE) into OUT=shards, or index TARS='a-{0..9}.tar' VAL_TARS=; EXECUTOR=ray RAY=HOST:PORT
	$(PY) -m tools.pack $(PACKED) $(PACKING) $(ARGS)

verify: env  ## check all checksums, indexes and labels of DATA=shards/imagenet, and decode every frame
	$(PY) -m tools.verify $(call quoted,$(or $(DATA),shards/imagenet)) $(ARGS)

stage: env  ## copy the packed dataset DATA=FOLDER or DATA=s3://... to the local folder TO=, and check it
	$(PY) -m tools.stage $(call quoted,$(or $(DATA),$(error name the packed dataset with DATA=))) \
		$(call quoted,$(or $(TO),$(error name a local folder with TO=))) $(ARGS)

train-mae: env  ## pretrain: RECIPE=image-mae-base GPUS= NODES= RUN= MODEL= DATA= INIT= TUNED=FILE DEVICE=cpu|cuda
	$(START) train.mae $(or $(RECIPE),image-mae-base) $(SETTINGS) $(COUNT) $(ARGS)

train-ft: env  ## finetune: RECIPE=image-ft-base INIT=runs/NAME/model.safetensors, and the variables of train-mae
	$(START) train.finetune $(or $(RECIPE),image-ft-base) $(SETTINGS) $(COUNT) $(ARGS)

eval: env  ## evaluate RUN=NAME; WEIGHTS=FILE evaluates other weights, DATA=DIR other shards
	$(PY) -m train.evaluate 'runs/$(NAMED)' $(OTHER) $(if $(DATA),--data $(call quoted,$(DATA))) $(ARGS)

probe: env  ## evaluate the frozen features of RUN=NAME with kNN and a linear classifier; WEIGHTS=FILE DATA=DIR
	$(PY) -m train.probe 'runs/$(NAMED)' $(OTHER) $(if $(DATA),--data $(call quoted,$(DATA))) $(ARGS)

replay: env  ## repeat step STEP=K of RUN=NAME exactly, and print its rows, first non-finite layer and gradients; DATA=DIR GPUS=
	$(PY) -m train.replay 'runs/$(NAMED)' --step $(or $(STEP),$(error name the step with STEP=)) $(if $(DATA),--data $(call quoted,$(DATA))) \
		$(if $(DEVICE),--device $(DEVICE)) $(if $(GPUS),--processes $(GPUS)) $(ARGS)

plot: env  ## plot the curves of RUN="NAME [NAME ...]"; OUT=FILE.png
	$(PY) -m tools.plot $(addprefix runs/,$(NAMED)) $(if $(OUT),--out $(call quoted,$(OUT))) $(ARGS)

report: env  ## write a page about RUN=NAME: runs/NAME/report.html; RUN="A B" compares runs: runs/report.html; OUT=FILE.html
	$(PY) -m tools.report $(addprefix runs/,$(NAMED)) $(if $(OUT),--out $(call quoted,$(OUT))) $(ARGS)

predict: env  ## classify INPUT="FILE [FOLDER ...]" with RUN=NAME (MAE: reconstruct): pictures, videos, folders of frames; OUT=FILE.csv|json|parquet
	$(PY) -m tools.predict 'runs/$(NAMED)' $(or $(INPUT),$(error name files or folders with INPUT=)) $(OTHER) $(if $(OUT),--out $(call quoted,$(OUT))) $(ARGS)

preview: env  ## draw training rows and evaluation views of RECIPE=image-ft-base DATA=: runs/preview-RECIPE.png
	$(PY) -m tools.preview $(or $(RECIPE),image-ft-base) $(SETTINGS) $(ARGS)

embed: env  ## write the features of every sample of DATA= by RUN=NAME to OUT=features.parquet; GPUS= NODES= WEIGHTS=FILE
	$(START) tools.embed 'runs/$(NAMED)' --out $(call quoted,$(or $(OUT),$(error name a Parquet file with OUT=))) $(OTHER) \
		$(if $(DATA),--data $(call quoted,$(DATA))) $(if $(NODES),,$(if $(GPUS),--processes $(GPUS))) $(ARGS)

bench: env  ## compare speed with other implementations: BENCH=all|loader|model|training|packing IMAGES=DIR
	$(PY) -m benchmarks $(BENCH) $(if $(IMAGES),$(if $(filter all loader training packing,$(BENCH)),--images $(call quoted,$(IMAGES)))) $(ARGS)

test: check  ## run check, then the tests, WORKERS=4 at a time, without the long ones of make faults
	$(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

gpu-check: env  ## check and measure this machine's GPU; DEVICE=cpu runs the checks that need none
	$(PY) -m benchmarks.gpu_check $(if $(DEVICE),--device $(DEVICE)) $(if $(OUT),--out $(call quoted,$(OUT))) $(ARGS)

faults: env  ## all reliability tests, over an hour: kill, pause, starve and corrupt runs; KILLS=50 random kills per test
	$(PY) -m pytest -m fault --kills $(or $(KILLS),50) $(ARGS)

check: env  ## check lint, format and types
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && \
		$(PY) -m pyrefly check --python-interpreter-path "$$(command -v $(PY))"

audit: env | $(UV)  ## check the pinned packages for known vulnerabilities with pip-audit; needs the internet
	$(UV) tool run pip-audit --strict --disable-pip --require-hashes -r requirements.lock -r requirements-ray.lock

lock: env | $(UV)  ## write requirements*.lock from requirements*.in
	$(UV) pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url \
		requirements.in -o requirements.lock
	$(UV) pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url \
		requirements-ray.in -o requirements-ray.lock

clean:  ## remove the environment, caches and demo results; your shards and runs are kept
	rm -rf .venv .venv.lock .uv .pytest_cache .ruff_cache data/demo shards/demo-images shards/demo-clips runs/demo-*

# ---- the environment: uv makes .venv from the lock file; uv is downloaded if it is missing
# .venv/.ready is a copy of the lock file that was installed. If the lock file differs, its packages are installed,
# and all other packages stay. Of several machines or terminals, one installs and the others wait: making a folder
# is atomic on network file systems too, where file locks may not work.
# The packages are byte-compiled once. Otherwise every process compiles what it imports (15 s for torch and timm)
# if PYTHONDONTWRITEBYTECODE is set or .venv is read-only, and all ranks do so at the first start.

env: $(if $(filter .venv/bin/python,$(PY)),.venv/.ready)  ## make .venv from requirements.lock, or update it

env-ray: env | $(UV)  ## add Ray to the environment, for make shards EXECUTOR=ray
	$(UV) pip install -q --compile-bytecode --require-hashes --python $(PY) -r requirements-ray.lock

.venv/.ready: requirements.lock
	@set -e; [ -w . ] || { echo "error: $$PWD cannot be written to; make .venv as its owner" >&2; exit 2; }; \
	for second in {0..3600}; do \
		! mkdir .venv.lock 2>/dev/null || break; \
		case $$second in \
		0) echo "waiting for $$(cat .venv.lock/owner || echo another make) to install into .venv;" \
			"if it no longer runs, remove the folder .venv.lock";; \
		3600) echo "error: .venv.lock exists for an hour; remove it if no make runs" >&2; exit 2;; \
		esac; \
		sleep 1; \
	done; \
	trap 'rm -rf .venv.lock' EXIT; trap 'exit 130' INT TERM HUP; \
	echo "process $$$$ on $$(hostname)" > .venv.lock/owner; \
	if cmp -s requirements.lock $@; then touch $@; exit; fi; \
	[ -x "$(UV)" ] || { $(INSTALL_UV); }; \
	if [ -e $@ ]; then echo "requirements.lock has changed: updating .venv; packages that you added stay"; \
	else echo "installing the packages of requirements.lock into .venv (about 7 GB)"; fi; \
	[ -x $(PY) ] || $(UV) venv -q --allow-existing --python '>=3.11,<3.14' .venv; \
	$(UV) pip install --compile-bytecode --require-hashes --python $(PY) -r requirements.lock; \
	cp requirements.lock $@

.uv/bin/uv:
	$(INSTALL_UV)
