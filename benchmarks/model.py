"""Compare the speed of our models with other implementations: `python -m benchmarks model`.

A step is forward and backward in training mode: bf16 autocast on CUDA, float32 on the CPU. The variants of
a model take turns, so that other load on the machine affects them equally, and each runs several steps in a
new process, as a training does: beside other models, those that return much memory to the system after every
step are slower. Memory is, on the CPU, what the steps add to the process before the model was built; on CUDA,
the allocator's peak.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.parity import timm_model, transformers_model, upstream_model
from benchmarks.results import Race, Results, show
from models.unroll import unit_grid
from models.zoo import bf16_peak, config_of, create, forward_macs
from pipelines.errors import UserError, run_cli

NAMES = ("mae_hiera_base_224", "hiera_base_224", "mae_hiera_base_16x224", "hiera_base_16x224")
WARM = {"cpu": 2, "cuda": 10}  # steps that do not count
STEPS = {"cpu": 3, "cuda": 20}  # on CUDA, their launches overlap
DEFAULT_BATCH = {("cpu", False): 2, ("cpu", True): 1, ("cuda", False): 64, ("cuda", True): 8}  # images, clips
PEERS = {"hiera-transformer": upstream_model, "timm": timm_model, "transformers": transformers_model}


def variants_of(name: str, peers: bool, compiled: bool) -> list[str]:
    """The variants to run for a model; ours is first."""
    mae, clips = name.startswith("mae_"), "16x" in name
    found = ["ours"] + ["ours decode_ratio=0.5"] * (mae and clips)
    if peers:
        found += ["hiera-transformer"]
        found += [] if clips else ["transformers"] if mae else ["timm"]
    return found + [f"{variant} compiled" for variant in found if compiled]


def make_step(name: str, variant: str, batch: int, device: torch.device) -> tuple[Callable[[], None], int]:
    """A function that does one forward and backward pass, and the multiply-adds per sample."""
    torch.manual_seed(0)
    mae = name.startswith("mae_")
    overrides = {"decode_ratio": 0.5} if "decode_ratio" in variant else {}
    config = config_of(name, **overrides)
    units = math.prod(unit_grid(config.input_size))
    x = torch.randn(batch, 3, *config.input_size, device=device)
    target = torch.randint(config.num_classes, (batch,), device=device)
    keep = torch.rand(batch, units, device=device).argsort(1)
    keep = keep[:, : int(units * (0.1 if config.video else 0.4))].sort(1).values
    peer = variant.removesuffix(" compiled")
    mask = torch.zeros(batch, units, device=device).scatter(1, keep, 1).bool()
    given: dict[str, Tensor] = {}
    if peer in PEERS:
        model = PEERS[peer](config, mae)
        if mae and peer == "transformers":
            given = {"noise": (~mask).float()}  # units with the largest noise are masked, the same share
        elif mae:
            given = {"mask": mask}
    else:
        model = create(name, **overrides)
        given = {"keep": keep} if mae else {}
    model = model.to(device).train()
    forward = torch.compile(model) if variant.endswith("compiled") else model

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = forward(x, **given)
            loss = output[0] if mae else F.cross_entropy(output, target)
        loss.backward()

    return step, forward_macs(config, mae, mask_ratio=0.9 if config.video else 0.6)


def trial(name: str, variant: str, batch: int, device: torch.device) -> dict[str, float]:
    """Rate and peak memory of one variant, and on known GPUs the share of the bf16 peak.

    The share counts the variant's own operations. Call this in a new process.
    """
    before = _resident("VmRSS")
    step, macs = make_step(name, variant, batch, device)
    cuda = device.type == "cuda"
    steps = STEPS[device.type]
    for _ in range(WARM[device.type]):
        step()
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if cuda:
        torch.cuda.synchronize(device)
    rate = batch * steps / (time.perf_counter() - start)
    columns = {"samples/s": rate}
    if peak := bf16_peak(_device_name(device)):
        columns["share of bf16 peak"] = 6 * macs * rate / peak
    memory = torch.cuda.max_memory_allocated(device) / 1e6 if cuda else _resident("VmHWM") - before
    return columns | {"memory (MB)": memory}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _resident(field: str) -> float:
    """A size in MB from Linux's data about this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(field))


def _in_child(name: str, variant: str, batch: int, device: str, threads: int) -> dict[str, float]:
    """Run `trial` in a new process. Raises UserError if it fails."""
    call = f"trial({name!r}, {variant!r}, {batch}, torch.device({device!r}))"
    code = f"from benchmarks.model import *; torch.set_num_threads({threads}); print(json.dumps({call}))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{variant}'s step of {name} failed: {done.stderr.strip()[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(
    names: tuple[str, ...] = NAMES,
    peers: bool = True,
    batch: int | None = None,
    rounds: int = 5,
    device: str | None = None,
    compiled: bool = False,
    threads: int = 2,
) -> Results:
    """Compare models with hiera-transformer (the authors' package), timm and transformers, if installed.

    Args:
        names: models, as `python -m models.zoo` lists them.
        peers: also time other implementations.
        batch: samples per step; by default 2 images or 1 clip on the CPU, 64 or 8 on CUDA.
        rounds: trials per variant; they take turns.
        device: "cpu" or "cuda"; default: CUDA if it exists.
        compiled: also time every variant under torch.compile.
        threads: CPU threads.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found: Results = {}
    for name in names:
        print(f"{name} on {_device_name(torch.device(device))} ...", file=sys.stderr, flush=True)
        size = batch or DEFAULT_BATCH[device, "16x" in name]
        race: Race = {variant: {} for variant in variants_of(name, peers, compiled)}
        for _ in range(rounds):
            for variant, columns in race.items():
                for column, value in _in_child(name, variant, size, device, threads).items():
                    columns.setdefault(column, []).append(value)
        found[f"a step of {name}, batch {size}"] = race
    return found


if __name__ == "__main__":
    run_cli(lambda: show(tyro.cli(run)))
