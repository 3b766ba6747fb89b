"""Predictions of a run for pictures or clips: python -m tools.predict runs/NAME INPUT [INPUT ...].

For a classifier, the most probable classes are printed, or written to a table: --out FILE.csv, .json or
.parquet. For a masked autoencoder, a picture of reconstructions is drawn. An input is a picture or a folder
of pictures; for clips, it is a video file or a folder of frames. Inputs are packed like training data and
read like validation data, so that predictions are those of `make eval`. In folders, the files that packing
skips are skipped: hidden ones and other suffixes.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from pyarrow import csv

from models.layers import NormalizedInput
from pipelines.dataset import Dataset, open_dataset, read_batch, read_info
from pipelines.errors import UserError, first_line, run_cli
from pipelines.files import atomic_write
from tools import videos
from tools.clips import load_clip, load_image
from tools.folders import walk
from tools.images import SUFFIXES, BadImage, Packed
from tools.pack import ClipOptions, ImageOptions
from tools.shards import (
    Packing,
    PackPlan,
    Sample,
    VideoPacking,
    finish,
    jobs_of,
    make_key,
    pack_shard,
)
from tools.videos import load_video
from train.config import Config, FinetuneConfig
from train.console import command_of
from train.evaluate import load_model, open_task, read_config, weights_of
from train.rundir import data_of
from train.task import Task
from train.words import shown

NOT_FINITE = "the model's probabilities for it are not finite"
TABLES = (".csv", ".json", ".parquet")
DRAWN = 24  # most inputs in a picture of reconstructions; they are one batch


def predict(
    run: tyro.conf.Positional[Path],
    inputs: tyro.conf.Positional[tuple[Path, ...]],
    top: int = 5,
    weights: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
) -> int:
    """Show the classes of every input, or draw reconstructions; return 1 if an input has no result.

    An input has none if it cannot be read or if the model's probabilities for it are not finite.

    Args:
        run: folder of a finished run, such as runs/image-ft-pico.
        inputs: pictures and folders of them; or video files, folders of them and folders of frames.
        top: number of classes to show.
        weights: weights file; default: model.safetensors of the run.
        out: .csv, .json or .parquet file for a classifier's predictions; default: they are printed. For an
            autoencoder, the .png picture of reconstructions; default: predict.png in the run folder.
        device: auto, cuda or cpu.
    """
    if not inputs:
        raise UserError("there are no inputs; name at least one picture, video or folder")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("torchrun started several processes; start tools.predict without torchrun")
    if top < 1:
        raise UserError(f"--top is {top}; it must be at least 1")
    if packed := next((path for path in inputs if os.access(path / "dataset.json", os.F_OK)), None):
        how = command_of(run, "eval", "train.evaluate", data=packed)
        raise UserError(f"{packed} is a packed dataset; use {how}.")
    config, classes, packing = read_run(run)
    check_out(out, TABLES if isinstance(config, FinetuneConfig) else (".png",))
    inputs = tuple(file for path in inputs for file in files_of(path, config.data.frames > 1))
    hint = "" if weights else of_the_best(run)
    weights = weights_of(run, weights)
    with tempfile.TemporaryDirectory() as folder:
        names, reasons = pack(config, inputs, packing, Path(folder))
        best: list[list[tuple[str, float]]] = [[] for _ in names]
        good = [number for number, reason in enumerate(reasons) if not reason]
        if good:
            catalogue = open_dataset(folder, "val")
            place, task = open_task(config, classes, device)
            model = load_model(task.model, config, weights, classes, place)
            print(f"weights: {weights}{hint}")
            if task.picture is not None:
                path, rows = out or run / "predict.png", min(DRAWN, len(good))
                task.picture(path, model, catalogue, rows)
                print(f"{path}: {', '.join(names[number] for number in good[:rows])}")
            else:
                found = most_probable(probabilities(task, model, catalogue), shown(classes), top)
                for number, pairs in zip(good, found, strict=True):
                    best[number], reasons[number] = pairs, "" if pairs else NOT_FINITE
    if out and isinstance(config, FinetuneConfig):
        write_table(out, names, best, reasons, min(top, len(classes)))
        print(f"{out}: {len(names)} rows")
    else:
        for name, pairs in zip(names, best, strict=True):
            if pairs:
                print("\n".join([name, *(f"{chance:9.2%}  {label}" for label, chance in pairs)]))
    for name, reason in zip(names, reasons, strict=True):
        if reason:
            print(f"error: {name}: {reason}", file=sys.stderr)
    return int(any(reasons))


def of_the_best(run: Path) -> str:
    """After the name of the weights of the last step: how to use those of the best evaluation."""
    best = run / "best.safetensors"
    return f" (the last step; of the best evaluation: WEIGHTS={best} (--weights))" if best.exists() else ""


def check_out(out: Path | None, suffixes: Sequence[str]) -> None:
    """Raise UserError unless a file with one of the suffixes can be written there."""
    if out is None:
        return
    if out.suffix.lower() not in suffixes:
        raise UserError(f"{out} does not end in {', '.join(suffixes)}; name such a file with OUT= (--out)")
    if not out.parent.is_dir():
        raise UserError(f"the folder {out.parent} does not exist; create it, or name another OUT= (--out)")


def most_probable(chances: torch.Tensor, labels: Sequence[str], top: int) -> list[list[tuple[str, float]]]:
    """For each input the most probable classes and their probabilities; none if these are not finite.

    chances: float32 [inputs, classes].
    """
    values, classes = chances.topk(min(top, len(labels)))
    rows = zip(chances.isfinite().all(1).tolist(), classes.tolist(), values.tolist(), strict=True)
    return [
        [(labels[c], p) for c, p in zip(found, row, strict=True)] if finite else []
        for finite, found, row in rows
    ]


def write_table(
    path: Path,
    names: Sequence[str],
    best: Sequence[list[tuple[str, float]]],
    reasons: Sequence[str],
    top: int,
) -> None:
    """Write a row per input: input, class_1, probability_1, ... class_TOP, probability_TOP, error.

    Without a prediction, all columns but the first and the last are empty. JSON is a list of objects.
    """
    columns = {"input": pa.array(names)}
    for rank in range(top):
        found = [pairs[rank] if pairs else (None, None) for pairs in best]
        columns[f"class_{rank + 1}"] = pa.array([label for label, _ in found], pa.string())
        columns[f"probability_{rank + 1}"] = pa.array([chance for _, chance in found], pa.float32())
    columns["error"] = pa.array([reason or None for reason in reasons], pa.string())
    table = pa.table(columns)
    with atomic_write(path) as temporary:
        if path.suffix.lower() == ".csv":
            csv.write_csv(table, temporary)
        elif path.suffix.lower() == ".parquet":
            pq.write_table(table, temporary)
        else:
            text = json.dumps(table.to_pylist(), indent=1, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")


def read_run(run: Path) -> tuple[Config, Sequence[str], Mapping[str, Any]]:
    """Configuration, classes and packing settings of a run; the latter are empty if its data is missing."""
    config, recorded = read_config(run), data_of(run)
    classes, packing = (), {}
    try:
        info = read_info(config.data.path)
        classes, packing = info.classes, info.packing
    except UserError as error:
        if isinstance(config, FinetuneConfig) and "classes" not in recorded:
            raise UserError(
                f"{run} has no data.json with its classes, and its data cannot be read: {error}"
            ) from error
        print(f"{config.data.path} cannot be read: inputs are packed with the default options")
    if classes and "classes" not in recorded:
        print(f"{run} has no data.json with its classes: they are read from {config.data.path}")
    return config, recorded.get("classes", classes), packing


def pack(
    config: Config, inputs: Sequence[Path], packing: Mapping[str, Any], out: Path
) -> tuple[list[str], list[str]]:
    """Make `out` a dataset of the inputs; return the name of each sample and why it was rejected, or "".

    A long video has several samples. packing: how the run's data was packed; defaults replace what is
    missing.
    """
    clips = config.data.frames > 1
    kind = ClipOptions if clips else ImageOptions
    packing = {"source_fps": packing.get("fps", 30.0), **packing}  # earlier versions did not record it
    names = {field.name for field in fields(kind)} & {*packing} - {"shard_size"}  # 1 for indexed tars
    options = kind(**{name: packing[name] for name in names})
    how = options.packing(videos=True) if isinstance(options, ClipOptions) else options.packing()
    samples = [Sample(make_key(i, path.stem), -1, "", str(path)) for i, path in enumerate(inputs)]
    plan = PackPlan("video" if clips else "image", (), {"val": samples}, how)
    (out / "val").mkdir()
    for job in jobs_of(plan, Path(), out, load, reject_unreadable=True):
        pack_shard(job)
    finish(plan, out)
    listed = read_batch(out / "val.arrow", ["key", "source", "reason"]).to_pylist()
    listed.sort(key=lambda row: row["key"].partition("-")[0])  # the index of the input
    return [row["source"] for row in listed], [row["reason"] for row in listed]


def load(root: Path, source: str, packing: Packing) -> Iterator[Packed | BadImage]:
    """Read one picture, or for clips a video or a folder of frames. Raises `BadImage` or `OSError`."""
    clips = isinstance(packing, VideoPacking)
    if clips and (root / source).is_dir():
        yield from load_clip(root, source, packing)
        return
    try:
        if (root / source).is_dir():
            raise BadImage("a folder without pictures")
        yield from (load_video if clips else load_image)(root, source, packing)
    except BadImage as error:
        if Path(source).suffix.lower() in (videos.SUFFIXES if clips else SUFFIXES):
            raise  # damaged, but of the right kind
        raise BadImage(f"{error} (this run takes {'clips' if clips else 'pictures'})") from error


def files_of(path: Path, clips: bool) -> list[Path]:
    """The pictures, or for clips the videos, below a folder that packing would pack, sorted by name.

    For another path and for a folder of frames, the path. Prints how many files are skipped. A folder that
    cannot be listed to its end comes last, as a bad input.
    """
    files: list[Path] = []
    unlisted: list[Path] = []
    try:
        if path.is_dir():
            files.extend(walk(path))
    except (OSError, UserError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        unlisted = [path]
    found = sorted(file for file in files if file.suffix.lower() in (videos.SUFFIXES if clips else SUFFIXES))
    if clips and not found:
        return [path]
    if others := {*files} - {*found}:
        what, example = "video" if clips else "picture", min(others)
        print(f"skipped {len(others)} files without a {what}'s suffix, such as {example}", file=sys.stderr)
    return [*found, *unlisted] or [path]


def probabilities(task: Task, model: NormalizedInput, catalogue: Dataset) -> torch.Tensor:
    """float32 [inputs, classes]: softmax, averaged over the views of an input, as in evaluation."""
    assert task.probabilities is not None
    batches = task.probabilities(model, catalogue, lambda: None)
    found = torch.cat([rows[valid].cpu() for _, valid, rows in batches])
    if len(found) < len(catalogue):
        raise UserError(
            "an input was packed but does not decode for the model; leave out the one named above"
        )
    return found


if __name__ == "__main__":
    run_cli(lambda: sys.exit(tyro.cli(predict)))
