"""make gpu-check: check and measure this machine's GPU; write a table, a JSON file and settings.

    python -m benchmarks.gpu_check [--device cpu] [--out FOLDER] [--only NAME ...]

Every check runs in a new process with a time limit, so that a crash or a hang becomes a row of the table.
Earlier checks may explain failures of later ones.
"""

import datetime
import functools
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

import train  # sets how OpenMP waits  # noqa: F401
from benchmarks import gpu_checks, gpu_models, gpu_process, gpu_runs
from benchmarks.gpu_place import Place, Problem
from pipelines.errors import UserError, run_cli
from pipelines.files import atomic_text
from train.rundir import environment

RESULT = "RESULT "
CPU_FACTOR = 5  # factor of the time limits on the CPU
KEPT = 8000  # characters of a failed check's output
FAILED, NEEDS_GPU, NEEDS_GPUS = "FAILED", "needs a GPU", "needs two GPUs"


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    run: Callable[[Place], str | dict[str, float]]
    seconds: int
    gpus: int = 0
    """GPUs that it needs; 0: it also runs on the CPU."""
    required: bool = True
    """If it fails, gpu-check fails; training does not need the others."""


CHECKS: dict[str, Check] = {
    "machine": Check(gpu_checks.machine, 60),
    "whole decoding": Check(gpu_checks.whole_decoding, 60, gpus=1),
    "windows by slicing": Check(gpu_checks.windows, 120),
    "windows by region decoding": Check(gpu_checks.region_decoding, 60, gpus=1, required=False),
    "order independence": Check(gpu_checks.order_independence, 90),
    "buffer lifetime": Check(gpu_checks.buffer_lifetime, 60),
    "hostile pictures": Check(gpu_checks.hostile_pictures, 60),
    "augmentations": Check(gpu_models.augmentations, 60),
    "random draws": Check(gpu_models.random_draws, 90),
    "models in fp32": Check(gpu_models.models_fp32, 60),
    "models in bf16": Check(gpu_models.models_bf16, 60),
    "flash attention": Check(gpu_models.attention_flash, 60, gpus=1),
    "efficient attention": Check(gpu_models.attention_efficient, 60, gpus=1, required=False),
    "cuDNN attention": Check(gpu_models.attention_cudnn, 60, gpus=1, required=False),
    "models compiled": Check(gpu_models.models_compiled, 300),
    "rows equal detail": Check(gpu_runs.rows_equal_detail, 120),
    "no waits": Check(gpu_runs.no_waits, 120, gpus=1),
    "resume and stop": Check(gpu_runs.resume_and_stop, 180),
    "a non-finite step": Check(gpu_runs.nonfinite_steps, 90),
    "out of memory": Check(gpu_runs.out_of_memory, 90, gpus=1),
    "ranks end together": Check(gpu_runs.ranks_end_together, 240, gpus=2),
}
RATES: dict[str, Check] = {
    "loading pictures (pictures/s)": Check(gpu_runs.loading_pictures, 90),
    "loading clips (frames/s)": Check(gpu_runs.loading_clips, 90),
    "loading pictures by windows (pictures/s)": Check(
        functools.partial(gpu_runs.loading_pictures, decode="window"), 90, required=False
    ),
    "loading clips by windows (frames/s)": Check(
        functools.partial(gpu_runs.loading_clips, decode="window"), 90, required=False
    ),
    **{
        f"steps of {recipe} (samples/s)": Check(functools.partial(gpu_runs.step_rates, recipe), 90, gpus=1)
        for recipe in gpu_runs.RECIPES
    },
    # In processes of their own: if cuDNN's attention fails, the rates above are still measured.
    **{
        f"steps of {recipe} by cuDNN (samples/s)": Check(
            functools.partial(gpu_runs.step_rates, recipe, attention="cuDNN"), 90, gpus=1, required=False
        )
        for recipe in gpu_runs.RECIPES
    },
}


@dataclass
class Row:
    """Result of a check: "ok", FAILED, NEEDS_GPU or NEEDS_GPUS, a text or rates, and its seconds."""

    name: str
    state: str
    found: str | dict[str, float]
    seconds: float = 0.0
    required: bool = True
    printed: str = ""
    """The end of the output of a failed check."""


# ---- one check


