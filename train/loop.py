"""The training core: one function from a configuration to trained weights, read top to bottom."""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipelines import loader
from pipelines.catalogue import Catalogue, open_catalogue
from pipelines.errors import UserError
from pipelines.files import atomic_text, atomic_write
from pipelines.inputs import Normalised
from train import checkpoint, distributed, rundir, setup
from train.config import Config
from train.console import Screen
from train.distributed import World
from train.meters import Clock, Detail, Meters
from train.metrics import TIMING_COLUMNS, MetricsWriter, read_csv
from train.optim import make_ema, make_optimizer, make_schedule, seed_weights, update
from train.setup import Autocast
from train.state import State


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
        distributed.launch(config.speed.processes, config.speed.restarts)
    if distributed.under_torchrun():  # torchrun's count is the truth; speed.processes has done its part
        config = dataclasses.replace(config, speed=dataclasses.replace(config.speed, processes=1))
    if distributed.local_rank() == 0:  # once a machine, also where torchrun was called by hand
        setup.check(config)
    if rundir.is_finished(config):
        if distributed.rank() == 0:
            print(f"{rundir.folder_of(config)} is finished; for another run choose another RUN (--run.name)")
        return
    try:
        stopped = fit(config, make_task)
    except RuntimeError as error:
        if sentence := explained(error, config):
            raise UserError(sentence) from error
        raise
    finally:
        distributed.finish()
    if stopped:
        sys.exit(128 + stopped)


def explained(error: RuntimeError, config: Config) -> str:
    """What to do about an error that lies in the machine and not in the code; empty for any other."""
    speed = config.speed
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return (
            f"memory does not hold a step ({str(error).partition('.')[0]}); lower speed.micro_batch "
            f"({speed.micro_batch}), which leaves the result as it is, or set model.checkpoint_stages"
        )
    if distributed.lost_another(error):
        return (
            f"process {distributed.rank()}: another process ended, or gave no sign for {speed.timeout:g} s "
            "(speed.timeout); see what it said, then run the same command to go on from the last checkpoint"
        )
    return ""


