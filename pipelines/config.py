"""The settings of the data path; each dataclass checks its own ranges and choices."""

import typing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from pipelines.errors import UserError

ABOVE_0, BELOW_1, ANY = 1e-9, 1 - 1e-9, float("inf")  # limits of ranges
PIXELS = 1 << 26  # most pixels of an input: a configuration from elsewhere must not fill the memory

Range = tuple[float, float]  # from, to


def check_settings(settings: object, prefix: str, **ranges: Range) -> None:
    """Raise UserError for a setting outside its range, or a word that is no choice of its Literal type.

    prefix: what comes before the field's name on the command line, such as "data.".
    """
    for name, limits in ranges.items():
        check_range(prefix + name, getattr(settings, name), limits)
    for name, words in choices(type(settings)).items():
        value = getattr(settings, name)
        for word in value if isinstance(value, tuple) else (value,):
            if word not in words:
                raise UserError(f"{prefix}{name} is '{word}'; it can be {', '.join(words)}")


def check_range(name: str, value: float, limits: Range) -> None:
    """Raise UserError unless the value is finite and within the limits."""
    low, high = limits
    if not low <= value <= high or value == ANY:
        least = "more than 0" if low == ABOVE_0 else f"at least {low:g}"
        finite = " and finite" if value == ANY else ""
        most = {ANY: finite, BELOW_1: " and less than 1"}.get(high, f" and at most {high:g}")
        raise UserError(f"{name} is {value}; it must be {least}{most}")


@cache
def choices(kind: type) -> dict[str, tuple[str, ...]]:
    """The words that each field of a dataclass can be whose type is a Literal, or a tuple of them."""
    hints = typing.get_type_hints(kind)
    single = {n: typing.get_args(h)[0] if typing.get_origin(h) is tuple else h for n, h in hints.items()}
    return {name: typing.get_args(h) for name, h in single.items() if typing.get_origin(h) is Literal}


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What is done to a training row after its crop and flip; the default is nothing."""

    layers: int = 0
    """RandAugment (Cubuk et al. 2020) operations per row; 2 is usual."""
    magnitude: float = 9.0
    """Strength of RandAugment's operations, of 10."""
    magnitude_std: float = 0.5
    """The magnitude is drawn from a normal distribution and clipped to [0, 10]."""
    probability: float = 0.5
    """Probability of each operation."""
    jitter: float = 0.0
    """Brightness, contrast and saturation factors are drawn from 1 +- jitter."""
    erase: float = 0.0
    """Probability of random erasing (Zhong et al. 2020) with noise."""

    def __post_init__(self) -> None:
        ranges = {**dict.fromkeys(("layers", "jitter", "magnitude_std"), (0, ANY)), "magnitude": (0, 10)}
        check_settings(self, "data.augment.", **ranges, probability=(0, 1), erase=(0, 1))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read and how it is augmented."""

    path: Path = Path("shards/imagenet")
    """Folder written by tools.pack."""
    size: int = 224
    """Side of the square input in pixels."""
    frames: int = 1
    """Frames per clip; 1 means images."""
    sampling: Literal["stride", "segments"] = "stride"
    """stride: a window of frames at `stride`; segments: a frame from each of `frames` equal parts of the clip
    (SSv2), random in training, the middle one in evaluation."""
    stride: int = 4
    """Distance between the frames of a clip, in frames at `stride_fps`; converted to the dataset's rate."""
    stride_fps: float = 30.0
    """Frames per second to which `stride`, `clip_start` and `eval_clip_start` refer."""
    clip_start: int | None = None
    """First frame of every training clip, at `stride_fps`; None = random."""
    eval_clip_start: int | None = None
    """First frame of every clip in evaluation, at `stride_fps`; None = centered."""
    eval_split: Literal["val", "train"] = "val"
    """Split that is evaluated. With train, nothing is held out."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Area share of the random resized crop."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of aspect ratios of the random resized crop."""
    flip: float = 0.5
    """Probability of a horizontal flip; set it to 0 if classes differ in left and right (SSv2)."""
    interpolation: Literal["triangular", "cubic", "linear"] = "triangular"
    """Resize filter: triangular (antialiased, as torchvision), cubic or linear."""
    crop: float = 224 / 256
    """Evaluation: side of the center window as a share of the short side."""
    augment: Augment = field(default_factory=Augment)
    """RandAugment, color jitter and random erasing of training rows, alike in all frames of a clip."""
    repeats: int = 1
    """Augmented copies (rows) of each sample (repeated augmentation); optim.batch and epochs count rows."""
    same_clip: bool = False
    """The repeats of a clip have the same frames, decoded once; otherwise each has frames of its own."""
    order: Literal["random", "local"] = "random"
    """random (all samples permuted), or local (shards, then windows: for disks and network file systems)."""
    window: int = 4096
    """Samples shuffled together in local order."""
    max_bad: float = 0.001
    """Share of a split's samples that may be damaged: training replaces them, evaluation leaves them out."""

    def __post_init__(self) -> None:
        at_least_1 = dict.fromkeys(("size", "frames", "stride", "repeats", "window"), (1, ANY))
        shares = {"flip": (0, 1), "max_bad": (0, 1), "crop": (ABOVE_0, 1)}
        check_settings(self, "data.", **at_least_1, **shares, stride_fps=(ABOVE_0, ANY))
        check_range("data.frames * data.size * data.size", self.frames * self.size**2, (1, PIXELS))
        for name in ("clip_start", "eval_clip_start"):
            check_range(f"data.{name}", getattr(self, name) or 0, (0, ANY))
        check_range("data.scale's first", self.scale[0], (ABOVE_0, self.scale[1]))
        check_range("data.scale's second", self.scale[1], (ABOVE_0, 1))
        check_range("data.ratio's second", self.ratio[1], (ABOVE_0, ANY))
        check_range("data.ratio's first", self.ratio[0], (ABOVE_0, self.ratio[1]))

    @property
    def copies(self) -> int:
        """How many training rows one decoded frame serves."""
        return self.repeats if self.same_clip or self.frames == 1 else 1


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How JPEGs are decoded. Nothing here changes the pixels, rounding apart."""

    threads: int = 0
    """DALI threads per process; 0 = chosen from the machine."""
    hw_decoder_load: float = 0.65
    """Share of the JPEGs for the GPU's hardware JPEG decoder, if it has one."""
    decode: Literal["whole", "window"] = "whole"
    """What a GPU decodes: whole pictures, or each window alone (window); the CPU always decodes windows."""

    def __post_init__(self) -> None:
        check_settings(self, "speed.", threads=(0, ANY), hw_decoder_load=(0, 1))
