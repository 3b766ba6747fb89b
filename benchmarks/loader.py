"""Compare the loader with torchvision, OpenCV, webdataset, DALI alone and its floor, on real pictures.

    python -m benchmarks loader --images data/imagenet/train --work /tmp/bench

From the pictures below `--images`, it makes 500-pixel originals and 340 x 256 clips and packs them. Then all
contenders make batches with the same output and augmentation. They take turns for several rounds, with a warm
page cache.
"""

import csv
import functools
import itertools
import multiprocessing
import os
import random
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.results import Race, Results, show
from models.layers import IMAGE_STATS
from pipelines import order
from pipelines.config import DataConfig, DecodeConfig
from pipelines.dataset import Dataset as Packed
from pipelines.dataset import open_dataset
from pipelines.decode import Decoder, encode
from pipelines.errors import UserError, run_cli
from pipelines.loader import EvalLoader, Loader, TrainLoader
from pipelines.machine import World
from pipelines.views import Rows, train_rows

SIZE, FRAMES, STRIDE, CLIP_LENGTH = 224, 16, 4, 80
CPU = torch.device("cpu")
CPU_RATE = "samples per CPU second"
Batches = Iterator[object]


# ---- data ------------------------------------------------------------------------------------------------


def data_in(work: Path, images: Path) -> Path:
    """`work`, with its data; missing data is made from the pictures below `images`."""
    if not (work / "clips" / "dataset.json").is_file():
        make_data(images, work)
    return work


