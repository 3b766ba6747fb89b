"""python -m tests.fakegpu.child REPORT IMAGES CLIPS RUNS SCENARIO...: trainings on the imitated CUDA runtime.

Runs the scenarios one after the other in this process, because importing torch takes longer than most of
them, and appends a line of JSON for each to REPORT: its name, what it found, and its error if it raised one.
The runtime imitates; it never measures. No figure from it may appear as a GPU figure.
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.parallel.distributed as ddp

import train  # sets OpenMP's waiting before torch is imported  # noqa: F401
from pipelines import loader
from pipelines.decode import Decoder
from pipelines.errors import UserError, run_cli
from tests.train_helpers import small
from train import finetune, loop, mae, task
from train.config import Config, MaeConfig, from_dict, to_dict
from train.meters import Recorder
from train.presets import FINETUNE_PRESETS, MAE_PRESETS

RUNTIME = ctypes.CDLL(None)
HANG_S = 40
SYNC = "called a synchronizing CUDA operation"
RECIPES = ("image-mae-base", "image-ft-base", "video-mae-base", "video-ft-base")


class Dim3(ctypes.Structure):
    """A grid or a block of a launch."""

    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


def imitate(lag_ms: int = 0, memory_mb: int = 80 << 10, hang_s: int = 0) -> None:
    RUNTIME.fakegpu_set(ctypes.c_long(lag_ms), ctypes.c_long(memory_mb), ctypes.c_long(hang_s))


# ---- what cannot run on the imitated runtime is replaced


class UploadingDecoder(Decoder):
    """A decoder whose DALI graph runs on the CPU and whose frames are uploaded."""

    def __post_init__(self) -> None:
        self.target, self.device, self.resize_on_cpu = self.device, torch.device("cpu"), True
        super().__post_init__()

    def take(self):
        rows, frames = super().take()
        return rows, frames.pin_memory().to(self.target, non_blocking=True)


def replace_parts() -> None:
    """Route around cuDNN, DALI's GPU operators, and checks of values that a device computes or exchanges.

    DALI decodes on the CPU and its batch is uploaded. Python objects are exchanged over gloo, tensors over
    nccl.
    """
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    loader.Decoder = UploadingDecoder
    init = dist.init_process_group
    dist.init_process_group = lambda backend, **rest: init(f"cpu:gloo,cuda:{backend}", **rest)
    # In `task`, too: a command's module is imported again as __main__.
    task.check_damage = mae.check_damage = finetune.check_damage = lambda *_: None
    ddp._verify_param_shape_across_processes = lambda *_, **__: None


# ---- what is watched while training


class Watch:
    """The lines that wait for the device within steps, the allocated memory of every step, a planned failure.

    A step is watched from its first micro batch to the moment its metric row may be read, from the third step
    on: the first ones allocate. "warn" instead of "error" lists all waits, not the first alone.
    """

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.memory: list[int] = []
        self.fail_at = 0
        self.peak_before = 0  # bytes at most allocated before the first step
        accumulate, settle = loop._accumulate, Recorder.settle
        warnings.simplefilter("always")
        warnings.showwarning = self._note

        def watched_accumulate(*arguments):
            if not self.memory:
                self.peak_before = torch.cuda.max_memory_allocated()
            self.memory.append(torch.cuda.memory_allocated())
            if len(self.memory) == self.fail_at:
                write(sys.argv[1], {"scenario": "fails", "begins": True})
                raise UserError("THE REASON; WHAT TO DO.")
            torch.cuda.set_sync_debug_mode("warn" if len(self.memory) > 2 else "default")
            return accumulate(*arguments)

        def watched_settle(recorder):
            torch.cuda.set_sync_debug_mode("default")
            settle(recorder)

        loop._accumulate, Recorder.settle = watched_accumulate, watched_settle

    def _note(self, message, _category, filename, line, *_):
        if SYNC in str(message):
            name = os.path.relpath(filename)
            self.waits.append(f"{name.partition('site-packages/')[2] or name}:{line}")

    def start(self) -> None:
        self.waits, self.memory = [], []


@dataclasses.dataclass(frozen=True)
class Setup:
    images: Path
    clips: Path
    runs: Path
    watch: Watch

    def config(self, preset: str, name: str, **changes: object) -> Config:
        """A small version of a preset; `optim__ema=0.9` sets optim.ema."""
        data = self.clips if preset.startswith("video") else self.images
        values = to_dict(small(preset, data, self.runs, name))
        changes = {"speed__device": "cuda", "speed__compile": "no", "run__log_every": 1, **changes}
        for key, value in changes.items():
            group, _, field = key.rpartition("__")
            (values[group] if group else values)[field] = value
        return from_dict(values)

    def train(self, config: Config) -> dict:
        """Train; gives the exit code, the waits within steps, and the memory at the start of each step."""
        self.watch.start()
        loop.main(config, mae.make_task if isinstance(config, MaeConfig) else finetune.make_task)
        torch.cuda.set_sync_debug_mode("default")
        return {
            "waits": sorted(set(self.watch.waits)),
            "memory": self.watch.memory,
            "steps": len(self.watch.memory),
        }


# ---- scenarios of one process


def broadcast_then_read(values: torch.Tensor) -> list[float]:
    """What the host reads of a tensor on a device after NCCL has broadcast it from this process."""
    pointer = ctypes.c_void_p(values.data_ptr())
    RUNTIME.ncclBroadcast(pointer, pointer, ctypes.c_size_t(len(values)), 7, 0, None, None)
    return values.tolist()


def controls(_: Setup) -> dict:
    """Does the runtime show a value read too early, a wait, and a launch that a device refuses?

    A broadcast of values that were just uploaded can be read, as DDP does; one of values that a kernel may
    have written reads as zeros.
    """
    uploaded = broadcast_then_read(torch.ones(4).to("cuda"))
    written = broadcast_then_read(torch.ones(4).to("cuda").mul_(2))
    imitate(lag_ms=50)
    copy = torch.zeros(4, device="cuda").to("cpu", non_blocking=True)
    early = copy.isnan().all().item()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.zeros(1, device="cuda").item()
        waited = ""
    except RuntimeError as error:
        waited = str(error)
    torch.cuda.set_sync_debug_mode("default")
    RUNTIME.cudaLaunchKernel(None, Dim3(1, 70_000, 1), Dim3(32, 1, 1), None, ctypes.c_size_t(0), None)
    try:
        torch.ones(1, device="cuda")  # PyTorch asks for the last error after its own launch
        refusal = ""
    except RuntimeError as error:
        refusal = str(error)
    found = {"early": early, "late": copy.tolist(), "waited": waited, "refusal": refusal}
    return found | {"uploaded": uploaded, "written": written}


def mae_rows(setup: Setup) -> dict:
    imitate(lag_ms=50)
    return setup.train(setup.config("image-mae-pico", "rows", run__detail=True, health=True))


def finetune_all(setup: Setup) -> dict:
    augment = {"layers": 2, "jitter": 0.3, "erase": 0.5}
    augment = dataclasses.asdict(FINETUNE_PRESETS["image-ft-pico"].data.augment) | augment
    changes = {
        "data__augment": augment,
        "mixup": 0.8,
        "cutmix": 1.0,
        "optim__ema": 0.9,
        "optim__clip_norm": 1.0,
    }
    return setup.train(setup.config("image-ft-pico", "all", **changes))


def checkpointed_half_decoded_sgd_tf32(setup: Setup) -> dict:
    changes = {"model__checkpoint_stages": [1, 2, 3], "decode_ratio": 0.5, "optim__name": "sgd"}
    return setup.train(setup.config("image-mae-pico", "variant", speed__precision="tf32", **changes))


def frozen_abs_win(setup: Setup) -> dict:
    changes = {"freeze": "trunk", "model__abs_win": True, "data__repeats": 2}
    return setup.train(setup.config("image-ft-pico", "frozen", **changes))


def clips_many_views(setup: Setup) -> dict:
    return setup.train(setup.config("video-ft-pico", "views", views=[2, 3], optim__epochs=2.0))


def resume(setup: Setup) -> dict:
    """Bytes allocated in the last step of a run and of its resume, and at most while the resume loaded."""
    found = {}
    for name, epochs in (("before", 1.5), ("after", 3.0)):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        there = torch.cuda.memory_allocated()
        allow = {"run__allow": ["optim.epochs"]} if name == "after" else {}
        config = setup.config("image-mae-pico", "resumed", optim__epochs=epochs, optim__ema=0.9, **allow)
        found[name] = setup.train(config)["memory"][-1] - there
        found["loading"] = setup.watch.peak_before - there
    return found


def launches(_: Setup) -> dict:
    """The base recipes' models, forward and backward at their own micro batch: does every launch fit?"""
    found = {}
    for name in RECIPES:
        config = {**MAE_PRESETS, **FINETUNE_PRESETS}[name]
        before = RUNTIME.fakegpu_refused()
        forward_backward(config)
        found[name] = RUNTIME.fakegpu_refused() - before
    return found


