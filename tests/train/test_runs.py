"""Complete runs: pretraining and finetuning, images and clips, one and two processes, kills and resuming."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipelines.config import Augment
from pipelines.dataset import open_dataset
from pipelines.errors import UserError
from tests import LONG
from tests.fault_helpers import two_ranks
from tests.train_helpers import ROOT, arguments, call, module, small
from tools.plot import plot
from train import build, evaluate, finetune, loop, mae
from train.config import FinetuneConfig
from train.metrics import TIMING_COLUMNS, read_csv
from train.presets import FINETUNE_PRESETS


def fit(config, task) -> Path:
    build.check(config)
    assert loop.fit(config, task) == 0
    return config.run.root / config.run.name


def results(run: Path) -> tuple[dict, list[dict]]:
    rows = read_csv(run / "metrics.csv")
    assert rows == pq.read_table(run / "metrics").to_pylist()
    kept = [{k: v for k, v in row.items() if k not in TIMING_COLUMNS} for row in rows]
    return load_file(run / "model.safetensors"), kept


def assert_same(a: Path, b: Path) -> None:
    (weights_a, rows_a), (weights_b, rows_b) = results(a), results(b)
    assert rows_a == rows_b
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert weights_a.keys() == weights_b.keys()
    assert all(torch.equal(weights_a[name], weights_b[name]) for name in weights_a)


def test_pretraining_finetuning_and_evaluation_of_images(images: Path, tmp_path: Path, capsys):
    pretrained = fit(small("image-mae-pico", images, tmp_path, "mae"), mae.make_task)
    assert [row["step"] for row in results(pretrained)[1]] == [3, 5, 6, 9, 10]
    assert Image.open(pretrained / "reconstruction.png").width > 3 * 64
    config = small("image-ft-pico", images, tmp_path, "ft", epochs=6.0, lr=2e-3)
    config = replace(config, model=replace(config.model, init=str(pretrained / "model.safetensors")))
    tuned = fit(config, finetune.make_task)
    log = (tuned / "log.txt").read_text()
    assert "loaded" in log and f"to see the results: python -m tools.report {tuned}\n" in log
    last = results(tuned)[1][-1]
    assert last["acc"] > 0.9  # the classes are bright and dark
    assert [start["packages"]["torch"] for start in json.loads((tuned / "env.json").read_text())]
    assert f"trained by hiera-train: {last['step']} steps" in (tuned / "model_card.md").read_text()
    again = evaluate.evaluate(evaluate.Arguments(tuned, device="cpu"))
    assert again == {name: last[name] for name in again}
    assert (tuned / "model.safetensors").stat().st_mode & 0o777 == (tuned / "log.txt").stat().st_mode & 0o777
    assert Image.open(plot((pretrained, tuned))).height > 100
    assert loop.main(config, finetune.make_task) is None
    assert "is finished" in capsys.readouterr().out


def test_pretraining_and_finetuning_of_clips_with_mixup(clips: Path, tmp_path: Path):
    pretrained = fit(small("video-mae-pico", clips, tmp_path, "mae", epochs=2.0), mae.make_task)
    assert (pretrained / "reconstruction.png").exists()
    config = small("video-ft-pico", clips, tmp_path, "ft", epochs=2.0)
    config = replace(config, mixup=0.8, cutmix=1.0, views=(2, 3))
    config = replace(config, model=replace(config.model, init=str(pretrained / "model.safetensors")))
    tuned = fit(config, finetune.make_task)
    assert 0 <= results(tuned)[1][-1]["acc"] <= 1


def test_accumulation_and_processes_do_not_change_the_result(images: Path, tmp_path: Path):
    """1 x 12, 1 x 3 x 4 and 2 processes x 3 x 2: the same global batch gives equal weights up to rounding."""
    # Adam amplifies the rounding noise of tiny gradients to the learning rate, so the rate is small here.
    base = small("image-mae-pico", images, tmp_path, "joined", epochs=2.0, lr=1e-4)
    base = replace(base, decode_ratio=0.5, health=True, model=replace(base.model, drop_path=0.4))

    def variant(name: str, **speed: object):
        run, speed_config = replace(base.run, name=name), replace(base.speed, **speed)
        return replace(base, run=run, speed=speed_config)

    joined = fit(variant("joined", micro_batch=12), mae.make_task)
    split = fit(variant("split", micro_batch=3), mae.make_task)
    codes, printed = two_ranks(*[variant("two", micro_batch=3)] * 2)
    assert codes == [0, 0], printed
    assert "2 processes x 3 micro x 2 accumulated" in printed
    reference, rows = results(joined)
    for other in (split, tmp_path / "two"):
        weights, other_rows = results(other)
        for name, value in reference.items():
            if name.endswith(
                "attn.qkv.bias"
            ):  # softmax ignores the key's bias: its gradient is rounding noise
                weights[name], value = (x.view(3, -1)[[0, 2]] for x in (weights[name], value))
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5, msg=name)
        for a, b in zip(rows, other_rows, strict=True):
            assert a["step"] == b["step"]
            assert a["loss_train"] == pytest.approx(b["loss_train"], rel=1e-4)
            if a["loss_val"] is not None:
                assert a["loss_val"] == pytest.approx(b["loss_val"], rel=1e-4)


@pytest.mark.parametrize(
    ("preset", "processes"), [("video-mae-pico", 1), pytest.param("image-ft-pico", 2, marks=LONG)]
)
def test_sigkill_at_a_random_step_then_resume_is_bit_identical(
    images: Path, clips: Path, tmp_path: Path, preset: str, processes: int
):
    data = clips if "video" in preset else images
    program = "train.mae" if "mae" in preset else "train.finetune"
    config = small(preset, data, tmp_path, "whole", epochs=5.0, ema=0.9)
    config = replace(config, speed=replace(config.speed, processes=processes))
    config = replace(config, data=replace(config.data, augment=Augment(layers=2, erase=0.25)))
    if isinstance(config, FinetuneConfig):
        config = replace(config, mixup=0.8, cutmix=1.0)
    killed = replace(config, run=replace(config.run, name="killed"))
    task = mae.make_task if "mae" in preset else finetune.make_task
    alone = processes == 1
    if alone:
        fit(config, task)
    else:
        assert call(program, preset, *arguments(config)).returncode == 0
    wanted = random.randint(5, 9)  # after the first checkpoint; an epoch has 3.3 steps (clips: 1.7)
    command = module(program, preset, *arguments(killed))
    kill_at_row(command, tmp_path / "killed" / "metrics.csv", wanted, signal.SIGKILL)
    if alone:
        fit(killed, task)
    else:
        assert call(program, preset, *arguments(killed)).returncode == 0
    assert "resumed from step" in (tmp_path / "killed" / "log.txt").read_text()
    assert_same(tmp_path / "whole", tmp_path / "killed")


def kill_at_row(command: list[str], metrics: Path, step: int, number: signal.Signals) -> int:
    """Start a command in its own process group; signal the group once a row of `step` or later exists."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and any(row["step"] >= step for row in read_csv(metrics)):
            break
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it could be killed"
    # The workers are in their own sessions: SIGKILL is sent to each, and torchrun forwards SIGTERM.
    for pid in descendants(process.pid) if number == signal.SIGKILL else []:
        os.kill(pid, number)
    process.send_signal(number)
    return process.wait(60)


