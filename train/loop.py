"""The training core: one function from a configuration to trained weights, read top to bottom."""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipelines import loader
from pipelines.catalogue import Catalogue, open_catalogue
from pipelines.errors import UserError
from pipelines.files import atomic_write
from pipelines.inputs import Normalised
from train import checkpoint, distributed, rundir, setup
from train.config import Config
from train.console import Screen
from train.distributed import World
from train.meters import Clock, Meters
from train.metrics import TIMING_COLUMNS, MetricsWriter
from train.optim import make_optimizer, make_schedule, scaled_lr, seed_step, update
from train.setup import Autocast


@dataclass(frozen=True)
class Task:
    """What differs between pretraining and finetuning."""

    model: nn.Module
    loss: Callable[[nn.Module, loader.Batch], torch.Tensor]
    """(model, batch) -> mean loss of the batch, 0-D."""
    evaluate: Callable[[Normalised, Catalogue], dict[str, float]]
    """(model, validation split) -> metric columns; called by all processes together."""
    columns: tuple[str, ...]
    loss_column: str
    picture: Callable[[Normalised, Catalogue], None] | None = None
    """Draws something into the run folder at the end, on rank 0."""


MakeTask = Callable[[Config, Catalogue, World, Autocast], Task]


def main(config: Config, make_task: MakeTask) -> None:
    """Check, start the processes that were asked for, and train."""
    if config.speed.processes > 1 and not distributed.under_torchrun():
        setup.check(config)
        distributed.launch(config.speed.processes)
    if distributed.under_torchrun():  # torchrun's count is the truth; speed.processes has done its part
        config = dataclasses.replace(config, speed=dataclasses.replace(config.speed, processes=1))
    else:
        setup.check(config)
    if rundir.is_finished(config):
        if distributed.rank() == 0:
            print(f"{rundir.folder_of(config)} is finished; for another run choose another RUN (--run.name)")
        return
    try:
        stopped = fit(config, make_task)
    finally:
        distributed.finish()
    if stopped:
        sys.exit(128 + stopped)


def fit(config: Config, make_task: MakeTask) -> int:
    """Train to the end or to a signal; returns the signal's number, 0 when the run is complete."""
    # ---- processes, folder, log
    world = distributed.start(config.speed.device)
    torch.set_num_threads(setup.torch_threads(world))
    screen = Screen(world.is_main)
    run = rundir.folder_of(config)
    lock = rundir.open_run(config, {"processes": world.size}) if world.is_main else None
    screen.log_to(run / "log.txt")
    screen.line(f"run {run}: {world.size} process(es) on {setup.device_words(world)}")
    autocast, words = setup.precision(config, world)
    screen.line(words)

    # ---- data
    catalogue = open_catalogue(config.data.path, "train")
    validation = setup.open_validation(config)
    view = setup.view_spec(config)
    micro, accumulate = setup.micro_batches(config, world)
    per_epoch = len(catalogue) / config.optim.batch
    steps = math.ceil(config.optim.epochs * per_epoch)
    screen.line(
        f"data {config.data.path}: {len(catalogue)} training and {len(validation) if validation else 0} "
        f"validation {catalogue.info.kind}s, {len(catalogue.info.classes)} classes"
    )
    screen.line(f"loader: {loader.sizing(world.device, config.speed.threads).reason}")
    repeats = config.data.repeats
    screen.line(
        f"global batch {config.optim.batch} = {world.size} processes x {micro} micro x {accumulate} "
        f"accumulated{f', {repeats} rows of each sample' if repeats > 1 else ''}; "
        f"lr {scaled_lr(config.optim):.3g} = {config.optim.lr:.3g} x {config.optim.batch} / "
        f"{config.optim.lr_batch}; {steps} steps = {config.optim.epochs:g} epochs"
    )
    if note := loader.short_clip_note(catalogue, view):
        screen.line(note)

    # ---- model, optimizer, schedule
    seed_step(config.run.seed, 0, 0)
    task = make_task(config, catalogue, world, autocast)
    model = task.model
    parameters = sum(p.numel() for p in model.parameters())
    screen.line(f"model {config.model.name}: {parameters / 1e6:.1f} M parameters")
    if config.model.init:
        screen.line(setup.warm_start(model, config))
    ready = Normalised(model, config.data.frames).to(world.device)
    optimizer = make_optimizer(model, config.optim)
    schedule = make_schedule(optimizer, config.optim, steps, per_epoch)

    # ---- resume
    state, complaints = checkpoint.load_newest(run / "checkpoints", world.device)
    for complaint in complaints:
        screen.line(complaint)
    meters = Meters.fresh(world.device)
    start, elapsed = 0, 0.0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        meters.restore(state["meters"], world.rank, world.size)
        start, elapsed = state["step"], state["elapsed"]
        screen.line(f"resumed from step {start} of {steps}")
    metrics = MetricsWriter(run, task.columns, start) if world.is_main else None
    wrapped = setup.wrap(ready, config, world, screen)
    stop = distributed.StopSignal(world)
    batches = loader.train_batches(
        catalogue,
        view,
        seed=config.run.seed,
        global_batch=config.optim.batch,
        rank=world.rank,
        world=world.size,
        accumulate=accumulate,
        start_step=start,
        device=world.device,
        threads=config.speed.threads,
        order=config.data.order,
        window=config.data.window,
        max_bad=config.data.max_bad,
        hw_decoder_load=config.speed.hw_decoder_load,
    )
    clock = Clock(elapsed)
    pending: tuple[dict, torch.Tensor] | None = None
    signal_number = 0

    def settle() -> None:
        """Write the row whose numbers were still on the device when it was taken."""
        nonlocal pending
        if pending is not None:
            row, values = pending
            pending = None
            _finish_row(row, values, task, metrics, screen, config)

    # ---- steps
    with screen.progress(start, steps):
        for step in range(start + 1, steps + 1):
            seed_step(config.run.seed, step, world.rank)
            schedule.step_update(step - 1)
            loss, bad = _accumulate(wrapped, task, _timed(batches, accumulate, clock), accumulate, autocast)
            norm, skipped = update(model, optimizer, config.optim.clip_norm)
            meters.add(loss, norm, skipped, bad)
            settle()
            screen.advance(step)
            signal_number = stop.agreed()
            last = step == steps
            evaluates = validation is not None and (last or step % config.run.eval_every == 0)
            if last or evaluates or step % config.run.log_every == 0:
                row = clock.row(step, config.optim.batch, world.device)
                row |= {"epoch": step / per_epoch, "lr": max(g["lr"] for g in optimizer.param_groups)}
                pending = (row, meters.take())
                if evaluates and validation is not None:
                    row |= task.evaluate(ready, validation)
                    clock.skip()
            if last or signal_number or step % config.run.checkpoint_every == 0:
                settle()
                sums = meters.gathered()
                if world.is_main and metrics is not None:
                    metrics.commit()
                    state = {"step": step, "elapsed": clock.elapsed(), "meters": sums}
                    state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    checkpoint.save(run / "checkpoints", step, state, config.run.keep)
                clock.skip()
            if signal_number and not last:
                screen.line(f"signal {signal_number}: saved step {step}; run the same command to go on")
                break
    stop.wait()

    # ---- results
    if signal_number and step != steps:
        return signal_number
    if world.is_main and metrics is not None and lock is not None:
        if task.picture is not None:
            task.picture(ready, validation or catalogue)
        metrics.close()
        _export(model, config, run)
        screen.line(f"done: {run}/model.safetensors after {clock.elapsed():.0f} s of training")
        lock.close()
    distributed.barrier()
    return 0


