"""Repeat one step of a run exactly, and inspect it: python -m train.replay RUN --step K (= make replay).

A step's batch follows from the seed, the data and the step. Training therefore starts from the newest
checkpoint before the step, or from the starting weights, and repeats the steps up to it in another folder.
"""

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from pipelines.dataset import read_info
from pipelines.errors import UserError, once_per_machine, run_cli
from train import badstep, checkpoint, distributed, ending, finetune, loop, mae, rundir
from train.badstep import Report
from train.config import Config, FinetuneConfig, MaeConfig
from train.console import log, screen
from train.evaluate import read_config
from train.metrics import read_csv

MAKE_TASK = {MaeConfig: mae.make_task, FinetuneConfig: finetune.make_task}
ROWS_SHOWN = 20


@dataclass(frozen=True)
class Arguments:
    """Repeat a step of a run, and inspect its rows, layers and gradients."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    step: int
    """The step to inspect, counted from 1."""
    data: Path | None = None
    """The run's shards, if they are elsewhere now."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    processes: int = 1
    """Processes to start; with another number than the run had, the numbers agree up to rounding only."""


def replay(arguments: Arguments) -> Report:
    """Train up to the step, inspect it, and write replay-STEP.json; nothing else in the run folder changes.

    Raises UserError when the step is not one of the run, or the data is not the run's.
    """
    run, step = arguments.run.resolve(), arguments.step
    config = read_config(run, arguments.data)
    last = rundir.last_step(config)
    if not 1 <= step <= last:
        raise UserError(f"step {step} is not one of {run}; choose a step from 1 to {last}")
    if not rundir.is_data_of(run, read_info(config.data.path)):
        raise UserError(f"{config.data.path} is not the data of {run}; name it: DATA= (--data)")
    folder = run.with_name(f".replay-{run.name}-{step}")
    if distributed.rank() == 0:
        _prepare(folder, checkpoint.before(run / "checkpoints", step))
    speed = replace(config.speed, device=arguments.device, processes=1, profile="")
    settings = replace(config.run, root=folder.parent, name=folder.name, allow=(), track=())
    settings = replace(settings, max_skipped=step + 1)
    config = replace(config, run=settings, speed=speed)
    if isinstance(config, MaeConfig):
        config = replace(config, health=False)
    try:
        report = _repeat(config, run, step)
        if distributed.rank() == 0:
            report |= compare(run, folder, report)
            badstep.write(run / f"replay-{step}.json", report)
    finally:
        if distributed.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return report


def _prepare(folder: Path, checkpoints: list[Path]) -> None:
    """An empty run folder, with links to the newest valid one of the checkpoints, if there is one."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "checkpoints").mkdir(parents=True)
    for path in reversed(checkpoints):
        if found := checkpoint.problem(path):
            log(f"replay: {path} is damaged ({found}); an older one is used, or the start of the run")
            continue
        for file in (path, path.with_suffix(".sha256")):
            name = file.name.removeprefix(checkpoint.KEPT)
            (folder / "checkpoints" / name).symlink_to(file.resolve())
        break


def _repeat(config: Config, folder: Path, last: int) -> Report:
    """Train to step `last` as `loop.fit` does, without evaluating and saving, and inspect it.

    The metric rows are those of the run in `folder`, whose intervals may have changed since.
    """
    run = rundir.start_run(config)
    with run.starting():
        trainer = loop.Trainer(config, MAKE_TASK[type(config)], run)
    state, world = trainer.state, trainer.run.world
    rows = distributed.broadcast({row["step"] for row in read_csv(folder / "metrics.csv")})
    report: Report = {"step": last, "from_step": state.step, "processes": world.size}
    trainer.recorder.inspect = None
    log(f"replay: steps {state.step + 1} to {last}")
    with screen.progress(state.step, last):
        for step in trainer.remaining():
            if step == last:
                report |= badstep.inspect(config, trainer.task, world, state.model, step)
            loop.train_step(trainer, step)
            if step == last:
                report["loss"], report["skipped"] = state.meters.last_step()
            if step in rows:
                loop.begin_row(trainer)
            if step == last:
                break
    if state.step < last:
        raise UserError(f"the replay stopped after step {state.step} of {last}; run the same command again")
    trainer.recorder.settle()
    trainer.stop.wait()
    trainer.stop.restore()
    trainer.run.close()
    distributed.barrier()
    return report


def compare(run: Path, folder: Path, report: Report) -> Report:
    """Whether the repeated metric rows, and the step's loss, are equal to the run's in every bit."""
    names = ("loss", "loss_train", "grad_norm", "lr")
    mine = read_csv(folder / "metrics.csv")
    theirs = {row["step"]: row for row in read_csv(run / "metrics.csv")}
    common = [(row, theirs[row["step"]]) for row in mine if row["step"] in theirs]
    equal = sum(all(row.get(name) == other.get(name) for name in names) for row, other in common)
    found: Report = {"rows_compared": len(common), "rows_equal": equal}
    path = run / f"bad-step-{report['step']}.json"
    if path.exists():
        recorded = float(json.loads(path.read_text())["loss"])
        same = recorded == report["loss"] or (math.isnan(recorded) and math.isnan(report["loss"]))
        found |= {"recorded_loss": recorded, "loss_equal": same}
    return found


def show(report: Report) -> None:
    """Print the first place that is not finite, the rows with the highest loss, and the gradient norms."""
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    rows = sorted(report["rows"], key=lambda row: (math.isfinite(row["loss"]), -row["loss"]))
    worst = Table("epoch", "id", "loss", "source", title=f"rows with the highest loss, of {len(rows)}")
    for row in rows[:ROWS_SHOWN]:
        worst.add_row(str(row["epoch"]), str(row["id"]), f"{row['loss']:.6g}", row["source"])
    norms = Table("layer", "gradient norm")
    for layer, norm in report["gradient_norms"].items():
        norms.add_row(layer, f"{norm:.4g}")
    console.print(worst, norms)
    print(f"step {report['step']}: loss {report['loss']!r}{', skipped' if report['skipped'] else ''}")
    print(f"first non-finite value: {badstep.place_of(report) or 'none'}")
    if "loss_equal" in report:
        print(f"the run recorded the loss {report['recorded_loss']!r}")
    if not report["rows_compared"]:
        print("the run has no metric row of a repeated step to compare with; see --run.log-every")
        return
    print(
        f"bit-identical: {report['rows_equal']} of {report['rows_compared']} metric rows since step "
        f"{report['from_step']}, repeated by {report['processes']} process(es)"
    )


def main() -> None:
    with once_per_machine():
        arguments = tyro.cli(Arguments, prog="python -m train.replay")
    if arguments.processes > 1 and not distributed.under_torchrun():
        distributed.launch(arguments.processes, restarts=0)
    report = ending.end_together(lambda: replay(arguments))
    if distributed.rank() == 0:
        show(report)


if __name__ == "__main__":
    run_cli(main)
