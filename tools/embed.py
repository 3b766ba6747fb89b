"""Features of every sample as a Parquet table: python -m tools.embed runs/NAME --out features.parquet.

The features are the input of a classifier's head: the last stage's tokens, averaged and normalized. For a
masked autoencoder, all tokens are visible, and the norm is that of its encoder. Several processes share the
samples; rank 0 receives the features of each batch and writes them, so no process ever has all of them.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro

from models.layers import NormalizedInput
from pipelines.augment import to_device
from pipelines.dataset import Dataset, open_split, read_batch, read_info
from pipelines.errors import UserError, once_per_machine, run_cli
from pipelines.files import atomic_write
from pipelines.views import clip_notes
from train import distributed, ending
from train.config import Config
from train.console import log
from train.distributed import World
from train.evaluate import read_config, weights_of
from train.health import encoded
from train.probe import head_input, open_encoder
from train.task import check_damage

LISTED = ("source", "label", "class_name")  # columns of the catalogue
ROWS = 8192  # least number of rows in a row group, except the last one


@dataclass(frozen=True)
class Arguments:
    """Write the features of every sample of a packed dataset."""

    run: tyro.conf.Positional[Path]
    """Run folder, of pretraining or of finetuning."""
    out: Path
    """Parquet file to write."""
    weights: Path | None = None
    """Other weights than the run's model.safetensors, for example best.safetensors."""
    data: Path | None = None
    """Other shards than the run's."""
    split: str = ""
    """The only split to read; empty: all splits."""
    views: tuple[int, int] = (1, 1)
    """Temporal x spatial views of a sample, as in evaluation; its features are their mean."""
    device: str = "auto"
    processes: int = 1
    """Processes to start on this machine, one per GPU. Leave it at 1 under torchrun."""


def embed(arguments: Arguments) -> None:
    """Write the table; raises UserError. Under torchrun all processes call it together."""
    with once_per_machine():
        config, weights, splits = read(arguments)
    info, out, views = splits[0].info, arguments.out, arguments.views
    run, model = open_encoder(config, weights, info.classes or ("none",), arguments.device)
    tables = (table for split in splits for table in tables_of(config, run.world, model, split, views))
    rows = missing = 0
    with atomic_write(out) if run.world.is_main else nullcontext() as path:
        writer: pq.ParquetWriter | None = None
        for table in grouped(tables):
            rows, missing = rows + len(table), missing + table["features"].null_count
            if path is not None:
                writer = writer or pq.ParquetWriter(path, table.schema)
                writer.write_table(table)
        if writer is not None:
            writer.close()
    shown = "the center view" if views == (1, 1) else f"the mean of {views[0]} x {views[1]} views"
    damaged = f"; damaged samples, whose features are null: {missing}" if missing else ""
    width = model.model.get_parameter("norm.weight").numel()
    names = ", ".join(split.split for split in splits)
    log(f"{out}: {rows} samples ({names}), {width} features of {shown} each{damaged}")


def read(arguments: Arguments) -> tuple[Config, Path, list[Dataset]]:
    """The run's configuration, its weights and the splits; raises UserError for a wrong argument."""
    config, out, views = read_config(arguments.run, arguments.data), arguments.out, arguments.views
    weights, info = weights_of(arguments.run, arguments.weights), read_info(config.data.path)
    names = [arguments.split] if arguments.split else [k for k, v in info.splits.items() if v["samples"]]
    if not names:
        raise UserError(f"{info.root} has no samples; pack it again, or give other --data")
    if min(views) < 1:
        raise UserError(f"--views is {views[0]} {views[1]}; both must be at least 1")
    if out.suffix.lower() != ".parquet":
        raise UserError(f"{out} does not end in .parquet; name such a file with OUT= (--out)")
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"{out} cannot be written; name a file in a folder that exists")
    return config, weights, [open_split(info, name) for name in names]


def tables_of(
    config: Config, world: World, model: NormalizedInput, dataset: Dataset, views: tuple[int, int]
) -> Iterator[pa.Table]:
    """The rows of a split in the order of ids, the same in every process: those of a batch of each process.

    Raises UserError if too many samples are damaged.
    """
    for note in clip_notes(dataset, config.data):
        log(note)
    listed = read_batch(dataset.catalogue, LISTED)
    start = seen = 0
    for batch, found in encoded(config, world, dataset, head_input(model), views):
        valid = to_device(batch.valid[:: views[0] * views[1]].copy(), world.device)
        # The k-th row of rank r is the k-th of the samples r, r + size, ...; rows beyond the last id pad.
        gathered = distributed.gather(torch.cat([found, valid[:, None]], dim=1)).transpose(0, 1).flatten(0, 1)
        values = gathered[: len(dataset) - start].cpu().numpy()
        ids, whole = np.arange(start, start + len(values)), values[:, -1] > 0
        start, seen = start + len(values), seen + int(whole.sum())
        width = values.shape[1] - 1
        flat = pa.array(values[:, :-1].ravel())
        features = pa.FixedSizeListArray.from_arrays(flat, width, mask=pa.array(~whole))
        columns = {"split": [dataset.split] * len(ids), "id": ids}
        columns |= {name: listed[name].slice(ids[0], len(ids)) for name in LISTED}
        yield pa.table({**columns, "features": features})
    check_damage(config.data, dataset, seen)


def grouped(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The rows of the tables in tables of at least ROWS rows, except the last."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= ROWS:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def main() -> None:
    with once_per_machine():
        arguments = tyro.cli(Arguments, prog="python -m tools.embed")
    if arguments.processes > 1 and not distributed.under_torchrun():
        read(arguments)
        distributed.resolve_device(arguments.device, arguments.processes)
        distributed.launch(arguments.processes, restarts=0)
    ending.end_together(lambda: embed(arguments))


if __name__ == "__main__":
    run_cli(main)
