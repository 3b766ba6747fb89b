"""Resuming: the checkpoint, settings and rows; signals, closed terminals, skipped steps."""

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from multiprocessing.reduction import DupFd
from pathlib import Path

import pytest
import torch

from pipelines.config import Augment
from pipelines.errors import UserError, run_cli
from tests import LONG
from tests.fault_helpers import CLEAN, redirect_output, task_of, two_ranks
from tests.pipelines_fixtures import read_rows, write_rows
from tests.train.test_runs import assert_same, descendants, results
from tests.train_helpers import ROOT, arguments, module, small
from train import checkpoint, config, ending, finetune, loop, rundir
from train.config import Config
from train.metrics import read_csv
from train.task import MakeTask, Task

CPU = torch.device("cpu")


def quick(data: Path, root: Path, name: str, preset: str = "image-ft-pico", **optim: object) -> Config:
    """A run of 10 steps on 32-pixel images: rows every 2 steps, evaluation every 5, a checkpoint every 4."""
    base = small(preset, data, root, name, **{"batch": 4, "lr_batch": 4, "epochs": 1.0, **optim})
    return replace(
        base,
        data=replace(base.data, size=32 if "ft" in preset else 64),
        run=replace(base.run, log_every=2, eval_every=5, checkpoint_every=4),
        speed=replace(base.speed, micro_batch=4),
    )


def changed(base: Config, **groups: dict) -> Config:
    """The configuration with changed values, such as changed(base, optim={"lr": 1.0})."""
    return replace(base, **{name: replace(getattr(base, name), **values) for name, values in groups.items()})


def fit(configuration: Config, task: MakeTask | None = None) -> Path:
    assert loop.fit(configuration, task or task_of(configuration)) == 0
    return configuration.run.folder


def stopping_at(number: int, step: int) -> MakeTask:
    """The usual task; in the step `step` after the start, the process gets a signal."""

    def make(*given) -> Task:
        task, calls = finetune.make_task(*given), iter(range(1, 1000))

        def loss(*batch):
            if next(calls) == step:
                os.kill(os.getpid(), number)
            return task.loss(*batch)

        return replace(task, loss=loss)

    return make


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in run.glob("checkpoints/step-*.pt"))


def last_state(run: Path) -> dict:
    newest = checkpoint.choose(run / "checkpoints")
    assert newest is not None
    return checkpoint.load(newest, CPU)


# ---- the checkpoint


def test_if_the_newest_checkpoint_is_damaged_the_run_resumes_from_the_one_before(images, tmp_path):
    whole = fit(quick(images, tmp_path, "whole"))
    damaged = quick(images, tmp_path, "damaged")
    run = fit(damaged)
    (run / "model.safetensors").unlink()
    (run / "checkpoints/step-000000010.pt").write_bytes(b"damaged")
    fit(damaged)
    assert "step-000000010.pt is damaged" in (run / "log.txt").read_text()
    assert "resumed from step 8 of 10" in (run / "log.txt").read_text()
    assert_same(whole, run)
    assert saved_steps(run) == [8, 10]


def test_if_all_checkpoints_are_damaged_the_run_ends_and_changes_nothing(images, tmp_path):
    settings = quick(images, tmp_path, "run")
    run = fit(settings)
    (run / "model.safetensors").unlink()
    for path in run.glob("checkpoints/*.pt"):
        path.write_bytes(b"damaged")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"none of the checkpoints in .* is valid"):
        loop.fit(settings, finetune.make_task)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("stale", ["listing", "weights"])
def test_rank_0_chooses_the_checkpoint_for_all_ranks(images, tmp_path, stale: str):
    """Rank 1 sees an older listing of the folder, but both resume from rank 0's checkpoint."""
    settings = quick(images, tmp_path, "run")
    run = fit(settings)
    (run / "model.safetensors").unlink()
    shutil.copytree(tmp_path, tmp_path / "old", ignore=shutil.ignore_patterns("*10.pt", "*10.sha256"))
    if stale == "weights":
        (run / "checkpoints/step-000000010.pt").write_bytes(b"damaged")
    codes, printed = two_ranks(settings, changed(settings, run={"root": tmp_path / "old"}))
    assert codes == [0, 0], printed
    assert f"resumed from step {8 if stale == 'weights' else 10} of 10" in (run / "log.txt").read_text()


