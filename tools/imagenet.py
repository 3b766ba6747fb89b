"""Pack pictures: options, and the plan from class folders or lists."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import PIL

from tools.folders import PICTURES
from tools.images import Packed, prepare, read_file
from tools.listing import plan_of
from tools.samples import ListOptions, list_samples
from tools.shards import Packing, PackPlan


@dataclass(frozen=True, kw_only=True)
class ImageOptions(ListOptions):
    """Options of packing pictures. Raises UserError for a value out of its range."""

    shard_size: int = 1000
    """pictures per shard"""
    synsets: Path | None = None
    """for class numbers in --val-list: file with the class of each number per line, from 1 in the order of
    ILSVRC2012_ID"""

    def packing(self) -> Packing:
        """What decides the bytes of a shard."""
        return Packing(self.short_side, self.shard_size, self.max_pixels, self.val_fraction, PIL.__version__)


def load_image(root: Path, source: str, packing: Packing) -> Iterator[Packed]:
    """Read and check one picture. Raises `BadImage` or `OSError`."""
    yield prepare(read_file(root / source), packing.short_side, packing.max_pixels)


def plan_images(source: Path, options: ImageOptions) -> PackPlan:
    """List the pictures below `source`; decide split, label, key and order. Raises `UserError`."""
    lists = options.train_list, options.val_list, options.synsets
    listing = list_samples(source, PICTURES, *lists)
    return plan_of("image", listing, options.val_fraction, options.packing(), str(source))
