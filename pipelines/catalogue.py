"""The catalogue of a packed dataset: what every shard holds, and where in it each frame lies."""

import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import UserError

FORMAT_VERSION = 1
READABLE = [("status", "=", "ok")]

# One row per source sample of a split, the rejected ones too; written by tools/shards.py.
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int32()),  # -1: unlabelled
        ("class_name", pa.string()),
        ("source", pa.string()),  # path below the source folder
        ("status", pa.string()),  # "ok" or "rejected"
        ("reason", pa.string()),  # why it was rejected, else ""
        ("change", pa.string()),  # "copied", or what was done to make it readable
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("frames", pa.int32()),
        ("shard", pa.int32()),  # -1: rejected
        ("offsets", pa.list_(pa.int64())),  # byte offset of every frame's JPEG in its tar
        ("sizes", pa.list_(pa.int32())),  # its length in bytes
        ("sha256", pa.string()),  # over the frames' bytes in order
    ]
)


@dataclass(frozen=True)
class DatasetInfo:
    """What `dataset.json` says of a packed dataset."""

    root: Path
    kind: str  # "image" or "video"
    classes: tuple[str, ...]
    splits: dict[str, dict[str, int]]
    packing: dict[str, object]


@dataclass(frozen=True)
class Catalogue:
    """The readable samples of one split; a sample's id is its row here, N samples, F frames in all.

    Frames of sample `i` are `first_frame[i]:first_frame[i + 1]` of `offset` and `size`.
    """

    info: DatasetInfo
    split: str
    shard: np.ndarray  # [N] int32, ascending
    label: np.ndarray  # [N] int32, -1: unlabelled
    width: np.ndarray  # [N] int32, pixels
    height: np.ndarray  # [N] int32, pixels
    first_frame: np.ndarray  # [N + 1] int64
    offset: np.ndarray  # [F] int64, bytes from the start of the sample's tar
    size: np.ndarray  # [F] int32, bytes

    def __len__(self) -> int:
        return len(self.shard)

    @cached_property
    def keys(self) -> pa.Array:
        """The samples' keys [N]; read when first asked for, since training never needs them."""
        return pq.read_table(self.parquet, columns=["key"], filters=READABLE)["key"].combine_chunks()

    @property
    def parquet(self) -> Path:
        return self.info.root / f"{self.split}.parquet"

    def frame_counts(self, ids: np.ndarray) -> np.ndarray:
        """Frames of each sample, [n] int64."""
        return self.first_frame[ids + 1] - self.first_frame[ids]

    def tar_path(self, shard: int) -> Path:
        return self.info.root / self.split / f"{shard:06d}.tar"

    def frame_bytes(self, sample: int, frame: int) -> np.ndarray:
        """The JPEG of a frame, uint8 [bytes], a view on the memory-mapped tar: nothing is copied."""
        row = self.first_frame[sample] + frame
        start = self.offset[row]
        return map_tar(self.tar_path(int(self.shard[sample])))[start : start + self.size[row]]


@cache
def map_tar(path: Path) -> np.ndarray:
    """A tar as uint8 [bytes], memory-mapped, so that processes share its pages.

    Raises UserError when the tar is not there. torch closes the descriptor after mapping, which Python's
    `mmap` does not: a data set of more tars than the limit on open files (often 1,024) works.
    """
    import torch

    try:
        length = path.stat().st_size
        return torch.from_file(str(path), shared=False, size=length, dtype=torch.uint8).numpy()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({error}); pack this dataset again") from error


def read_info(root: Path | str) -> DatasetInfo:
    """Read `dataset.json`. Raises UserError when the folder, the file or its format is not as expected."""
    root = Path(root)
    path = root / "dataset.json"
    if not root.is_dir():
        raise UserError(f"{root} does not exist; pack a dataset there with `make shards` or `make demo`")
    if not path.is_file():
        raise UserError(f"{root} holds no dataset.json, so its packing did not finish; run the packing again")
    try:
        raw = json.loads(path.read_text())
        if raw["format"] != FORMAT_VERSION:
            raise UserError(
                f"{path} is of format {raw['format']}, this version reads {FORMAT_VERSION}; pack it again"
            )
        return DatasetInfo(root, raw["kind"], tuple(raw["classes"]), raw["splits"], raw["packing"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); pack this dataset again") from error


def open_catalogue(root: Path | str, split: str) -> Catalogue:
    """Open the readable samples of a split. Raises UserError when something is missing or damaged."""
    info = read_info(root)
    path = info.root / f"{split}.parquet"
    if split not in info.splits:
        raise UserError(f"{info.root} has no split {split!r}, only {', '.join(sorted(info.splits))}")
    if not path.is_file():
        raise UserError(f"{path} is missing; pack this dataset again")
    try:
        columns = read_columns(path)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); pack this dataset again") from error
    if len(columns["shard"]) != info.splits[split]["samples"]:
        raise UserError(
            f"{path} lists {len(columns['shard'])} samples, dataset.json says "
            f"{info.splits[split]['samples']}; pack this dataset again"
        )
    return Catalogue(info, split, **columns)


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """The numeric columns of the rows whose status is "ok", as `Catalogue` names them."""
    flat = ["shard", "label", "width", "height"]
    table = pq.read_table(path, columns=[*flat, "offsets", "sizes"], filters=READABLE)
    columns = {name: table[name].to_numpy() for name in flat}
    offsets, sizes = table["offsets"].combine_chunks(), table["sizes"].combine_chunks()
    counts = sizes.value_lengths().to_numpy()
    columns["first_frame"] = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    columns["offset"] = offsets.flatten().to_numpy()
    columns["size"] = sizes.flatten().to_numpy()
    return columns
