"""What a trained run makes of pictures or clips: python -m tools.predict runs/NAME INPUT [INPUT ...].

A classifier gives an input's likeliest classes, a masked autoencoder a picture of what it fills in. An input
is a picture, or for clips a video file or a folder of frames. Inputs are packed as training data is and read
as validation data is, so that what comes out is what make eval counts.
"""

import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from models.inputs import NormalizedInput
from pipelines.dataset import Dataset, open_dataset, read_batch, read_info
from pipelines.errors import UserError, run_cli
from tools.images import SUFFIXES, BadImage, Packed
from tools.pack_imagenet import load_image
from tools.pack_kinetics import load_clip
from tools.packing import settings
from tools.shards import Load, Packing, Plan, Sample, finish, jobs_of, make_key, pack_shard, readable
from tools.videos import clip_settings, load_video
from train.config import Config, FinetuneConfig
from train.evaluate import load_model, open_task, read_config, weights_of
from train.task import Task

NOT_FINITE = "the model's probabilities for it are not finite"
DRAWN = 24  # inputs in a reconstruction picture at most: they are one batch


def predict(
    run: tyro.conf.Positional[Path],
    inputs: tyro.conf.Positional[tuple[Path, ...]],
    top: int = 5,
    weights: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
) -> int:
    """Print every input's classes, or draw reconstructions; returns 1 when an input has no answer.

    It has none when it cannot be read, or when the model's probabilities for it are not finite.

    Args:
        run: folder of a finished run, such as runs/image-ft-pico.
        inputs: pictures and folders of them; or video files and folders of frames.
        top: how many classes to print.
        weights: other weights than the run's model.safetensors.
        out: where reconstructions are drawn; predict.png in the run folder unless given.
        device: auto, cuda or cpu.
    """
    if not inputs:
        raise UserError("name at least one picture, video or folder")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("torchrun started several processes; start tools.predict without torchrun")
    if top < 1:
        raise UserError("--top must be at least 1")
    config, classes, packing = read_run(run)
    if config.data.frames == 1:
        inputs = tuple(picture for path in inputs for picture in pictures_of(path))
    weights = weights_of(run, weights)
    names = [readable(str(path)) for path in inputs]
    with tempfile.TemporaryDirectory() as folder:
        reasons = pack(config, inputs, packing, Path(folder))
        places = [place for place, reason in enumerate(reasons) if not reason]
        read = [names[place] for place in places]
        if read:
            catalogue = open_dataset(folder, "val")
            here, task = open_task(config, classes, device)
            model = load_model(task.model, config, weights, classes, here)
            if task.picture is not None:
                path, rows = out or run / "predict.png", min(DRAWN, len(read))
                task.picture(path, model, catalogue, rows)
                print(f"{path}: {', '.join(read[:rows])}")
            else:
                for place, row in zip(places, probabilities(task, model, catalogue).tolist(), strict=True):
                    if not all(map(math.isfinite, row)):
                        reasons[place] = NOT_FINITE
                        continue
                    best = sorted(zip(row, classes, strict=True), key=lambda pair: -pair[0])[:top]
                    print("\n".join([names[place], *(f"{chance:9.2%}  {label}" for chance, label in best)]))
    for name, reason in zip(names, reasons, strict=True):
        if reason:
            print(f"error: {name}: {reason}", file=sys.stderr)
    return int(any(reasons))


def read_run(run: Path) -> tuple[Config, Sequence[str], Mapping[str, Any]]:
    """A run's settings, its classes, and how its data was packed, empty where the data is gone."""
    config, recorded = read_config(run), run / "data.json"
    classes, packing = (), {}
    try:
        info = read_info(config.data.path)
        classes, packing = info.classes, info.packing
    except UserError as error:
        if isinstance(config, FinetuneConfig) and not recorded.exists():
            raise UserError(
                f"{run} has no data.json that names its classes, and its data: {error}"
            ) from error
        print(f"{config.data.path} is not there: inputs are scaled as packing does by default")
    if recorded.exists():
        classes = json.loads(recorded.read_text())["classes"]
    elif classes:
        print(f"{run} has no data.json that names its classes: they come from {config.data.path}")
    return config, classes, packing


def pack(config: Config, inputs: Sequence[Path], packing: Mapping[str, Any], out: Path) -> list[str]:
    """Make `out` a dataset of the inputs; gives for each why it was left out, "" where it was not."""
    clips = config.data.frames > 1
    how = settings(packing.get("short_side", 256), 1000, packing.get("max_pixels", 100_000_000), 0.0, 0.0)
    samples = [Sample(make_key(i, path.stem), -1, "", str(path)) for i, path in enumerate(inputs)]
    fps = packing.get("fps", 30.0)
    how = clip_settings(how, fps) if clips else how
    plan = Plan("video" if clips else "image", (), {"val": samples}, how)
    video = partial(load_video, fps=fps, max_seconds=packing.get("max_seconds", 60.0))
    (out / "val").mkdir()
    for job in jobs_of(plan, Path(), out, partial(load, video=video if clips else None), True):
        pack_shard(job)
    finish(plan, out)
    listed = read_batch(out / "val.arrow", ["key", "reason"]).to_pylist()
    return [row["reason"] for row in sorted(listed, key=lambda row: row["key"])]  # keys begin with the index


def load(root: Path, source: str, packing: Packing, video: Load | None) -> Packed:
    """Read one input, a clip where `video` reads those of one file. Raises `BadImage` or `OSError`."""
    if video and (root / source).is_dir():
        return load_clip(root, source, packing)
    try:
        return (video or load_image)(root, source, packing)
    except BadImage as error:
        raise BadImage(f"{error} (this run takes {'clips' if video else 'pictures'})") from error


def pictures_of(path: Path) -> list[Path]:
    """The pictures of a folder, by name; anything else is itself."""
    inside = path.iterdir() if path.is_dir() else ()
    return sorted(file for file in inside if file.suffix.lower() in SUFFIXES) or [path]


def probabilities(task: Task, model: NormalizedInput, catalogue: Dataset) -> torch.Tensor:
    """float32 [inputs, classes]: the softmax of an input's views, averaged, as evaluation does."""
    assert task.probabilities is not None
    batches = task.probabilities(model, catalogue, lambda: None)
    found = torch.cat([rows[valid].cpu() for _, valid, rows in batches])
    if len(found) < len(catalogue):
        raise UserError("an input that was read does not decode for the model; leave out the one named above")
    return found


if __name__ == "__main__":
    run_cli(lambda: sys.exit(tyro.cli(predict)))
