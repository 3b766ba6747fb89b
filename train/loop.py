"""The training core: one function from a configuration to trained weights, read top to bottom."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.layers import NormalizedInput
from pipelines.errors import UserError
from pipelines.loader import Batch, blank_batch
from train import badstep, build, checkpoint, distributed, ending, rundir, track
from train.build import Autocast
from train.config import Config
from train.console import command_of, log, screen, survive_closed_output
from train.meters import IN_A_ROW, Clock, Detail, Recorder
from train.metrics import MetricsWriter, Row, best_of, best_text, score
from train.optim import eval_interval, set_learning_rate, total_steps, update
from train.profiling import profiled
from train.rundir import Run, start_run
from train.task import MakeTask, Task


def main(config: Config, make_task: MakeTask) -> None:
    """Check the configuration, start the processes it asks for, and train."""
    if distributed.under_torchrun():  # torchrun has started the processes: speed.processes has no effect
        config = replace(config, speed=replace(config.speed, processes=1))
    if distributed.local_rank() == 0:  # once per machine
        build.check(config)
    if config.speed.processes > 1:
        rundir.check_config(config)
        if not rundir.is_finished(config):
            distributed.launch(config.speed.processes, config.speed.restarts)
    survive_closed_output()
    if stopped := ending.end_together(lambda: _fit_explained(config, make_task)):
        sys.exit(128 + stopped)


def _fit_explained(config: Config, make_task: MakeTask) -> int:
    """`fit`, with UserErrors for the errors that `ending.explained` has a sentence for."""
    try:
        return fit(config, make_task)
    except (RuntimeError, MemoryError) as error:
        if sentence := ending.explained(error, config.speed):
            raise UserError(sentence) from error
        raise


def fit(config: Config, make_task: MakeTask) -> int:
    """Train to the end or to a signal; returns the signal's number, 0 when the run is complete."""
    run = start_run(config)  # processes, folder, lock, log, and the checkpoint to resume from
    if run.finished:
        return 0
    with run.starting():  # an error leaves no folder behind
        trainer = Trainer(config, make_task, run)
    state, task = trainer.state, trainer.task
    with screen.progress(state.step, trainer.steps):
        if state.row is not None:
            log(f"step {state.step} was saved before its evaluation ended; evaluating it again")
            evaluate(trainer)
        for step in profiled(trainer.remaining(), config, trainer.run.world):
            train_step(trainer, step)
            evaluates = trainer.due(step, trainer.eval_every) and task.validation is not None
            if evaluates or trainer.due(step, config.run.log_every):
                begin_row(trainer)
            if evaluates:
                state.row = trainer.recorder.finish()
            if trainer.signal or trainer.due(step, config.run.checkpoint_every):
                save(trainer)  # before the evaluation, so that a crash or signal in it costs no step
            if evaluates and not trainer.signal:
                evaluate(trainer)
    finish(trainer)
    return trainer.signal