def test_ranks_with_different_settings_or_shards_are_refused(images, tmp_path):
    settings = quick(images, tmp_path, "run")
    codes, printed = two_ranks(settings, changed(settings, optim={"lr": 0.5}))
    assert codes == [2, 2] and printed.count("error: the settings of rank 1 differ from those of rank 0") == 1
    shutil.copytree(images, tmp_path / "other")
    info = json.loads((images / "dataset.json").read_text())
    info["classes"] = ["dark", "light"]
    (tmp_path / "other/dataset.json").write_text(json.dumps(info))
    codes, printed = two_ranks(settings, changed(settings, data={"path": tmp_path / "other"}))
    assert codes == [2, 2] and printed.count("error: the shards of rank 1 differ from those of rank 0") == 1


# ---- the settings

# A new value for every setting that --run.allow can change.
NEW: dict[str, dict[str, object]] = {
    "data": {
        "stride": 2,
        "stride_fps": 15.0,
        "clip_start": 1,
        "eval_clip_start": 2,
        "sampling": "segments",
        "scale": (0.5, 1.0),
        "ratio": (0.9, 1.1),
        "flip": 0.0,
        "interpolation": "linear",
        "crop": 0.9,
        "augment": Augment(
            layers=1, magnitude=5.0, magnitude_std=0.1, probability=0.9, jitter=0.2, erase=0.3
        ),
        "same_clip": True,
        "order": "local",
        "window": 16,
    },
    "model": {"drop_path": 0.2, "dropout": 0.1, "checkpoint_stages": (1,)},
    "optim": {
        "lr": 0.01,
        "lr_batch": 8,
        "epochs": 1.5,
        "warmup_epochs": 0.2,
        "betas": (0.8, 0.9),
        "momentum": 0.5,
        "nesterov": False,
        "weight_decay": 0.2,
        "layer_decay": 0.5,
        "decay_last_block": False,
        "ema": 0.5,
        "clip_norm": 0.1,
        "min_lr": 1e-5,
    },
    "run": {"seed": 7},
}
NEW_FINETUNING = {
    "freeze": "trunk",
    "smoothing": 0.3,
    "mixup": 0.8,
    "cutmix": 1.0,
    "views": (1, 2),
    "pretrained_epochs": 400,
}
NEW_PRETRAINING = {"mask_ratio": 0.5, "decode_ratio": 0.5, "normalize_targets": False}


@pytest.mark.parametrize("preset", ["image-ft-pico", "image-mae-pico"])
def test_every_allowed_change_of_a_setting_takes_effect(images, tmp_path, monkeypatch, preset: str):
    """Regression: the optimizer groups in a checkpoint replaced the configured values."""
    settings = quick(images, tmp_path, "run", preset)
    run = fit(settings)
    own = NEW_FINETUNING if "ft" in preset else NEW_PRETRAINING
    new = replace(changed(settings, **NEW), **own)
    keys = {key for key in config.flatten(config.to_dict(new)) if not key.startswith(config.FREE)}
    differing = config.differences(settings, new)
    assert differing.keys() == keys - set(config.FIXED), "NEW needs a value for each setting"
    spelled = tuple(name.replace("_", "-") for name in differing)
    used: list[torch.optim.Optimizer] = []

    def spy(model, optimizer, clip_norm):
        used.append(optimizer)
        assert clip_norm == 0.1
        return update(model, optimizer, clip_norm)

    update = loop.update
    monkeypatch.setattr(loop, "update", spy)
    with pytest.raises(UserError, match=r"optim\.lr: \S+ -> 0\.01.*--run\.allow \S+"):
        loop.fit(new, task_of(new))
    fit(changed(new, run={"allow": spelled}))
    assert f"resumed from step 10 of {loop.total_steps(new.optim, 40)}" in (run / "log.txt").read_text()
    written = config.from_dict(json.loads((run / "config.json").read_text()))
    assert config.differences(new, written) == {}
    for group in used[-1].param_groups:
        assert group["weight_decay"] in (0.0, 0.2) and group["betas"] == (0.8, 0.9)
    assert {group["weight_decay"] for group in used[-1].param_groups} == {0.0, 0.2}
    if "ft" in preset:
        assert {name for name in last_state(run)["optimizer"] if name.startswith("norm.")}


