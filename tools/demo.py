"""Pack, train on and evaluate generated data on any machine: python -m tools.demo (= make demo).

Every command is printed before it runs and can be pasted. After an interruption, the demo continues.
"""

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipelines.errors import UserError, run_cli
from tools.compare import speed_of
from train.metrics import read_csv


@dataclass(frozen=True)
class Kind:
    """One half of the demo: its name and its commands."""

    name: str
    pack: str
    pretrain: str
    finetune: str


KINDS = (
    Kind(
        name="images",
        pack="tools.pack images --source data/demo/images",
        pretrain="image-mae-pico --optim.epochs 10 --optim.lr 5e-4 --run.eval-every 31",  # only 63 steps
        finetune="image-ft-pico --optim.epochs 6 --run.eval-every 50",
    ),
    Kind(
        name="clips",
        pack="tools.pack clips --frames data/demo/clips/data_30fps_frames"
        " --annotations data/demo/clips/annotations",
        pretrain="video-mae-pico --optim.epochs 3 --run.eval-every 36",
        finetune="video-ft-pico --optim.epochs 4 --run.eval-every 96",
    ),
)


def commands(kind: Kind) -> list[str]:
    """All commands of a kind, each a module and its arguments."""
    shards, mae, finetune = (f"shards/demo-{kind.name}", f"demo-{kind.name}-mae", f"demo-{kind.name}-ft")
    return [
        f"{kind.pack} --out {shards}",
        f"tools.verify {shards}",
        f"train.mae {kind.pretrain} --data.path {shards} --run.name {mae}",
        f"train.finetune {kind.finetune} --data.path {shards} --run.name {finetune}"
        f" --model.init runs/{mae}/model.safetensors",
        f"train.evaluate runs/{finetune}",
        *(f"tools.report runs/{run}" for run in (mae, finetune)),
    ]


def main() -> None:
    begin = time.monotonic()
    run("tools.demo_data --out data/demo")
    for kind in KINDS:
        for command in commands(kind):
            run(command)
    Console().print(closing_table(time.monotonic() - begin))


def run(command: str) -> None:
    """Run `python -m COMMAND`. Raises UserError if it fails; it has printed its own message."""
    print(f"\n$ python -m {command}", flush=True)
    code = subprocess.run([sys.executable, "-m", *shlex.split(command)], check=False).returncode
    if code:
        raise UserError(f"the demo stopped: python -m {command} ended with exit code {code}; see above")


def closing_table(seconds: float) -> Table:
    """Table of results, read from the run folders."""
    table = Table("", *(kind.name for kind in KINDS), title=f"make demo: {seconds:.0f} s")
    results = [_results(kind) for kind in KINDS]
    for name in results[0]:
        table.add_row(name, *(values[name] for values in results))
    return table


def _results(kind: Kind) -> dict[str, str]:
    mae, finetune = (read_csv(Path(f"runs/demo-{kind.name}-{part}/metrics.csv")) for part in ("mae", "ft"))
    classes = len(json.loads(Path(f"shards/demo-{kind.name}/dataset.json").read_text())["classes"])
    checked = [row for row in mae if row["loss_val"] is not None]
    accuracy = finetune[-1]["acc"]
    return {
        "MAE validation loss, first": f"{checked[0]['loss_val']:.3f} (step {checked[0]['step']})",
        "MAE validation loss, last": f"{checked[-1]['loss_val']:.3f} (step {checked[-1]['step']})",
        "accuracy after finetuning": f"{100 * accuracy:.1f} %",
        "chance accuracy": f"{100 / classes:.1f} %",
        "accuracy / chance": f"{accuracy * classes:.1f} x",
        "MAE speed": _speed(mae, kind),
        "finetuning speed": _speed(finetune, kind),
        "files": f"runs/demo-{kind.name}-mae\nruns/demo-{kind.name}-ft\nshards/demo-{kind.name}",
    }


def _speed(rows: list[dict], kind: Kind) -> str:
    rate, step, wait = speed_of(rows)
    return f"{rate:.1f} {kind.name}/s, data wait {100 * wait / step:.1f} %"


if __name__ == "__main__":
    run_cli(main)
