"""The training core: one function from a configuration to trained weights, read top to bottom."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipelines import loader
from pipelines.catalogue import Catalogue, open_catalogue
from pipelines.errors import UserError, cause, in_loader, out_of_memory
from pipelines.inputs import Normalised
from train import checkpoint, compute, distributed, ending, rundir, setup
from train.compute import Autocast
from train.config import Config
from train.console import Screen, survive_closed_output
from train.distributed import World
from train.meters import IN_A_ROW, Clock, Detail, Meters
from train.metrics import MetricsWriter, score
from train.optim import make_ema, make_optimizer, seed_weights, set_learning_rate, total_steps, update
from train.recorder import Recorder
from train.results import export, write_card
from train.state import State


@dataclass(frozen=True)
class Task:
    """What differs between pretraining and finetuning."""

    model: nn.Module
    loss: Callable[[nn.Module, loader.Batch], torch.Tensor]
    """(model, batch) -> mean loss of the batch, 0-D."""
    evaluate: Callable[[Normalised, Catalogue, Callable[[], None]], dict[str, float]]
    """(model, validation split, check) -> metric columns; all processes call it together. It calls `check`
    once a batch, which raises when a signal ends the evaluation."""
    columns: tuple[str, ...]
    loss_column: str
    picture: Callable[[Normalised, Catalogue], None] | None = None
    """Draws something into the run folder at the end, on rank 0."""


MakeTask = Callable[[Config, Catalogue, World, Autocast], Task]


def main(config: Config, make_task: MakeTask) -> None:
    """Check, start the processes that were asked for, and train."""
    if distributed.under_torchrun():  # torchrun's count is the truth; speed.processes has done its part
        config = dataclasses.replace(config, speed=dataclasses.replace(config.speed, processes=1))
    if distributed.local_rank() == 0:  # once a machine
        setup.check(config)
    if config.speed.processes > 1:
        rundir.check_config(config)
        if not rundir.is_finished(config):
            distributed.launch(config.speed.processes, config.speed.restarts)
    survive_closed_output()
    if stopped := ending.end_together(lambda: _fit_explained(config, make_task)):
        sys.exit(128 + stopped)


def _fit_explained(config: Config, make_task: MakeTask) -> int:
    """`fit`, whose errors become UserErrors where `explained` has a sentence for them."""
    try:
        return fit(config, make_task)
    except (RuntimeError, MemoryError) as error:
        if sentence := explained(error, config):
            raise UserError(sentence) from error
        raise


def explained(error: RuntimeError | MemoryError, config: Config) -> str:
    """What to do about an error that lies in the machine and not in the code; empty for any other."""
    speed = config.speed
    if out_of_memory(error):
        return (
            f"memory does not hold a step ({cause(error).partition('. ')[0].rstrip('.')}); lower "
            f"speed.micro_batch ({speed.micro_batch}), which leaves the result as it is, or set "
            f"model.checkpoint_stages{', or lower speed.threads' if in_loader(error) else ''}"
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
    torch.set_num_threads(distributed.torch_threads(world))
    run = rundir.folder_of(config)
    catalogue = open_catalogue(config.data.path, "train")
    validation = setup.open_validation(config)
    data = rundir.data_identity(catalogue.info)
    settings = setup.shared_settings(config)
    distributed.check_agreement(world, "the settings", settings, "start every process with the same command")
    distributed.check_agreement(world, "the shards", data, "stage the same dataset on every machine")
    entered = distributed.on_rank_0(world, lambda: rundir.enter(config, data))
    finished, newest, words = distributed.broadcast(entered[1:] if entered else (False, None, []))
    if finished:
        if world.is_main:
            print(f"{run} is finished; for another run choose another RUN (--run.name)")
        return 0
    screen = Screen(world.is_main, run / "log.txt")
    screen.line(f"run {run}: {world.size} process(es) on {distributed.device_words(world)}")
    for complaint in words:
        screen.line(complaint)
    autocast, words = setup.precision(config, world)
    screen.line(words)

    # ---- data
    micro, accumulate = setup.micro_batches(config, world)
    samples = len(catalogue)
    steps = total_steps(config.optim, samples)
    for words in setup.plan_words(config, world, catalogue, validation, steps):
        screen.line(words)

    # ---- model, optimizer, schedule
    seed_weights(config.run.seed)
    task = make_task(config, catalogue, world, autocast)
    model = task.model
    parameters = sum(p.numel() for p in model.parameters())
    screen.line(f"model {config.model.name}: {parameters / 1e6:.1f} M parameters")
    if config.model.init and newest is None:
        screen.line(setup.warm_start(model, config, classes=catalogue.info.classes))
    if words := setup.freeze(model, config):
        screen.line(words)
    ready = Normalised(model, config.data.frames).to(world.device)
    optimizer = make_optimizer(model, config.optim)
    state = State(model, optimizer, make_ema(model, config.optim), Meters(world.device))

    # ---- resume
    if newest is not None:
        state.restore(checkpoint.load(newest, world.device), world)
        screen.line(f"resumed from step {state.step} of {steps}")
    if state.step > steps:
        distributed.fail(
            world,
            f"{run} is already at step {state.step} and optim.epochs {config.optim.epochs:g} ends at step "
            f"{steps}; take more epochs, or choose another RUN",
        )
    sums = state.checksums().tolist()
    distributed.check_agreement(
        world,
        "weights or optimizer state",
        sums,
        f"are {run} and the starting weights the same files on every machine?",
    )
    metrics = None
    if world.is_main:
        rundir.record_start(config, data, {"step": state.step, "processes": world.size})
        metrics = MetricsWriter(run, task.columns, state.step)
        if any(row["step"] == state.step for row in metrics.kept):
            state.row = None
    state.row = distributed.broadcast(state.row)
    best = max((score(row) for row in metrics.kept), default=-math.inf) if metrics else math.inf
    detail = Detail(run / "detail", world.rank, state.step) if config.run.detail else None
    writer = checkpoint.Writer(run / "checkpoints", config.run.keep)
    ending.finish_first(writer.wait)
    blank = loader.blank_batch(setup.view_spec(config), micro, world.device)
    screen.line(compute.compile_model(ready, config, world, lambda: task.loss(ready, blank), autocast))
    joined = compute.join(ready, world)
    evaluated = ready if state.ema is None else Normalised(state.ema.module, config.data.frames)
    evaluated = evaluated.to(world.device)
    operations = setup.step_operations(model, config)
    stop = distributed.StopSignal(world, config.speed.timeout)
    batches = setup.training_batches(config, world, catalogue, accumulate, state.step)
    clock = Clock(state.elapsed, world.device)
    recorder = Recorder(config, world, task.loss_column, metrics, screen, steps)
    recorder.saved = state.step
    signal_number = 0

    def save() -> None:
        """Write a checkpoint of this step, unless it follows skipped steps: its weights may be bad."""
        recorder.settle()
        streak = int(state.meters.values[IN_A_ROW].item())
        if streak and state.step < steps:
            screen.line(f"step {state.step} is not saved: {streak} steps in a row had non-finite gradients")
        elif recorder.saved < state.step:
            state.elapsed = clock.elapsed()
            values = state.to_dict()
            if metrics is not None:
                metrics.commit()
                writer.save(state.step, values)
            recorder.saved = state.step
        clock.skip()

    def evaluate() -> int:
        """Complete and write the row of this step; if a signal comes first, save and return its number."""
        nonlocal best
        assert validation is not None and state.row is not None
        try:
            scores = task.evaluate(evaluated, validation, stop.check)
        except distributed.Stopped as stopped:
            save()
            return stopped.args[0]
        row, state.row = state.row | scores, None
        if score(row) > best:
            best = score(row)
            export(state.evaluated, config, "best.safetensors", state.step)
        recorder.write(row)
        clock.skip()
        return 0

    # ---- steps
    with screen.progress(state.step, steps):
        if state.row is not None:
            screen.line(f"step {state.step} was saved before its evaluation ended; evaluating it again")
            signal_number = evaluate()
        for step in range(state.step + 1, steps + 1):
            if signal_number:
                break
            set_learning_rate(optimizer, config.optim, step - 1, samples)
            loss, bad = _accumulate(joined, task, _timed(batches, accumulate, clock), accumulate, autocast)
            norm, skipped = update(model, optimizer, config.optim.clip_norm)
            if state.ema is not None:
                state.ema.update(model)
            state.step = step
            state.meters.add(loss, norm, skipped, bad)
            recorder.settle()
            if detail is not None:
                detail.add(step, loss, clock)
            screen.advance(step)
            signal_number = stop.agreed()
            last = step == steps
            evaluates = validation is not None and (last or step % config.run.eval_every == 0)
            if last or evaluates or step % config.run.log_every == 0:
                row = clock.row(step, config.optim.batch, world, operations)
                epoch = step * config.optim.batch / samples
                row |= {"epoch": epoch, "lr": max(g["lr"] for g in optimizer.param_groups)}
                recorder.take(row, state.meters)
                if detail is not None:
                    detail.write()
            if evaluates:
                state.row = recorder.finish()
            if last or signal_number or step % config.run.checkpoint_every == 0:
                save()
            if evaluates and not signal_number:
                signal_number = evaluate()
    stop.wait()
    recorder.settle()
    writer.wait()
    if detail is not None:
        detail.write()

    # ---- results
    if signal_number:
        what = f"stopped after step {state.step}; the last checkpoint is of step {recorder.saved}"
        screen.line(f"signal {signal_number}: {what}; run the same command to resume")
        # torchrun sends SIGTERM once a process has ended: until rank 0 has saved, none may end.
        distributed.barrier()
        stop.restore()
        return signal_number
    if metrics is not None and entered is not None:
        if task.picture is not None:
            task.picture(evaluated, validation or catalogue)
        metrics.close()
        write_card(config, catalogue.info, steps)
        path = export(state.evaluated, config, "model.safetensors", steps)  # last: it ends the run
        screen.line(f"done: {path} after {clock.elapsed():.0f} s of training")
        entered[0].close()
    distributed.barrier()
    stop.restore()
    return 0


def _timed(batches: Iterator[loader.Batch], count: int, clock: Clock) -> Iterator[loader.Batch]:
    """The next `count` micro batches, noting how long each was waited for."""
    for _ in range(count):
        yield clock.wait(batches)
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