def test_fixed_settings_cannot_change_and_unknown_ones_give_a_hint(images, tmp_path):
    settings = quick(images, tmp_path, "run")
    fit(settings)
    for values in (
        {"optim": {"batch": 8}}, {"optim": {"name": "sgd"}}, {"data": {"size": 64}},
        {"model": {"abs_win": True}}, {"model": {"init": "other.pth"}},
    ):  # fmt: skip
        key = next(f"{group}.{name}" for group, value in values.items() for name in value)
        other = changed(settings, **values, run={"allow": (key,)})
        with pytest.raises(UserError, match=rf"{key}: .*cannot change within a run; .*choose another RUN"):
            loop.fit(other, finetune.make_task)
    wrong = changed(settings, run={"allow": ("optim.epoch",)})
    with pytest.raises(
        UserError, match=r"'optim\.epoch', which is not a setting; did you mean 'optim\.epochs'"
    ):
        loop.fit(wrong, finetune.make_task)


def test_intervals_and_the_path_of_the_same_shards_may_change(images, tmp_path, monkeypatch):
    settings = quick(images, tmp_path, "run")
    assert loop.fit(settings, stopping_at(signal.SIGTERM, 3)) == signal.SIGTERM
    shutil.copytree(images, tmp_path / "staged")
    monkeypatch.chdir(tmp_path)
    intervals = {"log_every": 1, "eval_every": 3, "checkpoint_every": 2, "max_skipped": 4}
    run = fit(changed(settings, data={"path": Path("staged")}, run=intervals))
    assert [row["step"] for row in read_csv(run / "metrics.csv")] == [2, 4, 5, 6, 7, 8, 9, 10]
    with pytest.raises(UserError, match="is not the data"):
        other = tmp_path / "other"
        shutil.copytree(images, other)
        rows = read_rows(other)
        write_rows(other, [row | {"change": "copied again"} for row in rows])
        (run / "model.safetensors").unlink()
        loop.fit(changed(settings, data={"path": other}), finetune.make_task)


# ---- more and fewer epochs


def test_a_finished_run_can_be_extended_also_with_an_interruption(images, tmp_path, capsys):
    settings = quick(images, tmp_path, "run")
    run = fit(settings)
    longer = changed(settings, optim={"epochs": 2.0}, run={"allow": ("optim.epochs",)})
    with pytest.raises(UserError, match=r"optim\.epochs: 1\.0 -> 2\.0.*--run\.allow optim\.epochs"):
        loop.fit(changed(longer, run={"allow": ()}), finetune.make_task)
    assert loop.fit(longer, stopping_at(signal.SIGTERM, 3)) == signal.SIGTERM
    assert rundir.exported_step(run) == 10  # the earlier weights are kept until the new ones are complete
    fit(longer)
    assert rundir.exported_step(run) == 20
    assert [row["step"] for row in read_csv(run / "metrics.csv")][-6:] == [12, 14, 15, 16, 18, 20]
    assert fit(longer) and "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"already at step 20, but optim\.epochs 1 ends at step 10"):
        loop.fit(changed(longer, optim={"epochs": 1.0}), finetune.make_task)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="has final weights and no checkpoint to resume from"):
        loop.fit(changed(longer, optim={"epochs": 3.0}), finetune.make_task)


# ---- skipped steps


def infinite_loss_from(first: int, last: int = 1000) -> MakeTask:
    """The usual task with an infinite loss in steps `first` to `last` after the start."""

    def make(*given) -> Task:
        task, calls = finetune.make_task(*given), iter(range(1, 1000))

        def loss(*batch):
            value = task.loss(*batch)
            return value * float("inf") if first <= next(calls) <= last else value

        return replace(task, loss=loss)

    return make


def test_no_checkpoint_is_written_after_a_skipped_step(images, tmp_path):
    settings = changed(quick(images, tmp_path, "run"), run={"max_skipped": 5, "checkpoint_every": 1})
    with pytest.raises(UserError, match=r"steps up to step 8 had non-finite.*is of step 3, before them"):
        loop.fit(settings, infinite_loss_from(4))
    assert saved_steps(tmp_path / "run") == [2, 3]
    again = changed(settings, run={"name": "again"})
    run = fit(again, infinite_loss_from(4, 6))  # a few skipped steps in the middle are allowed
    assert saved_steps(run) == [9, 10] and results(run)[1][-1]["skipped"] == 3
    assert "step 4 is not saved: 1 steps in a row had non-finite gradients" in (run / "log.txt").read_text()