def fit(config: Config, make_task: MakeTask) -> int:
    """Train to the end or to a signal; returns the signal's number, 0 when the run is complete."""
    # ---- processes, folder, log
    world = distributed.start(config.speed.device, config.speed.timeout)
    torch.set_num_threads(setup.torch_threads(world))
    run = rundir.folder_of(config)
    catalogue = open_catalogue(config.data.path, "train")
    validation = setup.open_validation(config)
    note = {"processes": world.size}
    lock = rundir.open_run(config, catalogue.info, note) if world.is_main else None
    screen = Screen(world.is_main, run / "log.txt")
    screen.line(f"run {run}: {world.size} process(es) on {setup.device_words(world)}")
    autocast, words = setup.precision(config, world)
    screen.line(words)

    # ---- data
    micro, accumulate = setup.micro_batches(config, world)
    per_epoch = len(catalogue) / config.optim.batch
    steps = math.ceil(config.optim.epochs * per_epoch)
    for words in setup.plan_words(config, world, catalogue, validation, steps):
        screen.line(words)

    # ---- model, optimizer, schedule
    seed_weights(config.run.seed)
    task = make_task(config, catalogue, world, autocast)
    model = task.model
    parameters = sum(p.numel() for p in model.parameters())
    screen.line(f"model {config.model.name}: {parameters / 1e6:.1f} M parameters")
    if config.model.init:
        screen.line(setup.warm_start(model, config))
    if words := setup.freeze(model, config):
        screen.line(words)
    ready = Normalised(model, config.data.frames).to(world.device)
    optimizer = make_optimizer(model, config.optim)
    schedule = make_schedule(optimizer, config.optim, steps, per_epoch)
    ema = make_ema(model, config.optim)
    state = State(model, optimizer, ema, Meters(world.device))

    # ---- resume
    saved, complaints = checkpoint.load_newest(run / "checkpoints", world.device)
    for complaint in complaints:
        screen.line(complaint)
    if saved is not None:
        state.restore(saved, world)
        screen.line(f"resumed from step {state.step} of {steps}")
    metrics = MetricsWriter(run, task.columns, state.step) if world.is_main else None
    detail = Detail(run / "detail", world.rank, state.step) if config.run.detail else None
    writer = checkpoint.Writer(run / "checkpoints", config.run.keep)
    blank = loader.blank_batch(setup.view_spec(config), micro, world.device)
    screen.line(setup.compile_model(ready, config, world, lambda: task.loss(ready, blank), autocast))
    joined = setup.join(ready, world)
    evaluated = ready if ema is None else Normalised(ema.module, config.data.frames).to(world.device)
    operations = setup.step_operations(model, config)
    stop = distributed.StopSignal(world, config.speed.timeout)
    batches = setup.training_batches(config, world, catalogue, accumulate, state.step)
    clock = Clock(state.elapsed)
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
    with screen.progress(state.step, steps):
        for step in range(state.step + 1, steps + 1):
            schedule.step_update(step - 1)
            loss, bad = _accumulate(joined, task, _timed(batches, accumulate, clock), accumulate, autocast)
            norm, skipped = update(model, optimizer, config.optim.clip_norm)
            if ema is not None:
                ema.update(model)
            state.step = step
            state.meters.add(loss, norm, skipped, bad)
            settle()
            if detail is not None:
                detail.add(step, loss, clock)
            screen.advance(step)
            signal_number = stop.agreed()
            last = step == steps
            evaluates = validation is not None and (last or step % config.run.eval_every == 0)
            if last or evaluates or step % config.run.log_every == 0:
                row = clock.row(step, config.optim.batch, world, operations)
                row |= {"epoch": step / per_epoch, "lr": max(g["lr"] for g in optimizer.param_groups)}
                pending = (row, state.meters.take())
                if detail is not None:
                    detail.write()
                if evaluates and validation is not None:
                    scores = task.evaluate(evaluated, validation)
                    row |= scores
                    _keep_best(state, scores, config, world)
                    clock.skip()
            if last or signal_number or step % config.run.checkpoint_every == 0:
                settle()
                state.elapsed = clock.elapsed()
                values = state.to_dict()
                if metrics is not None:
                    metrics.commit()
                    writer.save(step, values)
                clock.skip()
            if signal_number and not last:
                break
    stop.wait()
    writer.wait()
    if detail is not None:
        detail.write()

    # ---- results
    if signal_number and state.step != steps:
        screen.line(f"signal {signal_number}: saved step {state.step}; run the same command to go on")
        return signal_number
    if metrics is not None and lock is not None:
        if task.picture is not None:
            task.picture(evaluated, validation or catalogue)
        metrics.close()
        from train.card import card  # here: it needs the models, and a launcher does not

        last_row = [{}, *read_csv(run / "metrics.csv")][-1]
        atomic_text(run / "model_card.md", card(config, catalogue.info, last_row, steps))
        _export(state.evaluated, config, run / "model.safetensors", steps)  # last: it ends the run
        screen.line(f"done: {run}/model.safetensors after {clock.elapsed():.0f} s of training")
        lock.close()
    distributed.barrier()
    return 0


def _keep_best(state: State, scores: dict[str, float], config: Config, world: World) -> None:
    """Write best.safetensors when this evaluation is the best so far: by accuracy, or by MAE's loss."""
    score = scores.get("acc", -scores["loss_val"])
    if score > state.best:
        state.best = score
        if world.is_main:
            _export(state.evaluated, config, rundir.folder_of(config) / "best.safetensors", state.step)


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
    if math.isnan(loss):  # every step since the last row was skipped
        loss = norm = None
    row |= {task.loss_column: loss, "grad_norm": norm, "skipped": int(skipped), "bad": round(bad)}
    if metrics is not None:
        metrics.write(row)
    hidden = (*TIMING_COLUMNS, "samples", "step", "skipped", "bad", "held_out")
    shown = {k: v for k, v in row.items() if k not in hidden and v is not None}
    text = " ".join(f"{key} {value:.4g}" for key, value in shown.items())
    wait = 100 * row["data_wait_ms"] / row["step_ms"]
    text += f" | {row['samples_per_s']:.1f} samples/s, data wait {wait:.0f} %"
    counts = {"steps skipped": row["skipped"], "damaged samples replaced": row["bad"]}
    faults = "".join(f", {count} {what}" for what, count in counts.items() if count)
    screen.line(f"step {row['step']}: {text}{faults}")
    screen.show(row, task.loss_column)
    if in_a_row >= config.run.max_skipped:
        raise UserError(
            f"the last {int(in_a_row)} steps up to step {row['step']} had non-finite gradients; the last "
            f"checkpoint in {rundir.folder_of(config)}/checkpoints is from before them: lower optim.lr, set "
            "optim.clip_norm or use speed.precision fp32"
        )


def _export(model: nn.Module, config: Config, path: Path, step: int) -> None:
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    # One entry: several would be written in any order, and the file's checksum would mean nothing.
    about = {"hiera-train": json.dumps({"model": config.model.name, "step": step})}
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata=about)