def child(name: str, values: dict[str, str], flags: list[str]) -> None:
    """Run one check in its process; print the result as the last line."""
    place = Place(torch.device(values["device"]), *(Path(values[key]) for key in ("images", "clips", "work")))
    if place.gpu:
        torch.cuda.set_device(place.device)
    try:
        if name == "data":
            gpu_runs.draw_data(place.work)
            # The parent does not ask: it would take a part of the GPU from the checks.
            result: object = torch.cuda.get_device_name(place.device) if place.gpu else "cpu"
        elif name in gpu_runs.RECIPES:
            result = gpu_runs.training_rates(name, place, flags)
        else:
            result = (CHECKS | RATES)[name].run(place)
    except Problem as problem:
        print(problem, file=sys.stderr)
        sys.exit(1)
    print(f"{RESULT}{json.dumps(result)}", flush=True)
    os._exit(0)  # without waiting for decoding threads


def run(name: str, place: Place, seconds: float, flags: list[str] | None = None) -> Row:
    """Run a check in a new process; after `seconds`, kill it and every process that it has started."""
    values = {
        "device": str(place.device),
        "images": str(place.images),
        "clips": str(place.clips),
        "work": str(place.work),
    }
    task = json.dumps([name, values, flags or []])
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--child", task]
    begin = time.monotonic()
    printed, code = gpu_process.output_of(command, seconds)
    results = [line for line in printed.splitlines() if line.startswith(RESULT)]
    took = time.monotonic() - begin
    if code == 0 and results:
        return Row(name, "ok", json.loads(results[-1].removeprefix(RESULT)), took)
    how = f"no answer after {seconds:g} s: " if code is None else f"signal {-code}: " if code < 0 else ""
    return Row(name, FAILED, how + gpu_process.last_line(printed), took, printed=printed[-KEPT:])


# ---- all of them


def gpu_check(
    device: Literal["cuda", "cpu"] = "cuda",
    out: Path = Path("benchmarks/results"),
    only: tuple[str, ...] = (),
    rates: bool = True,
    patience: float = 1.0,
) -> None:
    """Check this machine and measure it.

    Args:
        device: cuda, or cpu to run the checks that can run there.
        out: folder for the JSON file and the recommended settings.
        only: run only checks whose names contain one of these words.
        rates: also measure rates.
        patience: factor of all time limits, for a slow or busy machine.
    """
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    factor = patience * (1 if gpus else CPU_FACTOR)
    if device == "cuda" and not torch.cuda.is_available():
        version = gpu_checks.driver()
        why = (
            f"its driver is {version}, and CUDA 13 needs {gpu_checks.LEAST_DRIVER}"
            if version
            else "no driver found"
        )
        raise UserError(
            f"PyTorch sees no GPU ({why}); see docs/gpu.md, or run the CPU's checks with DEVICE=cpu"
        )
    check_writable(out)
    console = Console()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        work = Path(folder)
        place = Place(
            torch.device("cuda", 0) if gpus else torch.device("cpu"),
            work / "shards/images",
            work / "shards/clips",
            work,
        )
        rows = [show(console, run("data", place, 180 * factor))]
        results = Results(out, str(rows[0].found) if rows[0].state == "ok" else device, gpus)
        results.write(rows)
        chosen = CHECKS | (RATES if rates else {}) if rows[0].state == "ok" else {}
        for name, check in chosen.items():
            if is_wanted(name, only):
                rows.append(show(console, row_of(name, check, place, gpus, factor)))
                results.write(rows)
        flags = recommended({row.name: row.found for row in rows if isinstance(row.found, dict)})
        settings = results.write_settings(flags)
        for recipe, tuned in flags.items() if rates and gpus else ():
            if is_wanted(recipe, only):
                rows.append(show(console, run(recipe, place, 180 * factor, tuned)))
                results.write(rows, flags)
    console.print(table_of(rows, device))
    console.print("\n".join([f"written: {results.path}", *settings]), markup=False)
    failures = [row.name for row in rows if row.state == FAILED and row.required]
    console.print(f"{len(failures)} failed, {time.monotonic() - begin:.0f} s")
    sys.exit(1 if failures else 0)


def is_wanted(name: str, only: tuple[str, ...]) -> bool:
    return not only or any(word in name for word in only)