def test_a_run_with_only_skipped_steps_does_not_finish(images, tmp_path):
    settings = changed(quick(images, tmp_path, "run"), run={"max_skipped": 50})
    with pytest.raises(UserError, match=r"last 10 steps up to step 10 .*no checkpoint was saved"):
        loop.fit(settings, infinite_loss_from(1))
    assert not (tmp_path / "run/model.safetensors").exists() and saved_steps(tmp_path / "run") == []
    rundir.enter(settings, {})[0].close()  # what the same command does first
    assert "run has no checkpoint: training begins again at step 0" in (tmp_path / "run/log.txt").read_text()


# ---- signals, closed terminals


def test_signal_handlers_are_restored(images, tmp_path):
    before = [signal.getsignal(number) for number in ending.STOPPING]
    settings = quick(images, tmp_path, "run")
    assert loop.fit(settings, stopping_at(signal.SIGTERM, 3)) == signal.SIGTERM
    assert [signal.getsignal(number) for number in ending.STOPPING] == before
    fit(settings)
    assert [signal.getsignal(number) for number in ending.STOPPING] == before


def test_after_a_signal_during_evaluation_the_row_is_completed_on_resume(images, tmp_path):
    """Evaluation is interrupted at step 5, where no checkpoint is due, and at step 10, where one is due."""
    whole = fit(quick(images, tmp_path, "whole"))
    settings = quick(images, tmp_path, "run")
    run = settings.run.folder

    def cut_short(*given) -> Task:
        task = finetune.make_task(*given)

        def evaluation(model, catalogue, check):
            os.kill(os.getpid(), signal.SIGTERM)
            return task.evaluate(model, catalogue, check)

        return replace(task, evaluate=evaluation)

    for step, rows in ((5, [2, 4]), (10, [2, 4, 5, 6, 8])):
        if step == 10:  # step 5 is evaluated, then the run trains up to the next evaluation
            assert loop.fit(settings, second_evaluation(cut_short)) == signal.SIGTERM
        else:
            assert loop.fit(settings, cut_short) == signal.SIGTERM
        assert saved_steps(run)[-1] == step
        assert [row["step"] for row in read_csv(run / "metrics.csv")] == rows
    fit(settings)
    assert "step 10 was saved before its evaluation ended" in (run / "log.txt").read_text()
    assert_same(whole, run)
    assert (whole / "best.safetensors").read_bytes() == (run / "best.safetensors").read_bytes()


def second_evaluation(make: MakeTask) -> MakeTask:
    """The usual evaluation the first time, later that of `make`."""

    def made(*given) -> Task:
        usual, other, calls = finetune.make_task(*given), make(*given), iter(range(1000))

        def evaluation(model, catalogue, check):
            return (other if next(calls) else usual).evaluate(model, catalogue, check)

        return replace(usual, evaluate=evaluation)

    return made


def test_a_step_is_saved_before_it_is_evaluated(images, tmp_path):
    settings = changed(quick(images, tmp_path, "run"), run={"eval_every": 4})
    seen = []

    def make(*given) -> Task:
        task = finetune.make_task(*given)

        def evaluation(*arguments):
            deadline = time.monotonic() + 10  # the checkpoint is written in the background
            while not saved_steps(tmp_path / "run") and time.monotonic() < deadline:
                time.sleep(0.01)
            seen.append(saved_steps(tmp_path / "run"))
            return task.evaluate(*arguments)

        return replace(task, evaluate=evaluation)

    fit(settings, make)
    assert seen[0] == [4]