def forward_backward(config: Config) -> None:
    """One training step's forward and backward of a recipe's model, on black pictures."""
    step, _ = passes(config, compiled=False)
    step()


def passes(config: Config, compiled: bool) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step's forward and backward, and a forward of the evaluation, of a recipe's model."""
    from models.layers import NormalizedInput
    from train.build import autocast_for, set_precision
    from train.distributed import World
    from train.evaluate import TASKS
    from train.rundir import Run

    device = torch.device("cuda", 0)
    set_precision(config.speed, device)
    task = TASKS[type(config)](config, Run(World(0, 1, device)), ["a"] * 400)
    model = NormalizedInput(task.model, config.data.frames).to(device)
    if compiled:
        model.compile(fullgraph=True)
    rows = config.speed.micro_batch
    batch = loader.blank_batch(config.data, rows, device)
    given = {}
    if isinstance(config, MaeConfig):
        kept = int(task.model.num_mask_units * (1 - config.mask_ratio))
        given["keep"] = torch.arange(kept, device=device).expand(rows, kept).contiguous()
    autocast = autocast_for(config.speed, device)

    def step() -> None:
        model.train()
        with autocast():
            loss = task.loss(model, batch)
        loss.backward()

    @torch.no_grad()
    def evaluate_once() -> None:
        model.eval()
        with autocast():
            model(batch.pixels, **given)

    return step, evaluate_once


def compiled_draws(_: Setup) -> dict:
    """Triton and ptxas compile the random draws of the models. Their values are not computed here."""
    from models import layers

    def drawn(keys):
        ones = torch.ones(len(keys), 1024, device=keys.device)
        share = layers.random_share(torch.arange(300, device=keys.device).expand(len(keys), -1), 0.5, keys)
        return layers.drop_path_scales(ones, 0.2, 24, keys)[1:], layers.dropout(ones, 0.1, keys), share

    torch.compile(drawn, fullgraph=True)(torch.arange(8, device="cuda"))
    return {}


def out_of_memory(setup: Setup) -> dict:
    """Ends the process as a command would: the sentence on stderr, exit code 2."""
    gc.collect()
    torch.cuda.empty_cache()
    imitate(memory_mb=(RUNTIME.fakegpu_used() >> 20) + 8)
    run_cli(lambda: setup.train(setup.config("image-mae-pico", "memory")))
    return {}


# ---- scenarios of two processes


def two_ranks(setup: Setup) -> dict:
    changes = {"optim__clip_norm": 1.0, "optim__ema": 0.9, "speed__micro_batch": 3}
    return setup.train(setup.config("image-ft-pico", "ranks", **changes))


def rank_fails(setup: Setup) -> dict:
    """Rank 1 fails in its third step, while ending NCCL hangs."""
    imitate(hang_s=HANG_S)
    config = setup.config("image-mae-pico", "fails", optim__epochs=100.0)
    setup.watch.fail_at = 3 if os.environ["RANK"] == "1" else 0
    run_cli(lambda: setup.train(config))
    return {}


# ---- scenarios of make faults


def compile_recipe(_: Setup) -> dict:
    """Compile the recipe $RECIPE; gives its graphs, and why any was compiled again.

    The recipe trains, evaluates and trains again.
    """
    from torch._dynamo.utils import counters

    reasons: list[str] = []
    torch._logging.set_logs(recompiles=True)
    handler = logging.Handler()
    handler.emit = lambda record: reasons.append(record.getMessage())
    logging.getLogger("torch._dynamo.guards.__recompiles").addHandler(handler)
    config = {**MAE_PRESETS, **FINETUNE_PRESETS}[os.environ["RECIPE"]]
    config = dataclasses.replace(config, speed=dataclasses.replace(config.speed, micro_batch=4))
    step, evaluate_once = passes(config, compiled=True)
    for call in (step, step, evaluate_once, evaluate_once, step):
        call()
    return {"graphs": counters["stats"]["unique_graphs"], "recompiles": reasons}


def main() -> None:
    report, images, clips, runs, *names = sys.argv[1:]
    replace_parts()
    setup = Setup(Path(images), Path(clips), Path(runs), Watch())
    rank = os.environ.get("RANK", "0")
    for number, name in enumerate(names):
        if "MASTER_PORTS" in os.environ:  # a port each: the first store may outlive its group for a moment
            os.environ["MASTER_PORT"] = os.environ["MASTER_PORTS"].split()[number]
        write(report, {"scenario": name, "rank": rank, "begins": True})
        imitate()
        refused, begin = RUNTIME.fakegpu_refused(), time.process_time()
        scenario: Callable[[Setup], dict] = globals()[name]
        found: dict = {"scenario": name, "rank": rank, "error": ""}
        try:
            found |= scenario(setup)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            found["error"] = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            with contextlib.suppress(RuntimeError):
                torch.cuda.set_sync_debug_mode("default")
            traceback.print_exc()
        found |= {
            "refused": RUNTIME.fakegpu_refused() - refused,
            "cpu_s": round(time.process_time() - begin, 1),
        }
        write(report, found)


def write(report: str, line: dict) -> None:
    with Path(report).open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
