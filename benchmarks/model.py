"""Times our models beside another implementation: `python -m tools.bench model --peer hiera-transformer`.

One step is forward and backward in training mode, bf16 autocast on CUDA, float32 on the CPU. The variants of
a model take turns within every round, so that whatever else the machine does hits them alike; the speed-up
is the median over rounds of the ratio to the peer. Memory is the peak of a process that runs one variant
alone: what the step adds to the process before the model was built, or the allocator's peak on CUDA.
"""

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table

from models.factory import config_of, create
from models.macs import bf16_peak, forward_macs
from models.unroll import unit_grid
from pipelines.errors import UserError, run_cli
from tools.check_parity import upstream_model

NAMES = ("mae_hiera_base_224", "hiera_base_224", "mae_hiera_base_16x224", "hiera_base_16x224")
DEFAULT_BATCH = {("cpu", False): 2, ("cpu", True): 1, ("cuda", False): 64, ("cuda", True): 8}  # images, clips


@dataclass(frozen=True)
class Row:
    """One variant of one model."""

    model: str
    variant: str
    batch: int
    samples_per_s: float
    speed_up: float | None  # over the peer's eager mode
    peak_share: float | None  # of the device's bf16 peak, counting the variant's multiply-adds
    memory_mb: float | None
    memory_ratio: float | None  # to the peer's


def variants_of(name: str, peer: bool, compiled: bool) -> list[str]:
    """What to run for a model; the peer comes first."""
    found = ["hiera-transformer"] * peer + ["ours"]
    if name.startswith("mae_") and "16x" in name:
        found.append("ours decode_ratio=0.5")
    return found + [f"{variant} compiled" for variant in found if compiled]


def make_step(name: str, variant: str, batch: int, device: torch.device) -> tuple[Callable[[], None], int]:
    """A closure that does one forward and backward pass, and the variant's multiply-adds per sample."""
    torch.manual_seed(0)
    mae = name.startswith("mae_")
    overrides = {"decode_ratio": 0.5} if "decode_ratio" in variant else {}
    config = config_of(name, **overrides)
    units = math.prod(unit_grid(config.input_size))
    x = torch.randn(batch, 3, *config.input_size, device=device)
    target = torch.randint(config.num_classes, (batch,), device=device)
    keep = torch.rand(batch, units, device=device).argsort(1)
    keep = keep[:, : int(units * (0.1 if config.video else 0.4))].sort(1).values
    if variant.startswith("hiera-transformer"):
        model = upstream_model(config, mae)
        given = {"mask": torch.zeros(batch, units, device=device).scatter(1, keep, 1).bool()} if mae else {}
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


def measure(name: str, variants: list[str], batch: int, rounds: int, device: torch.device) -> list[Row]:
    """Time the variants of one model, taking turns."""
    made = {variant: make_step(name, variant, batch, device) for variant in variants}
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for number in range(rounds + 1):
        for variant, (step, _) in made.items():
            elapsed = _seconds(step, device)
            if number:  # the first round warms up
                seconds[variant].append(elapsed)
    rows = []
    for variant, (_, macs) in made.items():
        rate = batch / statistics.median(seconds[variant])
        ratios = [a / b for a, b in zip(seconds[variants[0]], seconds[variant], strict=True)]
        speed_up = statistics.median(ratios) if variants[0] == "hiera-transformer" else None
        peak = bf16_peak(_device_name(device))
        share = 6 * macs * rate / peak if peak else None
        rows.append(Row(name, variant, batch, rate, speed_up, share, None, None))
    return rows


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    """Wall time of a step; on CUDA the mean of ten, whose launches overlap."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start, steps = time.perf_counter(), 10 if cuda else 1
    for _ in range(steps):
        step()
    if cuda:
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / steps


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def memory_of(name: str, variant: str, batch: int, device: torch.device) -> float:
    """Peak memory in MB of this process for two steps of one variant; meant for a process of its own."""
    before = _resident("VmRSS")
    step, _ = make_step(name, variant, batch, device)
    for _ in range(2):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """A size in MB from Linux's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(field))


def _memory_in_child(row: Row, device: str, threads: int) -> float:
    """Run `memory_of` in a fresh process."""
    call = f"memory_of({row.model!r}, {row.variant!r}, {row.batch}, torch.device({device!r}))"
    code = f"import torch; from benchmarks.model import *; torch.set_num_threads({threads}); print({call})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(
            f"measuring the memory of {row.model} {row.variant} failed: {done.stderr.strip()[-300:]}"
        )
    return float(done.stdout.split()[-1])


def run(
    names: tuple[str, ...] = NAMES,
    peer: str | None = "hiera-transformer",
    batch: int | None = None,
    rounds: int = 5,
    device: str | None = None,
    compiled: bool = False,
    memory: bool = True,
    threads: int = 2,
) -> list[Row]:
    """Bench models and give the rows; a progress line per model goes to stderr.

    Args:
        names: models, as `python -m models.zoo` lists them.
        peer: "hiera-transformer", the authors' package, or none.
        batch: samples a step; by default 2 images or 1 clip on the CPU, 64 or 8 on CUDA.
        rounds: timed rounds after one to warm up.
        device: "cpu" or "cuda"; CUDA where there is one.
        compiled: also time every variant under torch.compile.
        memory: also measure peak memory, in a process per variant.
        threads: CPU threads.
    """
    if peer not in (None, "hiera-transformer"):
        raise UserError(f"the peer can be hiera-transformer, not {peer!r}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
    found = []
    for name in names:
        print(f"{name} on {_device_name(torch.device(device))} ...", file=sys.stderr, flush=True)
        size = batch or DEFAULT_BATCH[device, "16x" in name]
        variants = variants_of(name, peer is not None, compiled)
        rows = measure(name, variants, size, rounds, torch.device(device))
        sizes = [_memory_in_child(row, device, threads) if memory else None for row in rows]
        for row, mb in zip(rows, sizes, strict=True):
            ratio = mb / sizes[0] if mb and sizes[0] and peer else None
            found.append(replace(row, memory_mb=mb, memory_ratio=ratio))
    return found


def table_of(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(title="forward + backward; speed-up and memory against the peer's eager mode")
    heads = (
        "model",
        "variant",
        "batch",
        "samples/s",
        "speed-up",
        "of bf16 peak",
        "memory (MB)",
        "memory ratio",
    )
    for head in heads:
        table.add_column(head, justify="left" if head in ("model", "variant") else "right")
    for row in rows:
        numbers = (row.samples_per_s, row.speed_up, row.peak_share, row.memory_mb, row.memory_ratio)
        formats = ("{:.3g}", "{:.2f}x", "{:.1%}", "{:.0f}", "{:.2f}x")
        shown = ["-" if n is None else f.format(n) for f, n in zip(formats, numbers, strict=True)]
        table.add_row(row.model, row.variant, str(row.batch), *shown)
    return table


if __name__ == "__main__":
    run_cli(lambda: Console(width=None if sys.stdout.isatty() else 130).print(table_of(tyro.cli(run))))