def test_without_validation_data_a_resumed_run_evaluates_no_step(images, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(images, data)
    settings = quick(data, tmp_path, "run", epochs=0.6)

    def interrupted(*_: object) -> dict[str, float]:
        raise ending.Stopped(signal.SIGTERM)

    def make(*given) -> Task:
        return replace(finetune.make_task(*given), evaluate=interrupted)

    assert loop.fit(settings, make) == signal.SIGTERM
    info = json.loads((data / "dataset.json").read_text())
    for name in ("splits", "tar_bytes", "catalogue_sha256"):
        del info[name]["val"]
    (data / "dataset.json").write_text(json.dumps(info))
    run = fit(changed(settings, run={"allow": ("data",), "patience": 1}))
    assert read_csv(run / "metrics.csv")[-1]["step"] == 6
    assert "run.patience has no effect" in (run / "log.txt").read_text()


@pytest.mark.parametrize("ignored", [False, pytest.param(True, marks=LONG)])
def test_a_closed_terminal_saves_and_with_nohup_training_continues(images, tmp_path, ignored: bool):
    settings = quick(images, tmp_path, "run")
    process = CLEAN.Process(target=hang_up, args=(settings, ignored, tmp_path / "out"))
    process.start()
    process.join(60)
    assert process.exitcode == (0 if ignored else 128 + signal.SIGHUP), (tmp_path / "out").read_text()
    assert saved_steps(tmp_path / "run")[-1] == (10 if ignored else 3)
    printed = (tmp_path / "out").read_text()
    assert ("SIGHUP: stopping after this step and saving" in printed) == (not ignored)


def hang_up(settings: Config, ignored: bool, log: Path) -> None:
    redirect_output(log)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    run_cli(lambda: loop.main(settings, stopping_at(signal.SIGHUP, 3)))


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_first_ctrl_c_prints_a_line_immediately_and_the_second_ends_the_process(images, tmp_path, second):
    """torchrun forwards the second Ctrl-C as SIGTERM."""
    settings = quick(images, tmp_path, "run")
    process = CLEAN.Process(target=interrupt_twice, args=(settings, second, tmp_path / "out"))
    process.start()
    process.join(60)
    printed = (tmp_path / "out").read_text()
    assert process.exitcode == 130, printed
    assert "SIGINT: stopping after this step and saving; press Ctrl-C again to stop at once" in printed
    assert "acknowledged within the step" in printed and "Traceback" not in printed
    assert saved_steps(tmp_path / "run") == [4]


def interrupt_twice(settings: Config, second: signal.Signals, log: Path) -> None:
    redirect_output(log)

    def make(*given) -> Task:
        task, calls = finetune.make_task(*given), iter(range(1, 1000))

        def loss(*batch):
            if next(calls) == 6:
                os.kill(os.getpid(), signal.SIGINT)
                if "SIGINT: stopping" in log.read_text():
                    print("acknowledged within the step", flush=True)
                os.kill(os.getpid(), second)
            return task.loss(*batch)

        return replace(task, loss=loss)

    run_cli(lambda: loop.main(settings, make))


def test_training_continues_when_its_output_is_closed(images, tmp_path):
    settings = quick(images, tmp_path, "run")
    read_end, write_end = os.pipe()
    process = CLEAN.Process(target=print_into, args=(settings, DupFd(write_end)))
    process.start()
    os.close(write_end)
    os.read(read_end, 10)
    os.close(read_end)  # as `| head` does
    process.join(60)
    assert process.exitcode == 0
    log = (tmp_path / "run/log.txt").read_text()
    assert "the output was closed by its reader; training continues" in log and "done: " in log


def print_into(settings: Config, pipe) -> None:
    descriptor = pipe.detach()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    run_cli(lambda: loop.main(settings, finetune.make_task))


def test_with_nohup_two_processes_continue_after_a_closed_terminal(images, tmp_path):
    """By default torchrun handles SIGHUP even if it is ignored."""
    settings = changed(quick(images, tmp_path, "run"), speed={"processes": 2, "micro_batch": 2})
    command = module("train.finetune", "image-ft-pico", *arguments(settings))
    with (tmp_path / "out").open("w") as out:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(["nohup", *command], cwd=ROOT, env=env, stdout=out, stderr=out)
    deadline = time.monotonic() + 90
    while not (tmp_path / "run/metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in [process.pid, *descendants(process.pid)]:
        os.kill(pid, signal.SIGHUP)
    assert process.wait(240) == 0, (tmp_path / "out").read_text()


# ---- the record of every start


def test_env_json_records_every_start(images, tmp_path):
    settings = quick(images, tmp_path, "run")
    assert loop.fit(settings, stopping_at(signal.SIGTERM, 3)) == signal.SIGTERM
    run = fit(settings)
    starts = json.loads((run / "env.json").read_text())
    assert [start["step"] for start in starts] == [0, 3]
    assert all(start["packages"]["torch"] and start["time"] and start["command"] for start in starts)