def to_device(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy small host data to the device without waiting for it."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _timed(batches: Iterator[loader.Batch], count: int, clock: Clock) -> Iterator[loader.Batch]:
    """The next `count` micro batches, noting how long each was waited for."""
    for _ in range(count):
        begin = time.perf_counter()
        batch = next(batches)
        clock.waited += time.perf_counter() - begin
        yield batch
    clock.steps += 1


def _accumulate(
    model: nn.Module, task: Task, batches: Iterator[loader.Batch], accumulate: int, autocast: Autocast
) -> tuple[torch.Tensor, int]:
    """Forward and backward over one step's micro batches, gradients averaged.

    Returns the mean loss and the number of rows that stand in for damaged samples.
    """
    model.train()
    losses, bad = [], 0
    for index, batch in enumerate(batches):
        joins = index + 1 == accumulate or not isinstance(model, DistributedDataParallel)
        with contextlib.nullcontext() if joins else model.no_sync():  # pyrefly: ignore
            with autocast():
                loss = task.loss(model, batch)
            (loss / accumulate).backward()
        losses.append(loss.detach())
        bad += batch.bad
    return torch.stack(losses).mean(), bad


def _finish_row(
    row: dict, values: torch.Tensor, task: Task, metrics: MetricsWriter | None, screen: Screen, config: Config
) -> None:
    loss, norm, bad, _, skipped, in_a_row = values.tolist()
    row |= {task.loss_column: loss, "grad_norm": norm, "skipped": int(skipped), "bad": round(bad)}
    if metrics is not None:
        metrics.write(row)
    hidden = (*TIMING_COLUMNS, "samples", "step", "skipped", "bad")
    shown = {k: v for k, v in row.items() if k not in hidden}
    text = " ".join(f"{key} {value:.4g}" for key, value in shown.items())
    wait = 100 * row["data_wait_ms"] / row["step_ms"]
    text += f" | {row['samples_per_s']:.1f} samples/s, data wait {wait:.0f} %"
    counts = {"steps skipped": row["skipped"], "damaged samples replaced": row["bad"]}
    faults = "".join(f", {count} {what}" for what, count in counts.items() if count)
    screen.line(f"step {row['step']}: {text}{faults}")
    if in_a_row >= config.run.max_skipped:
        raise UserError(
            f"the last {int(in_a_row)} steps up to step {row['step']} had non-finite gradients; the last "
            f"checkpoint in {rundir.folder_of(config)}/checkpoints is from before them: lower optim.lr, set "
            "optim.clip_norm or use speed.precision fp32"
        )


def _export(model: nn.Module, config: Config, run: object) -> None:
    path = rundir.folder_of(config) / "model.safetensors"
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata={"model": config.model.name, "format": "upstream-names"})
