"""Compare speed with other implementations: python -m benchmarks all|loader|model|training|packing|core|...

`all` runs the first five and writes benchmarks/results/DATE-HARDWARE.json and the tables of docs/speed.md
and both READMEs after each. A single benchmark prints its tables; `python -m benchmarks loader --help` lists
its flags.
"""

import datetime
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from benchmarks.packing import processor
from benchmarks.results import Results, markdown, show, summary
from pipelines.errors import UserError, run_cli
from pipelines.files import atomic_text
from train.rundir import environment, versions

Part = Literal["loader", "model", "training", "packing", "core"]
COMPARED: tuple[Part, ...] = get_args(Part)
OTHERS = ("memory", "catalogue", "scale", "growth", "learning", "video_packing")
PEERS = ("hiera-transformer", "transformers", "opencv-python-headless", "pillow")
BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->\n"


@dataclass(frozen=True)
class Pages:
    """Where results are written."""

    speed: Path = Path("docs/speed.md")
    """page whose tables are replaced"""
    readmes: tuple[Path, ...] = (Path("README.md"), Path("README.zh-CN.md"))
    """pages whose table of ratios is replaced"""
    results: Path = Path("benchmarks/results")
    """folder for the numbers of every round"""


PAGES = Pages()


def main() -> None:
    """Run one benchmark with its flags, or all; raises UserError for an unknown name."""
    name, *flags = sys.argv[1:] or ["all"]
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name == "all":
        tyro.cli(compare_all, args=flags, prog="python -m benchmarks all")
        return
    if name not in (*COMPARED, *OTHERS):
        raise UserError(f"there is no benchmark '{name}'; choose all, {', '.join((*COMPARED, *OTHERS))}")
    sys.exit(subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *flags], check=False).returncode)


def compare_all(
    images: Path = Path("data/imagenet"),
    work: Path = Path("/tmp/hiera-train-bench"),
    rounds: int = 5,
    parts: tuple[Part, ...] = COMPARED,
    quick: bool = False,
    pages: Annotated[Pages, tyro.conf.arg(name="")] = PAGES,
) -> None:
    """Run all comparisons and write their results.

    Args:
        images: folder of JPEG pictures, searched through.
        work: folder for generated data, which is kept and used again.
        rounds: rounds per contender; they take turns.
        parts: run only these; others keep the last results of this processor.
        quick: one round of the smallest models, about five minutes; the results are only printed.
        pages: see `Pages`.
    """
    data = {"images": images, "work": work}
    small = ("mae_hiera_pico_96", "hiera_pico_96", "mae_hiera_pico_16x64", "hiera_pico_16x64")
    flags: dict[str, dict] = {
        "loader": data | {"rounds": 1 if quick else rounds},
        "model": {"rounds": 1, "names": small} if quick else {"rounds": rounds},
        "training": data | ({"rounds": 1, "steps": 15} if quick else {"rounds": rounds}),
        "packing": data | ({"rounds": 1, "copies": 1} if quick else {"rounds": rounds}),
        "core": {"rounds": 1 if quick else rounds},
    }
    # Before the pages are changed, which would make the commit "dirty".
    where = environment() | {"processor": processor(), "peers": versions(PEERS)}
    del where["command"]  # it has paths of this machine and describes only the last parts
    for part in parts:
        print(f"{part} ...", file=sys.stderr, flush=True)
        module = importlib.import_module(f"benchmarks.{part}")
        # Each runs in a new process, so that its memory and threads do not affect the next.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found: Results = pool.submit(module.run, **flags[part]).result()
        show(found)
        if not quick:  # at once, so that a failure of a later part loses nothing
            write({part: found}, where, pages)


def write(found: dict[str, Results], where: dict, pages: Pages) -> None:
    """Write the results by part and put the tables into the pages.

    Other parts keep their last results, if they are of the same processor.
    """
    gpus: list[str] = where["gpus"]
    hardware = re.sub(r"[^a-z0-9]+", "-", gpus[0].lower()) if gpus else f"{where['cpus']}-cores"
    today = datetime.date.today()
    path = pages.results / f"{today}-{hardware}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = max(pages.results.glob(f"*-{hardware}.json"), default=None)  # names begin with the date
    old: dict[str, Any] = json.loads(earlier.read_text()).get("parts", {}) if earlier else {}
    parts = {name: part for name, part in old.items() if part.get("processor") == where["processor"]}
    measured = f"{today}, commit {where['commit']}"
    common = {"measured": measured, "processor": where["processor"]}
    parts |= {part: common | {"results": results} for part, results in found.items()}
    atomic_text(path, json.dumps({"environment": where, "parts": parts}, indent=1))
    results = {name: race for part in parts.values() for name, race in part["results"].items()}
    dates = sorted({part["measured"] for part in parts.values()})
    when = re.sub(r"([0-9a-f]{10})[0-9a-f]{30}", r"\1", "; ".join(dates))
    origin = f"*Measured on {hardware}: {when}. Every round is in [{path.name}](%s).*\n\n"
    machine = f"{where['processor']}, {where['cpus']} cores"
    if gpus:  # only benchmarks/model.py uses it
        machine = f"{gpus[0]} (a step of a model); {machine} (all others)"
    short = summary(results, machine)
    for page, tables in (
        (pages.speed, markdown(results, machine)),
        *((readme, short) for readme in pages.readmes),
    ):
        link = os.path.relpath(path, page.parent)
        tables = origin % link + tables
        text = page.read_text()
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        atomic_text(page, before + BEGIN + tables + END + after)
    print(f"written: {', '.join(map(str, (path, pages.speed, *pages.readmes)))}")


if __name__ == "__main__":
    run_cli(main)