class Trainer:
    """The parts of a run that its steps use.

    DDP is made after `resume`: it copies rank 0's weights to all ranks, which would hide a difference.
    """

    def __init__(self, config: Config, make_task: MakeTask, run: Run) -> None:
        build.seed_weights(config.run.seed)
        task = make_task(config, run)  # datasets, model, loss, evaluation
        state = build.build(config, task, run)  # precision, starting weights, optimizer, moving average
        build.resume(config, task, run, state)  # all processes must have the same weights
        self.config, self.task, self.run, self.state = config, task, run, state
        self.tracks: track.Tracks | None = None  # TensorBoard and others, on rank 0
        if config.run.track:
            self.tracks = distributed.on_rank_0(run.world, lambda: track.Tracks(config, state.step))
        world, folder = run.world, config.run.folder
        self.steps = total_steps(config.optim, len(task.training))  # of the whole run
        self.eval_every = config.run.eval_every or eval_interval(config.optim, len(task.training))
        self.signal = 0  # the number of the signal that stops the run
        self.writer = checkpoint.Writer(folder / "checkpoints", config.run.keep)
        ending.finish_first(self.writer.wait)
        self.metrics: MetricsWriter | None = None
        self.best: Row = {}  # the row with the best evaluation
        self.since = 0  # evaluations after it
        if world.is_main:
            size = sum(parameter.numel() for parameter in state.model.parameters())
            about = {"step": state.step, "processes": world.size, "parameters": size}
            rundir.record_start(config, run.data, about)
            self.metrics = MetricsWriter(folder, task.columns, state.step)
            trackers = [self.tracks.row] if self.tracks else []
            self.metrics.followers = [run.beat, self.writer.check, *trackers]
            evaluated = [row for row in self.metrics.kept if row["loss_val"] is not None]
            self.best = best_of(evaluated)
            self.since = sum(row["step"] > self.best.get("step", 0) for row in evaluated)
            if task.validation is None and config.run.patience:
                log("run.patience has no effect: the data has no validation split")
            if task.validation is None or any(row["step"] == state.step for row in self.metrics.kept):
                state.row = None
        state.row, self.best, self.since = distributed.broadcast((state.row, self.best, self.since))
        self.micro, self.accumulate = build.micro_batches(config, world.size, task.mixed)
        model = self.eval_model = NormalizedInput(state.model, config.data.frames).to(world.device)
        if state.ema is not None:
            self.eval_model = NormalizedInput(state.ema.module, config.data.frames).to(world.device)
        blank = blank_batch(config.data, self.micro, world.device)
        build.compile_model(model, config.speed, world.device, lambda: task.loss(model, blank))
        self.model = build.join(model, world)
        self.autocast = build.autocast_for(config.speed, world.device)
        build.arrange_buckets(self.model, self.autocast, lambda: task.loss(self.model, blank))
        self.stop = ending.StopSignal(config.speed.timeout)
        self.batches = build.training_batches(config, world, task.training, self.accumulate, state.step)
        self.recorder = Recorder(config.run, world, task.loss_column, self.metrics, self.steps)
        self.recorder.saved = state.step
        if task.row_losses is not None:
            self.recorder.inspect = partial(badstep.record, config, task, world, state)
        self.detail = Detail(folder / "detail", world.rank, state.step) if config.run.detail else None
        self.clock = Clock(state.elapsed, world.device)

    def remaining(self) -> Iterator[int]:
        """The steps that are left, until a signal or `run.patience` stops the run."""
        while self.state.step < self.steps and not self.signal and not self.stops_early:
            yield self.state.step + 1

    @property
    def stops_early(self) -> bool:
        """Whether steps are left, and the last `run.patience` evaluations gave no better result."""
        return self.state.step < self.steps and 0 < self.config.run.patience <= self.since

    def due(self, step: int, every: int) -> bool:
        """Whether something that happens every `every` steps, and after the last one, happens now."""
        return step == self.steps or step % every == 0


# ---- steps


def train_step(trainer: Trainer, step: int) -> None:
    """One optimizer step over `accumulate` micro batches. Never waits for the device: no host sync."""
    optim, state = trainer.config.optim, trainer.state
    set_learning_rate(state.optimizer, optim, step - 1, len(trainer.task.training))
    loss, bad = _accumulate(
        trainer.model,
        trainer.task,
        trainer.clock.take(trainer.batches, trainer.accumulate),
        trainer.accumulate,
        trainer.autocast,
    )
    norm, skipped = update(state.model, state.optimizer, optim.clip_norm)
    if state.ema is not None:
        state.ema.update(state.model)
    state.step = step
    state.meters.add(loss, norm, skipped, bad)
    trainer.recorder.settle()
    if trainer.detail is not None:
        trainer.detail.add(step, loss, trainer.clock)
    screen.advance(step)
    trainer.signal = trainer.stop.agreed()


