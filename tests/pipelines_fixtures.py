"""Small packed datasets, written only with tarfile and the catalogue's schema."""

import io
import itertools
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pipelines.config import DataConfig, DecodeConfig
from pipelines.dataset import SCHEMA, Dataset
from pipelines.files import sha256_of
from pipelines.loader import Batch, EvalLoader, TrainLoader
from pipelines.machine import World

CPU = torch.device("cpu")

torch.set_num_threads(1)  # on a small machine, torch's threads would compete with DALI's


def picture(width: int, height: int, seed: int) -> np.ndarray:
    """A smooth random picture, uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_dataset(root: Path, clips: list[list[bytes]], kind: str, per_shard: int = 8, split: str = "train"):
    """Pack clips (lists of JPEGs; an image is a list of one), label = index modulo 3, into `root`."""
    (root / split).mkdir(parents=True)
    rows = []
    for index, frames in enumerate(clips):
        width, height = Image.open(io.BytesIO(frames[0])).size
        shard = index // per_shard
        row = {
            "key": f"{index:08d}-x",
            "label": index % 3,
            "class_name": f"c{index % 3}",
            "source": f"{index}.jpg",
        }
        row |= {
            "status": "ok",
            "reason": "",
            "change": "copied",
            "width": width,
            "height": height,
            "sha256": "",
        }
        row |= {
            "frames": len(frames),
            "shard": shard,
            "offsets": [],
            "sizes": [len(frame) for frame in frames],
            "crcs": [zlib.crc32(frame) for frame in frames],
        }
        with tarfile.open(root / split / f"{shard:06d}.tar", "a", format=tarfile.USTAR_FORMAT) as tar:
            for number, frame in enumerate(frames):
                suffix = "jpg" if kind == "image" else f"f{number:04d}.jpg"
                info = tarfile.TarInfo(f"{row['key']}.{suffix}")
                info.size = len(frame)
                row["offsets"].append(tar.offset + 512)
                tar.addfile(info, io.BytesIO(frame))
        rows.append(row)
    write_rows(root, rows, split)
    shards = -(-len(clips) // per_shard)
    frames = sum(map(len, clips))
    write_info(
        root, kind, {split: {"samples": len(clips), "rejected": 0, "frames": frames, "shards": shards}}
    )
    return root


def write_rows(root: Path, rows: list[dict], split: str = "train", schema: pa.Schema = SCHEMA) -> None:
    """Write a catalogue, packed samples first, and its checksum into dataset.json if that exists."""
    ordered = sorted(rows, key=lambda row: row.get("status") != "ok")
    path, info = root / f"{split}.arrow", root / "dataset.json"
    with pa.ipc.new_file(str(path), schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(ordered, schema))
    if info.is_file():
        values = json.loads(info.read_text())
        values["catalogue_sha256"][split] = sha256_of(path)
        info.write_text(json.dumps(values))


def read_rows(root: Path, split: str = "train") -> list[dict]:
    """The rows of a catalogue."""
    return pa.ipc.open_file(pa.BufferReader((root / f"{split}.arrow").read_bytes())).read_all().to_pylist()


def write_info(root: Path, kind: str, splits: dict):
    info = {"format": 3, "kind": kind, "classes": ["c0", "c1", "c2"], "splits": splits, "packing": {}}
    info["catalogue_sha256"] = {split: sha256_of(root / f"{split}.arrow") for split in splits}
    info["tar_bytes"] = {s: [tar.stat().st_size for tar in sorted((root / s).glob("*.tar"))] for s in splits}
    (root / "dataset.json").write_text(json.dumps(info))


def image_dataset(root: Path, count: int = 30, size: tuple[int, int] = (96, 72)) -> Path:
    return write_dataset(root, [[jpeg(picture(*size, seed))] for seed in range(count)], "image")


def clip_dataset(root: Path, lengths: list[int], size: tuple[int, int] = (64, 48)) -> Path:
    """Clips of the given lengths; frame k has the gray level 2 k, which identifies it."""
    clips = [[jpeg(np.full((size[1], size[0], 3), 2 * k, np.uint8)) for k in range(n)] for n in lengths]
    return write_dataset(root, clips, "video")


def frame_bytes(catalogue: Dataset, sample: int, frame: int) -> np.ndarray:
    """The JPEG of a frame, uint8 [bytes]."""
    return catalogue.read(np.array([sample]), np.array([[frame]]))[0]


def keys_of(catalogue: Dataset) -> list[str]:
    """The keys of the readable samples."""
    return [row["key"] for row in read_rows(catalogue.info.root, catalogue.split) if row["status"] == "ok"]


def train_loader(
    dataset: Dataset,
    config: DataConfig,
    *,
    batch: int = 12,
    rank: int = 0,
    world: int = 1,
    **steps,
) -> TrainLoader:
    """Training batches on the CPU."""
    parts = (dataset, config, DecodeConfig(threads=2), World(rank, world, CPU))
    return TrainLoader(*parts, batch=batch, **steps)


def train(dataset: Dataset, config: DataConfig, steps: int, *, accumulate: int = 1, **options) -> list[Batch]:
    """The micro batches of `steps` steps."""
    loader = train_loader(dataset, config, accumulate=accumulate, **options)
    return list(itertools.islice(loader, steps * accumulate))


def evaluation(
    dataset: Dataset, config: DataConfig, samples: int, *, rank: int = 0, world: int = 1, views=(1, 1)
) -> list[Batch]:
    """All batches of one process's evaluation on the CPU."""
    parts = (dataset, config, DecodeConfig(threads=2), World(rank, world, CPU))
    return list(EvalLoader(*parts, samples=samples, views=views))