def descendants(parent: int) -> list[int]:
    """Process ids below `parent`, from /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = children.get(parent, [])
    for pid in found:
        found += children.get(pid, [])
    return found


def test_on_sigterm_two_processes_finish_the_step_and_save(images: Path, tmp_path: Path):
    config = small("image-mae-pico", images, tmp_path, "stopped", epochs=60.0)
    config = replace(
        config, run=replace(config.run, checkpoint_every=100_000, eval_every=100_000, log_every=1)
    )
    config = replace(config, speed=replace(config.speed, processes=2))
    command = module("train.mae", "image-mae-pico", *arguments(config))
    assert kill_at_row(command, tmp_path / "stopped" / "metrics.csv", 3, signal.SIGTERM) == 143
    assert "run the same command to resume" in (tmp_path / "stopped" / "log.txt").read_text()
    saved = list((tmp_path / "stopped" / "checkpoints").glob("*.pt"))
    assert len(saved) == 1
    rows = read_csv(tmp_path / "stopped" / "metrics.csv")
    assert f"step-{rows[-1]['step']:09d}" == saved[0].stem


# ---- user errors


def test_a_folder_with_other_settings_is_refused_and_not_changed(images: Path, tmp_path: Path):
    config = small("image-mae-pico", images, tmp_path, "run", epochs=1.0)
    run = fit(config, mae.make_task)
    before = (run / "config.json").read_text()
    other = replace(config, optim=replace(config.optim, lr=0.123))
    with pytest.raises(UserError, match=r"optim\.lr: 0\.00025 -> 0\.123"):
        loop.fit(other, mae.make_task)
    assert (run / "config.json").read_text() == before


def test_under_torchrun_other_settings_are_refused_too(images: Path, tmp_path: Path):
    config = small("image-mae-pico", images, tmp_path, "run", epochs=1.0)
    run = fit(config, mae.make_task)
    (run / "model.safetensors").unlink()
    other = replace(config, optim=replace(config.optim, lr=0.123))
    words = [
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        "--standalone",
        "-m",
        "train.mae",
        "image-mae-pico",
    ]
    done = call("torch.distributed.run", *words, *arguments(other))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and "optim.lr: 0.00025 -> 0.123" in done.stderr


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("optim", {"batch": 0}, "optim.batch is 0; it must be at least 1$"),
        ("optim", {"epochs": 0.0}, "optim.epochs is 0.0; it must be more than 0$"),
        ("data", {"crop": 1.5}, "data.crop is 1.5; it must be more than 0 and at most 1$"),
        ("data", {"scale": (-1, 0.5)}, "data.scale's first is -1; it must be more than 0 and at most 0.5"),
        ("data", {"ratio": (2, 1)}, "data.ratio's first is 2; .* at most 1$"),
        ("data", {"flip": 2}, "data.flip is 2; it must be at least 0 and at most 1"),
        ("data", {"frames": 0}, "data.frames is 0"),
        ("optim", {"ema": 1.0}, "optim.ema is 1.0; it must be at least 0 and less than 1"),
        ("data", {"order": "sorted"}, "data.order is 'sorted'; it can be random, local"),
        ("speed", {"device": "tpu"}, "speed.device is 'tpu'; it can be auto, cuda, cpu"),
        ("speed", {"precision": "fp8"}, "speed.precision is 'fp8'"),
        ("model", {"drop_path": 1.0}, "model.drop_path is 1.0; it must be at least 0 and less than 1"),
        ("run", {"name": "../x"}, "run.name is '../x'; it must name a folder"),
        ("run", {"name": "a b"}, "run.name is 'a b'; it must name a folder"),
        ("run", {"name": "/x"}, "run.name is '/x'; it must name a folder"),
        ("", {"smoothing": 2.0}, "smoothing is 2"),
        ("", {"mixup": -1.0}, "mixup is -1"),
        ("", {"views": (0, 3)}, "views is 0"),
        ("optim", {"epochs": float("inf")}, "optim.epochs is inf; it must be more than 0 and finite$"),
        ("optim", {"warmup_epochs": float("nan")}, "optim.warmup_epochs is nan; it must be at least 0$"),
        ("optim", {"lr": -1.0}, "optim.lr is -1"),
        ("optim", {"weight_decay": float("nan")}, "optim.weight_decay is nan"),
        ("optim", {"momentum": -1.0}, "optim.momentum is -1"),
        (
            "optim",
            {"betas": (0.9, 1.0)},
            "optim.betas' second is 1.0; it must be at least 0 and less than 1$",
        ),
        ("run", {"seed": -1}, "run.seed is -1"),
        ("run", {"seed": 1 << 64}, "run.seed is 18446744073709551616; it must be at least 0 and at most 9.2"),
        ("data", {"ratio": (1.0, float("inf"))}, "data.ratio's second is inf"),
        ("", {"freeze": "all"}, "freeze is 'all'; it can be none, trunk"),
    ],
)
def test_a_setting_out_of_range_gives_one_line(group: str, values: dict, message: str):
    preset = FINETUNE_PRESETS["image-ft-pico"]
    with pytest.raises(UserError, match=message) as caught:
        replace(getattr(preset, group) if group else preset, **values)
    assert "\n" not in str(caught.value)


def test_unsuitable_settings_give_one_line(images: Path, clips: Path, tmp_path: Path):
    good = small("image-mae-pico", images, tmp_path, "run")

    def changed(part: str, **values: object):
        return replace(good, **{part: replace(getattr(good, part), **values)})

    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    shutil.copytree(images, broken)
    (broken / "val/000000.tar").unlink()
    cases = {
        "does not exist": changed("data", path=tmp_path / "nowhere"),
        "no dataset.json": changed("data", path=tmp_path / "empty"),
        "contains video shards": changed("data", path=clips),
        "run.name is ''; it must name a folder": changed("run", name=""),
        r"val/000000\.tar is missing": changed("data", path=broken),
    }
    if not torch.cuda.is_available():
        cases["DEVICE=cpu"] = changed("speed", processes=2, device="auto")
    for expected, config in cases.items():
        with pytest.raises(UserError, match=expected) as caught:
            build.check(config)
        assert "\n" not in str(caught.value)
    for expected, config in {
        "needs a mae_hiera_\\*": changed("model", name="hiera_pico_96"),
        "keeps 0 of 4 mask units": replace(good, mask_ratio=0.9),
        "decoder_heads is 7; choose a divisor of the decoder's width, 128": replace(good, decoder_heads=7),
        "multiples of 32 pixels": changed("data", size=50),
        "no weights file": changed("model", init="missing.safetensors"),
        "hiera_pico": changed("model", name="mae_hiera_pixo_96"),
    }.items():
        with pytest.raises(UserError, match=expected):
            loop.fit(config, mae.make_task)
    for values in ({"mask_ratio": float("nan")}, {"decoder_heads": -1}):
        with pytest.raises(UserError, match="must be at least 0"):
            replace(good, **values)


def test_damage_is_replaced_counted_and_limited_on_every_rank(images: Path, tmp_path: Path):
    """With all augmentations, 1 and 2 processes count the same rows; too much damage stops all of them."""
    data = tmp_path / "damaged"
    shutil.copytree(images, data)
    catalogue = open_dataset(data, "train")
    for sample in (2, 9):
        with catalogue.tar_path(int(catalogue.shard[sample])).open("r+b") as tar:
            tar.seek(int(catalogue.offset[sample]))
            tar.write(bytes(int(catalogue.size[sample])))
    base = small("image-ft-pico", data, tmp_path, "one", epochs=6.0)
    augment = Augment(layers=2, erase=0.25)
    settings = replace(base.data, augment=augment, repeats=2, order="local", max_bad=0.2)
    base = replace(base, data=settings)
    _, rows = results(fit(base, finetune.make_task))
    assert rows[-1]["bad"] >= 8  # 2 samples x 6 epochs, counted in rows
    assert [row["bad"] for row in rows] == sorted(row["bad"] for row in rows)
    two = replace(base, run=replace(base.run, name="two"))
    codes, printed = two_ranks(two, two)
    assert codes == [0, 0], printed
    assert f"{rows[-1]['bad']} damaged samples replaced" in printed
    assert "2 rows of each sample" in printed and "decoding threads" in printed
    assert [row["bad"] for row in results(tmp_path / "two")[1]] == [row["bad"] for row in rows]
    strict = replace(two, data=replace(two.data, max_bad=0.0), run=replace(two.run, name="strict"))
    codes, printed = two_ranks(strict, strict)
    assert codes == [2, 2] and "2 samples are damaged, more than the 1 allowed" in printed


def test_two_runs_cannot_share_a_folder(images: Path, tmp_path: Path):
    from train import rundir

    config = small("image-mae-pico", images, tmp_path, "run")
    lock = rundir.lock_run(config.run.folder)
    with pytest.raises(UserError, match="another process is training"):
        loop.fit(config, mae.make_task)
    lock.close()


def test_errors_of_the_command_line_are_one_line_with_exit_code_2(tmp_path: Path):
    done = call("train.finetune", "image-ft-pico", "--data.path", str(tmp_path / "nowhere"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