def _accumulate(
    model: nn.Module, task: Task, batches: Iterator[Batch], accumulate: int, autocast: Autocast
) -> tuple[Tensor, int]:
    """Forward and backward over one step's micro batches, gradients averaged.

    Returns the mean loss and the number of rows that replace damaged samples.
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


def begin_row(trainer: Trainer) -> None:
    """Begin the metric row of this step; it is read one step later."""
    state, batch = trainer.state, trainer.config.optim.batch
    if not trainer.clock.rows:
        build.log_memory(trainer.micro, trainer.accumulate, trainer.run.world.device)
    row = trainer.clock.row(state.step, batch, trainer.run.world, trainer.task.operations)
    row["epoch"] = state.step * batch / len(trainer.task.training)
    row["lr"] = max(group["lr"] for group in state.optimizer.param_groups)
    trainer.recorder.begin(row, state.meters)
    if trainer.detail is not None:
        trainer.detail.write()


def save(trainer: Trainer) -> None:
    """Write a checkpoint, unless the last steps were skipped: the weights may be bad then."""
    state, recorder = trainer.state, trainer.recorder
    recorder.settle()
    streak = int(state.meters.values[IN_A_ROW].item())
    if streak and state.step < trainer.steps:
        log(f"step {state.step} is not saved: {streak} steps in a row had non-finite gradients")
    elif recorder.saved < state.step:
        state.elapsed = trainer.clock.elapsed()
        values = state.to_dict()
        if trainer.metrics is not None:
            trainer.writer.wait()  # if the disk is full, its error comes before that of the rows
            trainer.metrics.commit()
            trainer.writer.save(state.step, values)
        recorder.saved = state.step
    trainer.clock.skip()


def evaluate(trainer: Trainer) -> None:
    """Evaluate, complete and write the row of this step; if a signal comes first, save instead."""
    task, state = trainer.task, trainer.state
    assert task.validation is not None and state.row is not None
    trainer.run.beat(state.row, "evaluating")
    try:
        scores = task.evaluate(trainer.eval_model, task.validation, trainer.stop.check)
    except ending.Stopped as stopped:
        save(trainer)
        trainer.signal = stopped.args[0]
        return
    row, state.row = state.row | scores, None
    trainer.since += 1
    if score(row) > score(trainer.best):
        trainer.best, trainer.since = row, 0
        if trainer.metrics is not None:
            from train.card import export

            export(state.evaluated, trainer.config, "best.safetensors", state.step)
    trainer.recorder.write(row, trainer.best)
    if trainer.tracks is not None:
        trainer.tracks.draw(task, trainer.eval_model, state.step)
    trainer.clock.skip()


# ---- the end


def finish(trainer: Trainer) -> None:
    """Complete the rows and checkpoints; if no signal stopped the run, also write the results."""
    config, task, state = trainer.config, trainer.task, trainer.state
    trainer.stop.wait()
    trainer.recorder.settle()
    if trainer.stops_early and not trainer.signal:
        better = f"the last {trainer.since} evaluations brought no improvement (run.patience)"
        log(f"stopped early after step {state.step} of {trainer.steps}: {better}")
        save(trainer)
    trainer.writer.wait()
    if trainer.detail is not None:
        trainer.detail.write()
    if trainer.signal:
        what = f"stopped after step {state.step}; the last checkpoint is of step {trainer.recorder.saved}"
        log(f"signal {trainer.signal}: {what}; run the same command to resume")
    elif trainer.metrics is not None:
        from train.card import export, write_card  # here: it needs the models, and a launcher does not

        if task.picture is not None:
            data, path = task.validation or task.training, config.run.folder / "reconstruction.png"
            task.picture(path, trainer.eval_model, data, 6)
        trainer.metrics.close()
        write_card(config, task.training.info, state.step)
        path = export(state.evaluated, config, "model.safetensors", state.step)  # last: it ends the run
        best = f"; {best_text(trainer.best)}: best.safetensors" if trainer.best else ""
        log(f"done: {path} after {trainer.clock.elapsed():.0f} s of training{best}")
        log(f"to see the results: {command_of(config.run.folder, 'report', 'tools.report')}")
    trainer.run.beat({"step": state.step}, "stopped" if trainer.signal else "finished")
    trainer.run.close()
    # torchrun sends SIGTERM to the others once a process has ended: none may end before rank 0 has saved.
    distributed.barrier()
    if trainer.tracks is not None:
        trainer.tracks.close()
    trainer.stop.restore()
