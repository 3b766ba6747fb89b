"""Open catalogues of the size of Kinetics-400 and ImageNet-21k: python -m benchmarks catalogue

The rows are synthetic: 240,000 clips of 300 frames, and 14 million pictures. Shards are not needed. The
tables show the time to open a catalogue (cold, and from the page cache), to plan a first batch of 64 and to
draw the order of an epoch, the memory of one process and of eight, and how much a cache of some of the shards
would fetch per epoch. The last number is the reason why tools.stage copies all shards.
"""

import json
import multiprocessing
import shutil
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pyarrow as pa
import tyro
from rich.console import Console
from rich.table import Table

from pipelines import order, views
from pipelines.config import DataConfig
from pipelines.dataset import FORMAT_VERSION, SCHEMA, open_dataset
from pipelines.errors import run_cli
from pipelines.files import sha256_of
from tools.shards import write_catalogue

PROCESSES = 8
DATASETS = {  # name -> samples, frames per sample, samples per shard
    "kinetics-400": (240_000, 300, 64),
    "imagenet-21k": (14_000_000, 1, 1000),
}


def make(root: Path, samples: int, frames: int, per_shard: int) -> None:
    """Write dataset.json and a train.arrow of synthetic rows."""
    root.mkdir(parents=True, exist_ok=True)
    at_once = max(1, 6_000_000 // frames // per_shard) * per_shard
    parts = [
        rows(np.arange(first, min(samples, first + at_once)), frames, per_shard)
        for first in range(0, samples, at_once)
    ]
    write_catalogue(root / "train.arrow", pa.concat_tables(parts))
    kind = "image" if frames == 1 else "video"
    counts = {
        "samples": samples,
        "rejected": 0,
        "frames": samples * frames,
        "shards": -(-samples // per_shard),
    }
    info = {"format": FORMAT_VERSION, "kind": kind, "classes": list(map(str, range(400))), "packing": {}}
    info |= {"splits": {"train": counts}, "tar_bytes": {"train": [1 << 40] * counts["shards"]}}
    info["catalogue_sha256"] = {"train": sha256_of(root / "train.arrow")}
    (root / "dataset.json").write_text(json.dumps(info))


def rows(ids: np.ndarray, frames: int, per_shard: int) -> pa.Table:
    """Catalogue rows of the samples `ids`, which fill whole shards."""
    sizes = np.random.default_rng(int(ids[0])).integers(8_000, 18_000, (len(ids), frames)).astype(np.int32)
    places = np.cumsum(sizes.ravel() // 512 * 512 + 1024, dtype=np.int64).reshape(sizes.shape)
    places -= np.repeat(places[::per_shard, :1], per_shard, axis=0)[: len(ids)] - 512
    bounds = pa.array(np.arange(0, sizes.size + 1, frames, dtype=np.int64))
    columns = {
        "key": [f"{i:08d}-some-name" for i in ids],
        "label": (ids % 400).astype(np.int32),
        "class_name": [f"class {i % 400}" for i in ids],
        "source": [f"class/{i}" for i in ids],
        "shard": (ids // per_shard).astype(np.int32),
        "sha256": [f"{i * 7919:064x}" for i in ids],
        "offsets": pa.LargeListArray.from_arrays(bounds, pa.array(places.ravel())),
        "sizes": pa.LargeListArray.from_arrays(bounds, pa.array(sizes.ravel())),
        "crcs": pa.LargeListArray.from_arrays(bounds, pa.array(sizes.ravel().astype(np.uint32))),
    }
    same = {"status": "ok", "reason": "", "change": "copied", "width": 340, "height": 256, "frames": frames}
    columns |= {name: [value] * len(ids) for name, value in same.items()}
    return pa.table([pa.array(columns[part.name], part.type) for part in SCHEMA], schema=SCHEMA)


def use(root: Path, rank: int, report: multiprocessing.Queue, end: Event) -> None:
    """Open the catalogue in a new process and look up samples as a loader does; wait for `end`."""
    start = time.perf_counter()
    catalogue = open_dataset(root, "train")
    opened = time.perf_counter() - start
    config = DataConfig(frames=1 if catalogue.info.kind == "image" else 16)
    start = time.perf_counter()
    arrange = order.make_order("random", catalogue.shard, 0, config.window)
    epochs, ids = arrange(order.batch_positions(0, 64 * PROCESSES, rank, PROCESSES, 1).ravel())
    views.train_rows(catalogue, config, 0, ids, epochs)
    planned = time.perf_counter() - start
    for step in range(200):
        positions = order.batch_positions(step, 8192, rank, PROCESSES, 1)[0]
        _, ids = order.sample_at(positions, len(catalogue), 0)
        first = catalogue.first_frame[ids]
        for values in (catalogue.offset[first], catalogue.size[first], catalogue.label[ids]):
            values.sum()
    report.put((opened, planned))
    end.wait()


def measure(root: Path, processes: int) -> tuple[float, float, float, float]:
    """Seconds until all have it open, and for a first plan; MB each, shared pages in full and as a share."""
    context = multiprocessing.get_context("spawn")
    report, end = context.Queue(), context.Event()
    started = [context.Process(target=use, args=(root, rank, report, end)) for rank in range(processes)]
    for process in started:
        process.start()
    times = [report.get(timeout=300) for _ in started]
    opened, planned = (max(column) for column in zip(*times, strict=True))
    held = {"Rss": 0.0, "Pss": 0.0}
    for process in started:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in held:
                held[name] += int(rest.split()[0]) / 1e3 / processes
    end.set()
    for process in started:
        process.join()
    return opened, planned, held["Rss"], held["Pss"]


def order_seconds(samples: int) -> float:
    """Seconds to draw the order of an epoch."""
    start = time.perf_counter()
    for ids in epoch(order.make_order("random", np.empty(samples), 0, 4096), samples):
        ids.sum()
    return time.perf_counter() - start


def epoch(arrange: order.Order, samples: int) -> Iterator[np.ndarray]:
    """The ids of an epoch, in parts."""
    for first in range(0, samples, 65_536):
        yield arrange(np.arange(first, min(samples, first + 65_536)))[1]


def fetched(shards: np.ndarray, arrange: order.Order, share: float) -> float:
    """Fetches per shard and epoch with an LRU cache of `share` of the shards."""
    count = int(shards[-1]) + 1
    cache: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for ids in epoch(arrange, len(shards)):
        for shard in shards[ids].tolist():
            if shard in cache:
                cache.move_to_end(shard)
                continue
            misses += 1
            cache[shard] = None
            if len(cache) > share * count:
                cache.popitem(last=False)
    return misses / count


def bench(work: Path = Path("/tmp/hiera-train-bench")) -> None:
    """Measure and print two tables.

    Args:
        work: folder for the synthetic catalogues (about 5 GB), which are removed at the end.
    """
    table = Table(
        title=f"catalogues; memory is of one process, and each of {PROCESSES} counting shared pages once"
    )
    for head in (
        "",
        "samples",
        "frames",
        "first open (s)",
        "open (s)",
        "plan (s)",
        "one (MB)",
        "each (MB)",
        "order (s)",
    ):
        table.add_column(head, justify="right" if head else "left")
    caches = Table(title="shards fetched in an epoch by a cache of a share of all, per shard there is")
    for head in ("", "order", "5 %", "25 %", "50 %"):
        caches.add_column(head, justify="right" if "%" in head else "left")
    for name, (samples, frames, per_shard) in DATASETS.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        root = work / name
        try:
            make(root, samples, frames, per_shard)
            first, plan, alone, _ = measure(root, 1)
            again, _, _, each = measure(root, PROCESSES)
        finally:
            shutil.rmtree(root, ignore_errors=True)
        numbers = [f"{x:.2f}" for x in (first, again, plan)] + [f"{x:.0f}" for x in (alone, each)]
        table.add_row(
            name, f"{samples:,}", f"{samples * frames:,}", *numbers, f"{order_seconds(samples):.2f}"
        )
        if frames > 1:
            shards = np.arange(samples) // per_shard
            for kind in ("random", "local"):
                made = order.make_order(kind, shards, 0, 4096)
                caches.add_row(name, kind, *(f"{fetched(shards, made, s):.2f}" for s in (0.05, 0.25, 0.5)))
    for shown in (table, caches):
        Console(width=None if sys.stdout.isatty() else 130).print(shown)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(bench, description=__doc__))