def make_data(images: Path, work: Path, pictures: int = 512, clips: int = 24) -> None:
    """Write 500-pixel originals and 340 x 256 clips in the published layouts, and pack both."""
    from tools.pack import ClipOptions, ImageOptions, pack_clips, pack_images

    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    if len(found) < pictures:
        raise UserError(
            f"{images} contains {len(found)} JPEG pictures, fewer than {pictures}; give another --images"
        )
    chosen = random.Random(0).sample(found, pictures)
    for index, path in enumerate(chosen):
        original = Image.open(path).resize((500, 375), Image.Resampling.BICUBIC)
        save(original, work / "originals" / f"c{index % 10}" / f"{index:05d}.JPEG")
    rows: list[tuple[str, ...]] = []
    for index, path in enumerate(chosen[:clips]):
        whole = Image.open(path).resize((340 + CLIP_LENGTH, 256), Image.Resampling.BICUBIC)
        name = f"video{index:04d}_000000_000010"
        rows.append((f"c{index % 4}", f"video{index:04d}", "0", "10", "train", "0"))
        for frame in range(CLIP_LENGTH):  # the camera pans
            folder = work / "frames" / f"c{index % 4}" / name
            save(whole.crop((frame, 0, frame + 340, 256)), folder / f"frame_{frame + 1:05d}.jpg")
    (work / "annotations").mkdir(exist_ok=True)
    head = ("label", "youtube_id", "time_start", "time_end", "split", "is_cc")
    for split, part in (("train", rows[4:]), ("val", rows[:4])):
        with (work / "annotations" / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([head, *part])
    for name, side in (("as-is", 10_000), ("short256", 256)):
        pack_images(work / "originals", work / name, ImageOptions(workers=2, short_side=side, shard_size=128))
    unpack(work / "short256" / "train", work / "short256-files")
    options = ClipOptions(workers=2, shard_size=8)
    pack_clips(work / "annotations", work / "clips", options, frames=work / "frames")


def unpack(shards: Path, out: Path) -> None:
    """The packed pictures as files, for loaders that read files of the same size."""
    out.mkdir()
    for tar in sorted(shards.glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is not None and member.name.endswith("jpg"):
                    (out / Path(member.name).name).write_bytes(content.read())


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.convert("RGB").save(path, quality=90)


# ---- contenders: endless batches -------------------------------------------------------------------------


def ours(root: Path, frames: int, center: bool, batch: int, threads: int) -> Batches:
    return iter(our_loader(root, frames, center, batch, threads))


def our_loader(root: Path, frames: int, center: bool, batch: int, threads: int) -> Loader:
    parts = (open_dataset(root, "train"), config_of(frames), DecodeConfig(threads=threads), World(0, 1, CPU))
    return EndlessEvalLoader(*parts, samples=batch) if center else TrainLoader(*parts, batch=batch)


def config_of(frames: int) -> DataConfig:
    return DataConfig(size=SIZE, frames=frames, stride=STRIDE, scale=(0.08, 1.0))


class EndlessEvalLoader(EvalLoader):
    """Evaluation batches, repeated."""

    def rows(self) -> Iterator[Rows]:
        while True:
            yield from super().rows()


@dataclass(frozen=True)
class Way:
    """How the other implementation prepares a sample."""

    center: bool = False  # a central crop, otherwise a random resized crop and flip
    floats: bool = True  # normalize, as reference trainers do in their workers; otherwise uint8


def pillow_frames(data: Sequence[bytes | Path], way: Way) -> torch.Tensor:
    """Pillow decodes; torchvision crops, resizes and flips all frames equally; clips have 16 frames."""
    from torchvision.transforms import RandomResizedCrop
    from torchvision.transforms import functional as tv

    if len(data) > 1:
        free = len(data) - (FRAMES - 1) * STRIDE - 1
        start = free // 2 if way.center else random.randint(0, free)
        data = data[start : start + (FRAMES - 1) * STRIDE + 1 : STRIDE]
    pictures: list[Any] = [Image.open(BytesIO(x) if isinstance(x, bytes) else x).convert("RGB") for x in data]
    if way.center:
        done: list[Any] = [tv.center_crop(tv.resize(picture, [256]), [SIZE, SIZE]) for picture in pictures]
    else:
        window = RandomResizedCrop.get_params(pictures[0], [0.08, 1.0], [3 / 4, 4 / 3])
        flip = random.random() < 0.5
        done = [tv.resized_crop(picture, *window, [SIZE, SIZE]) for picture in pictures]
        done = [tv.hflip(picture) for picture in done] if flip else done
    if not way.floats:
        return torch.stack([tv.pil_to_tensor(picture) for picture in done])
    mean, std = map(list, IMAGE_STATS)
    return torch.stack([tv.normalize(tv.to_tensor(picture), mean, std) for picture in done])


def opencv_frames(data: Sequence[Path]) -> torch.Tensor:
    """OpenCV decodes, crops, resizes and flips a picture; the result is uint8."""
    from torchvision.transforms import RandomResizedCrop

    cv2: Any = import_module("cv2")  # optional: without its types
    coded = np.fromfile(data[0], np.uint8)
    picture = cv2.imdecode(coded, cv2.IMREAD_COLOR_RGB)
    size = torch.empty(3, *picture.shape[:2], device="meta")
    top, left, height, width = RandomResizedCrop.get_params(size, [0.08, 1.0], [3 / 4, 4 / 3])
    window = picture[top : top + height, left : left + width]
    filter_ = cv2.INTER_AREA if min(height, width) > SIZE else cv2.INTER_LINEAR
    window = cv2.resize(window, (SIZE, SIZE), interpolation=filter_)
    return torch.from_numpy(cv2.flip(window, 1) if random.random() < 0.5 else window)


class Folder(Dataset):
    """Pictures, or clips as folders of frames."""

    def __init__(self, samples: list[list[Path]], prepare: Callable[[list[Path]], torch.Tensor]) -> None:
        self.samples, self.prepare = samples, prepare

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.prepare(self.samples[index])


def torchvision_batches(samples: list[list[Path]], way: Way, batch: int, workers: int) -> Batches:
    return folder_batches(Folder(samples, functools.partial(pillow_frames, way=way)), batch, workers)


def folder_batches(dataset: Folder, batch: int, workers: int) -> Batches:
    order = RandomSampler(dataset, replacement=True, num_samples=10**6)
    return iter(
        DataLoader(dataset, batch, sampler=order, num_workers=workers, multiprocessing_context="fork")
    )


def webdataset_batches(tars: list[Path], way: Way, batch: int, workers: int) -> Batches:
    import webdataset

    def prepare(sample: dict[str, bytes]) -> torch.Tensor:
        return pillow_frames([sample[key] for key in sorted(sample) if key.endswith("jpg")], way)

    stream = webdataset.WebDataset([str(tar) for tar in tars], resampled=True, shardshuffle=False)
    shuffled: Any = stream.shuffle(64).map(prepare)
    return iter(DataLoader(shuffled, batch, num_workers=workers, multiprocessing_context="fork"))


def graph_alone(dataset: Packed, batch: int, threads: int) -> Batches:
    """Our DALI graph alone, with crops drawn in advance and without resizing by torch."""
    config = config_of(1)
    decoder = Decoder(config, DecodeConfig(threads=threads), CPU, batch, ahead=4)
    made = []
    for step in range(len(dataset) // batch):
        epochs, ids = order.sample_at(np.arange(step * batch, (step + 1) * batch), len(dataset), 0)
        rows = train_rows(dataset, config, 0, ids, epochs)
        made.append((rows, dataset.read(rows.ids, rows.frames)))
    for rows, jpegs in itertools.cycle(made):
        decoder.feed(rows, jpegs)
        if len(decoder.waiting) == decoder.ahead:
            decoder.waiting.popleft()
            yield decoder.pipeline.outputs()


def decode_and_resize(loader: Loader, steps: int) -> Batches:
    """The floor of a loader: DALI decodes the loader's first batches and torch resizes them, repeated.

    Bytes, crops and flips are in memory. Nothing is read, checked, drawn or prefetched.
    """
    decoder = replace(loader.decoder(), ahead=1)
    made = []
    for rows in itertools.islice(loader.rows(), steps):
        encoded = encode(rows, loader.dataset.read(rows.ids, rows.frames), copies=1)
        made.append((decoder.inputs(encoded), encoded))
    assert decoder.resizer is not None
    for inputs, encoded in itertools.cycle(made):
        for name, values in inputs.items():
            decoder.pipeline.feed_input(name, values)
        decoder.pipeline.schedule_run()
        yield decoder.resizer(decoder.pipeline.outputs()[0], encoded)


def bare_dali(tars: list[Path], batch: int, threads: int, resize: bool) -> Batches:
    """DALI's own WebDataset reader and random-crop decoder, and its resize."""
    from nvidia.dali import Pipeline, fn

    pipeline = Pipeline(batch, threads, None)
    with pipeline:
        indices = [str(tar.with_suffix(".idx")) for tar in tars]
        options = {"random_shuffle": True, "missing_component_behavior": "error"}
        jpegs: Any = fn.readers.webdataset(
            paths=[str(tar) for tar in tars], index_paths=indices, ext=["jpg"], **options
        )
        frames = fn.decoders.image_random_crop(
            jpegs, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        pipeline.set_outputs(fn.resize(frames, size=[SIZE, SIZE]) if resize else frames)
    return (pipeline.run() for _ in itertools.count())


# ---- measuring -------------------------------------------------------------------------------------------


def race(contenders: dict[str, Batches], batch: int, rounds: int, batches: int) -> Race:
    """Samples per second and per CPU second of each contender in every round; they take turns.

    Noise affects all equally. CPU seconds are comparable even if other programs use the machine.
    """
    found: Race = {name: {"samples/s": [], CPU_RATE: []} for name in contenders}
    for _ in range(rounds):
        for name, source in contenders.items():
            settle()
            for _ in range(8):  # prefetched batches do not count
                next(source)
            start, used = time.perf_counter(), cpu_seconds()
            for _ in range(batches):
                next(source)
            spent = (time.perf_counter() - start, cpu_seconds() - used)
            for values, seconds in zip(found[name].values(), spent, strict=True):
                values.append(batch * batches / seconds)
    return found


def over_floor(race: Race) -> Race:
    """CPU time per sample, and its ratio to that of the last contender, the floor."""
    times = {name: [1e6 / rate for rate in rounds[CPU_RATE]] for name, rounds in race.items()}
    *_, floor = times.values()
    return {
        name: {
            "CPU microseconds per sample": values,
            "times the floor": [a / b for a, b in zip(values, floor, strict=True)],
        }
        for name, values in times.items()
    }


def settle() -> None:
    """Wait until the previous contender has filled its queues and is idle."""
    before = -1.0
    while cpu_seconds() - before > 0.02:
        before = cpu_seconds()
        time.sleep(0.3)


def cpu_seconds() -> float:
    """CPU time of this process and of its workers so far."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def run(
    images: Path = Path("data/imagenet"),
    work: Path = Path("/tmp/hiera-train-bench"),
    batch: int = 32,
    workers: int = 2,
    rounds: int = 5,
    only: str = "",
) -> Results:
    """Measure everything.

    Args:
        images: folder of JPEG pictures, searched through.
        work: folder for generated data, which is kept and used again.
        batch: pictures per batch; for clips, a quarter of it.
        workers: DataLoader workers, and our decoding threads.
        rounds: rounds per contender.
        only: measure only comparisons whose name contains this.
    """
    data_in(work, images)
    few, pictures = max(1, batch // 4), work / "short256"
    comparisons: dict[str, tuple[int, int, Callable[[], dict[str, Batches]]]] = {
        "pictures, relative to the floor": (
            batch,
            40,
            lambda: floor_race(pictures, 1, batch, workers),
        ),
        "clips, relative to the floor": (few, 16, lambda: floor_race(work / "clips", FRAMES, few, workers)),
        "pictures of short side 256, random crop": (batch, 12, lambda: small_race(work, batch, workers)),
        "pictures of 500 pixels, random crop": (batch, 12, lambda: original_race(work, batch, workers)),
        "clips, random crop": (few, 4, lambda: clip_race(work, Way(), few, workers)),
        "clips, center crop": (few, 4, lambda: clip_race(work, Way(center=True), few, workers)),
        f"crops, decoding only, batches of {batch}": (batch, 100, lambda: decode_race(work, batch, workers)),
        f"crops, decoding only, batches of {4 * batch}": (
            4 * batch,
            25,
            lambda: decode_race(work, 4 * batch, workers),
        ),
    }
    results = {
        f"loading {name}": race(contenders(), size, rounds, batches)
        for name, (size, batches, contenders) in comparisons.items()
        if only in name
    }
    return {name: over_floor(found) if "floor" in name else found for name, found in results.items()}


def floor_race(root: Path, frames: int, batch: int, threads: int) -> dict[str, Batches]:
    loader = our_loader(root, frames, False, batch, threads)
    return {"ours": iter(loader), "decode and resize alone": decode_and_resize(loader, steps=96)}


def small_race(work: Path, batch: int, workers: int) -> dict[str, Batches]:
    tars = sorted((work / "short256" / "train").glob("*.tar"))
    files = [[path] for path in sorted((work / "short256-files").glob("*.jpg"))]
    return {
        "ours": ours(work / "short256", 1, False, batch, workers),
        **file_race(files, Way(), batch, workers),
        "webdataset": webdataset_batches(tars, Way(), batch, workers),
        "DALI alone": bare_dali(tars, batch, workers, resize=True),
    }


def original_race(work: Path, batch: int, workers: int) -> dict[str, Batches]:
    files = [[path] for path in sorted((work / "originals").rglob("*.JPEG"))]
    return {
        "ours": ours(work / "as-is", 1, False, batch, workers),
        **file_race(files, Way(), batch, workers),
    }


def clip_race(work: Path, way: Way, batch: int, workers: int) -> dict[str, Batches]:
    folders = [sorted(folder.iterdir()) for folder in sorted((work / "frames").glob("*/*"))]
    tars = sorted((work / "clips" / "train").glob("*.tar"))
    return {
        "ours": ours(work / "clips", FRAMES, way.center, batch, workers),
        **file_race(folders, way, batch, workers),
        "webdataset": webdataset_batches(tars, way, batch, workers),
    }


def file_race(samples: list[list[Path]], way: Way, batch: int, workers: int) -> dict[str, Batches]:
    """Loaders of files; OpenCV's, if it is installed, for pictures only."""
    racing = {
        "torchvision": torchvision_batches(samples, way, batch, workers),
        "torchvision, uint8": torchvision_batches(samples, replace(way, floats=False), batch, workers),
    }
    if len(samples[0]) == 1 and find_spec("cv2"):
        racing["OpenCV, uint8"] = folder_batches(Folder(samples, opencv_frames), batch, workers)
    return racing


def decode_race(work: Path, batch: int, workers: int) -> dict[str, Batches]:
    tars = sorted((work / "short256" / "train").glob("*.tar"))
    return {
        "our graph": graph_alone(open_dataset(work / "short256", "train"), batch, workers),
        "DALI's reader": bare_dali(tars, batch, workers, resize=False),
    }


if __name__ == "__main__":
    run_cli(lambda: show(tyro.cli(run)))
