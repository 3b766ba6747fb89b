"""The catalogue of a packed dataset: what every shard holds, and where in it each frame lies."""

import ctypes
import json
import mmap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.columns import READABLE, load_columns
from pipelines.errors import UserError

FORMAT_VERSION = 1
LIBC = ctypes.CDLL(None)
LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

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


@dataclass(frozen=True, eq=False)
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

    def tar(self, shard: int) -> np.ndarray:
        """A shard's bytes, mapped when first asked for."""
        if shard not in self._tars:
            self._tars[shard] = map_tar(self.tar_path(shard))
        return self._tars[shard]

    @cached_property
    def _tars(self) -> dict[int, np.ndarray]:
        return {}

    def frame_bytes(self, sample: int, frame: int) -> np.ndarray:
        """The JPEG of a frame, uint8 [bytes]; see `clip_bytes`."""
        return self.clip_bytes(np.array([sample]), np.array([[frame]]))[0]

    def clip_bytes(self, ids: np.ndarray, frames: np.ndarray) -> list[np.ndarray]:
        """The JPEGs of frames [n, T] of samples ids [n], sample after sample: n * T views, uint8 [bytes].

        They lie in the memory-mapped tars: nothing is read or copied here. Raises UserError when a tar is
        not there.
        """
        rows = self.first_frame[ids][:, None] + frames
        starts, ends = self.offset[rows], self.offset[rows] + self.size[rows]
        tars = [self.tar(shard) for shard in self.shard[ids].tolist()]
        places = zip(tars, starts.tolist(), ends.tolist(), strict=True)
        return [tar[a:b] for tar, low, high in places for a, b in zip(low, high, strict=True)]

    def member_name(self, sample: int, frame: int) -> str:
        """A frame's name inside its tar, "KEY.jpg" or "KEY.f0003.jpg", from the header before its bytes."""
        start = int(self.offset[self.first_frame[sample] + frame])
        header = self.tar(int(self.shard[sample]))[start - 512 : start - 412]
        return header.tobytes().rstrip(b"\0").decode("ascii", "replace")

    def will_need(self, ids: np.ndarray, frames: np.ndarray) -> None:
        """Ask the kernel to read frames [n, T] of samples ids [n] ahead, so that cold files stall nobody.

        Asks for all from a sample's first frame to its last in one go, which is how disks like it.
        """
        rows = self.first_frame[ids][:, None] + frames
        low, high = rows.min(axis=1), rows.max(axis=1)
        starts = self.offset[low] // mmap.PAGESIZE * mmap.PAGESIZE
        lengths = self.offset[high] + self.size[high] - starts
        for shard, start, length in zip(
            self.shard[ids].tolist(), starts.tolist(), lengths.tolist(), strict=True
        ):
            address = self.tar(shard).__array_interface__["data"][0]
            LIBC.madvise(address + start, length, mmap.MADV_WILLNEED)  # a hint: failure does not matter


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
        columns = load_columns(path)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); pack this dataset again") from error
    if len(columns["shard"]) != info.splits[split]["samples"]:
        raise UserError(
            f"{path} lists {len(columns['shard'])} samples, dataset.json says "
            f"{info.splits[split]['samples']}; pack this dataset again"
        )
    return Catalogue(info, split, **columns)