def check_writable(out: Path) -> None:
    """Create the folder for results. Raises UserError if it cannot be written to: the checks take minutes."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(
            f"{out} cannot be written to ({error.strerror}); name another folder with OUT= (--out)"
        ) from error


def row_of(name: str, check: Check, place: Place, gpus: int, factor: float) -> Row:
    """The row of a check, whose time limit is multiplied by `factor`."""
    if gpus < check.gpus:
        return Row(name, NEEDS_GPUS if check.gpus > 1 else NEEDS_GPU, "", required=check.required)
    row = run(name, place, check.seconds * factor)
    row.required = check.required
    return row


def show(console: Console, row: Row) -> Row:
    """Print a row."""
    if row.state in ("ok", FAILED):
        console.print(Text(f"{row.state:7}{row.name:32}{row.seconds:5.0f} s  {text_of(row.found)}"[:200]))
    return row


def text_of(found: str | dict[str, float] | list) -> str:
    if isinstance(found, dict):
        return "; ".join(
            f"{name}: {value:,.4g}" if value < 1000 else f"{name}: {value:,.0f}"
            for name, value in found.items()
        )
    return found if isinstance(found, str) else ""


def recommended(rates: dict[str, dict[str, float]]) -> dict[str, list[str]]:
    """Flags for each base recipe whose steps with flash attention and whose loading were measured.

    Others keep the settings that an earlier check may have written.
    """
    found = {}
    for recipe in gpu_runs.RECIPES:
        steps = measured(rates, f"steps of {recipe} ")
        ours = {name: rate for name, rate in steps.items() if "upstream" not in name}
        loading = measured(rates, "loading clips" if "video" in recipe else "loading pictures")
        if loading and any("flash" in name for name in ours):
            found[recipe] = step_flags(ours) + loading_flags(loading)
    return found


def measured(rates: dict[str, dict[str, float]], start: str) -> dict[str, float]:
    """The rates of all rows whose name begins with `start`."""
    return {name: rate for row in rates if row.startswith(start) for name, rate in rates[row].items()}


def step_flags(rates: dict[str, float]) -> list[str]:
    """The attention, and the smallest micro batch within 3 % of its best rate, to save memory.

    cuDNN's attention has open bugs, so it is chosen only if it is 3 % faster than flash.
    """
    ours = {name: re.findall(r"micro (\d+), (\w+)", name)[0] for name in rates}
    best = {kind: max(rates[name] for name in ours if ours[name][1] == kind) for _, kind in ours.values()}
    chosen = max(best, key=lambda kind: best[kind] * (1.03 if kind == "flash" else 1))
    near = [ours[name][0] for name in ours if ours[name][1] == chosen and rates[name] >= 0.97 * best[chosen]]
    return ["--speed.attention", chosen.lower(), "--speed.micro-batch", min(near, key=int)]


def loading_flags(rates: dict[str, float]) -> list[str]:
    """Threads, share of the decoding engines, and decoding of the fastest loading."""
    best = max(rates, key=lambda name: rates[name])
    ((threads, share, decode),) = re.findall(r"(\d+) threads, engine share ([\d.]+), (\w+)", best)
    return ["--speed.threads", threads, "--speed.hw-decoder-load", share, "--speed.decode", decode]


def table_of(rows: list[Row], device: str) -> Table:
    where = torch.cuda.get_device_name(0) if device == "cuda" else "the CPU (these are no numbers of a GPU)"
    table = Table("check", "", "s", "found", title=f"make gpu-check on {where}", show_lines=True)
    for row in rows:
        state = row.state if row.required or row.state != FAILED else "failed (not needed)"
        seconds = f"{row.seconds:.0f}" if row.seconds else ""
        table.add_row(*map(Text, (row.name, state, seconds, text_of(row.found))))
    return table


class Results:
    """The JSON file of a gpu-check, and the files of settings for TUNED=."""

    def __init__(self, out: Path, name: str, gpus: int) -> None:
        """name: of the device; gpus: how many there are."""
        hardware = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        self.out = out
        # With the time: a repeated check does not replace the others' results.
        self.path = out / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}-{hardware}-gpu-check.json"
        self.about = {
            "environment": environment([name] * gpus),
            "driver": gpu_checks.driver(),
            "device": name,
        }

    def write(self, rows: list[Row], flags: dict[str, list[str]] | None = None) -> None:
        """Write the rows so far, so that an end of the machine's time loses none."""
        checks = {
            row.name: {"state": row.state, "seconds": round(row.seconds, 1), "found": row.found}
            | ({"output": row.printed} if row.printed else {})
            for row in rows
        }
        content = self.about | {"checks": checks, "settings": flags or {}}
        atomic_text(self.path, json.dumps(content, indent=1) + "\n")

    def write_settings(self, flags: dict[str, list[str]]) -> list[str]:
        """Write a file of settings per recipe; return a line about each."""
        lines = []
        for recipe, settings in flags.items():
            tuned = self.out / f"tuned-{recipe}.txt"
            atomic_text(tuned, " ".join(settings) + "\n")
            lines.append(f"recommended for {recipe}: {' '.join(settings)} (TUNED={tuned})")
        return lines


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*json.loads(sys.argv[2]))
    # As after Ctrl-C, the check that runs and its processes are killed.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    tyro.cli(gpu_check)


if __name__ == "__main__":
    run_cli(main)
