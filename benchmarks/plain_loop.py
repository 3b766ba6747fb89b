"""A usual hand-written training loop: python -m benchmarks.plain_loop --model timm --data FOLDER

Pillow and torchvision in DataLoader workers, a model, AdamW and a `for`, with one line per step. The models
are of this project's pico size. benchmarks/training.py compares our training with it.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from benchmarks.parity import timm_model, transformers_model
from models.hiera import Hiera
from models.layers import IMAGE_STATS, VIDEO_STATS
from models.mae import MaskedAutoencoder
from models.zoo import config_of

Model = Literal["ours", "timm", "transformers"]


@dataclass(frozen=True)
class Arguments:
    """Model and data."""

    data: Path
    """class folders of pictures, or of folders of frames"""
    model: Model = "ours"
    mae: bool = False
    clips: bool = False
    batch: int = 32
    steps: int = 40
    workers: int = 2


class Samples(Dataset):
    """Class folders of pictures, or of clips as folders of frames: float32 [3, (16,) s, s] and its class."""

    def __init__(self, root: Path, clips: bool) -> None:
        folders = sorted(path for path in root.iterdir() if path.is_dir())
        self.samples = [(path, index) for index, folder in enumerate(folders) for path in folder.iterdir()]
        self.clips, self.classes = clips, len(folders)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return (self.clip(path) if self.clips else self.views([path], 96, 0.35)[0]), label

    def clip(self, folder: Path) -> Tensor:
        frames = sorted(folder.iterdir())
        start = int(torch.randint(max(1, len(frames) - 30), ()))
        return torch.stack(self.views(frames[start : start + 31 : 2], 64, 0.5), dim=1)

    def views(self, paths: list[Path], size: int, smallest: float) -> list[Tensor]:
        """The same random window and flip for all frames."""
        from PIL import Image
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms import functional as tv

        pictures: list[Any] = [Image.open(path).convert("RGB") for path in paths]
        window = RandomResizedCrop.get_params(pictures[0], [smallest, 1.0], [3 / 4, 4 / 3])
        cut: list[Any] = [tv.resized_crop(picture, *window, [size, size]) for picture in pictures]
        cut = [tv.hflip(picture) for picture in cut] if torch.rand(()) < 0.5 else cut
        mean, std = map(list, VIDEO_STATS if self.clips else IMAGE_STATS)
        return [tv.normalize(tv.to_tensor(picture), mean, std) for picture in cut]


def model_and_loss(
    arguments: Arguments, classes: int
) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """A model of pico size, and the loss of its (pixels, labels)."""
    config = config_of(f"hiera_pico_{'16x64' if arguments.clips else '96'}", num_classes=classes)
    if arguments.model == "ours":
        built = MaskedAutoencoder(config) if arguments.mae else Hiera(config)
    else:
        built = (timm_model if arguments.model == "timm" else transformers_model)(config, arguments.mae)

    model: Any = built

    def mae_loss(pixels: Tensor, labels: Tensor) -> Tensor:
        if arguments.model == "transformers":
            return model(pixel_values=pixels).loss
        units = model.num_mask_units
        kept = int(units * (0.25 if arguments.clips else 0.4))
        return model(pixels, keep=torch.rand(len(pixels), units).argsort(1)[:, :kept].sort(1).values).loss

    def classifier_loss(pixels: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(model(pixels), labels, label_smoothing=0.1)

    return model, mae_loss if arguments.mae else classifier_loss


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.plain_loop")
    samples = Samples(arguments.data, arguments.clips)
    batches = DataLoader(
        samples,
        arguments.batch,
        shuffle=True,
        num_workers=arguments.workers,
        drop_last=True,
        persistent_workers=True,
    )
    model, loss_of = model_and_loss(arguments, samples.classes)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.05, fused=True)
    endless = itertools.chain.from_iterable(itertools.repeat(batches))
    model.train()
    for step, (pixels, labels) in enumerate(itertools.islice(endless, arguments.steps), start=1):
        loss = loss_of(pixels, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
