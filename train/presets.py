"""Every recipe as a named preset: `image-mae-SIZE`, `video-mae-SIZE`, `image-ft-SIZE`, `video-ft-SIZE`.

Numbers are from the Hiera paper (arXiv 2306.00989, appendix), MAE-st and SlowFast's configurations. `pico` is
this project's own size, for CPUs and first trials; its numbers were tuned on the demo data.
"""

from dataclasses import replace
from pathlib import Path

from pipelines.augment import Augment
from train.config import (
    REFERENCE,
    DataConfig,
    FinetuneConfig,
    MaeConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SpeedConfig,
)

IMAGE_SIZES = ("tiny", "small", "base", "base_plus", "large", "huge")
VIDEO_SIZES = ("base", "base_plus", "large", "huge")
IMAGES, CLIPS = Path("shards/imagenet"), Path("shards/kinetics")


def image_mae(size: str) -> MaeConfig:
    """MAE on ImageNet-1K images, paper table 12: 400 or 1600 epochs, batch 4096, lr 8e-4.

    Drop path by size: 0 for tiny and small, 0.3 for huge, else 0.2. `--mask-ratio`: the paper's ablation at
    size large, finetuned, has 85.5 / 85.6 / 85.3 for 0.5 / 0.6 / 0.7.
    make train-mae RECIPE=image-mae-base DATA=shards/imagenet GPUS=8
    """
    drop_path = {"tiny": 0.0, "small": 0.0, "huge": 0.3}.get(size, 0.2)
    return MaeConfig(
        data=DataConfig(path=IMAGES, scale=(0.2, 1.0), interpolation="cubic"),
        model=ModelConfig(f"mae_hiera_{size}_224", drop_path),
        optim=OptimConfig(4096, 8e-4, 4096, epochs=400, warmup_epochs=40, betas=(0.9, 0.95)),
        mask_ratio=0.6,
    )


def video_mae(size: str) -> MaeConfig:
    """MAE on Kinetics clips, 16 frames at stride 4: 800 to 3200 epochs, batch 512 clips, lr 8e-4.

    A video that is opened gives 4 clips, which count as epochs: 800 are 200 passes over the videos.
    The gradient clip of 0.02 is MAE-st's and SlowFast's; the paper does not name it. `--decoder-heads 8` is
    the paper's text, 16 the released weights' code. Something-Something v2 wants `--data.flip 0`.
    make train-mae RECIPE=video-mae-base DATA=shards/kinetics GPUS=8
    """
    drop_path = {"base": 0.1, "huge": 0.3}.get(size, 0.2)
    return MaeConfig(
        data=DataConfig(CLIPS, frames=16, scale=(0.5, 1.0), repeats=4),
        model=ModelConfig(f"mae_hiera_{size}_16x224", drop_path),
        optim=OptimConfig(512, 8e-4, 512, epochs=800, warmup_epochs=120, betas=(0.9, 0.95), clip_norm=0.02),
        speed=SpeedConfig(micro_batch=32),
        mask_ratio=0.9,
    )


def image_ft(size: str) -> FinetuneConfig:
    """Finetuning on ImageNet-1K at batch 1024, paper table 13.

    Published top-1: tiny 82.8, small 83.8, base 84.5, base-plus 85.2, large 86.1,
    huge 86.9. Random erasing at 0.25 is in the authors' unfinished code and not in the paper:
    `data.augment.erase`; so is the last block at the head's rate: `optim.decay_last_block`.
    make train-ft RECIPE=image-ft-base INIT=runs/image-mae-base/model.safetensors GPUS=8
    """
    small, big = size in ("tiny", "small"), size in ("large", "huge")
    epochs = {"tiny": 300, "small": 200, "large": 50, "huge": 50}.get(size, 100)
    decay = 0.65 if small else 0.85 if big else 0.7
    lr = 2e-3 if size in ("tiny", "small", "base") else 1e-3
    return FinetuneConfig(
        data=DataConfig(
            IMAGES,
            scale=(0.08, 1.0),
            interpolation="cubic",
            augment=Augment(layers=2, magnitude=9.0, magnitude_std=0.5),
        ),
        model=ModelConfig(f"hiera_{size}_224", 0.3 if size == "huge" else 0.1),
        optim=OptimConfig(1024, lr, 1024, epochs=epochs, warmup_epochs=5, layer_decay=decay),
        mixup=0.8,
        cutmix=1.0,
    )


def video_ft(size: str) -> FinetuneConfig:
    """Finetuning on Kinetics-400 at batch 256 clips, 16 frames at stride 4, tested with 5 x 3 views.

    Published top-1, 15 views: base 84.0, base-plus 85.0, large 87.3, huge 87.8.
    RandAugment is the paper's (7, 0.5); that it takes 4 operations is SlowFast's. Every clip that is decoded
    gives two augmented rows. For Something-Something v2 the authors used SGD (`--optim.name sgd`) without
    flips; its other numbers are not known here, so there is no recipe of that name.
    make train-ft RECIPE=video-ft-base INIT=mae_hiera_base_16x224:mae_k400 DATA=shards/kinetics GPUS=8
    """
    big = size in ("large", "huge")
    return FinetuneConfig(
        data=DataConfig(
            CLIPS,
            frames=16,
            scale=(0.5, 1.0),
            repeats=2,
            same_clip=True,
            augment=Augment(layers=4, magnitude=7.0, magnitude_std=0.5),
        ),
        model=ModelConfig(f"hiera_{size}_16x224", 0.3 if size == "huge" else 0.2, 0.5 if big else 0.3),
        optim=OptimConfig(
            batch=256,
            lr=4e-4 if size == "huge" else 8e-4,
            lr_batch=256,
            epochs=100 if big else 150,
            warmup_epochs=10,
            layer_decay=0.875 if big else 0.8,
            clip_norm=5.0,
        ),
        speed=SpeedConfig(micro_batch=16),
        mixup=0.8,
        cutmix=1.0,
    )


def tiny_kinetics_reference() -> FinetuneConfig:
    """The reference trainer's finetuning of Tiny-Kinetics-400, its accuracy not of held-out videos.

    15,000 steps of 8 clips x 10 accumulated, AdamW at 1e-4, no augmentation. It reports 0.15 from scratch
    (`--freeze none`) and 0.8575 from K400 MAE weights with the trunk frozen
    (`--model.init mae_hiera_base_16x224:mae_k400`).
    """
    return FinetuneConfig(
        data=DataConfig(CLIPS, frames=16, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0),
        model=ModelConfig("hiera_base_16x224"),
        optim=OptimConfig(80, 1e-4, 80, epochs=3000, warmup_epochs=0, min_lr=1e-4),
        run=RunConfig(log_every=1000, eval_every=1000),
        speed=SpeedConfig(micro_batch=8),
        freeze="trunk",
        smoothing=0.0,
        protocol=REFERENCE,
    )


PICO_RUN = RunConfig(log_every=10, eval_every=100, checkpoint_every=50)


def image_mae_pico() -> MaeConfig:
    """MAE for a CPU: 96-pixel images; expect minutes on 2 cores for a few thousand images.

    Twice this lr makes the third stage's outputs nearly constant, and the encoder a poor start (NOTES.md).
    """
    return MaeConfig(
        data=DataConfig(IMAGES, size=96),
        model=ModelConfig("mae_hiera_pico_96"),
        optim=OptimConfig(64, 5e-4, 64, epochs=20, warmup_epochs=2, betas=(0.9, 0.95)),
        run=PICO_RUN,
        speed=SpeedConfig(micro_batch=32),
    )


def video_mae_pico() -> MaeConfig:
    """MAE for a CPU: clips of 16 frames of 64 pixels at stride 2; on its lr see image_mae_pico."""
    return MaeConfig(
        data=DataConfig(CLIPS, size=64, frames=16, stride=2, scale=(0.5, 1.0)),
        model=ModelConfig("mae_hiera_pico_16x64"),
        optim=OptimConfig(16, 4e-4, 16, epochs=20, warmup_epochs=2, betas=(0.9, 0.95), clip_norm=1.0),
        run=PICO_RUN,
        speed=SpeedConfig(micro_batch=8),
        mask_ratio=0.75,
    )


def image_ft_pico() -> FinetuneConfig:
    """Finetuning for a CPU; pairs with image-mae-pico."""
    return FinetuneConfig(
        data=DataConfig(IMAGES, size=96, scale=(0.35, 1.0)),
        model=ModelConfig("hiera_pico_96"),
        optim=OptimConfig(32, 1e-3, 32, epochs=20, warmup_epochs=2, layer_decay=0.8, clip_norm=1.0),
        run=PICO_RUN,
        speed=SpeedConfig(micro_batch=16),
    )


def video_ft_pico() -> FinetuneConfig:
    """Finetuning for a CPU; pairs with video-mae-pico."""
    return FinetuneConfig(
        data=DataConfig(CLIPS, size=64, frames=16, stride=2, scale=(0.5, 1.0)),
        model=ModelConfig("hiera_pico_16x64"),
        optim=OptimConfig(8, 6e-4, 8, epochs=20, warmup_epochs=1, layer_decay=0.75, clip_norm=1.0),
        run=PICO_RUN,
        speed=SpeedConfig(micro_batch=8),
        smoothing=0.0,
    )


def _dashed(size: str) -> str:
    return size.replace("_", "-")


MAE_PRESETS: dict[str, MaeConfig] = {
    "image-mae-pico": image_mae_pico(),
    **{f"image-mae-{_dashed(size)}": image_mae(size) for size in IMAGE_SIZES},
    "video-mae-pico": video_mae_pico(),
    **{f"video-mae-{_dashed(size)}": video_mae(size) for size in VIDEO_SIZES},
}
FINETUNE_PRESETS: dict[str, FinetuneConfig] = {
    "image-ft-pico": image_ft_pico(),
    **{f"image-ft-{_dashed(size)}": image_ft(size) for size in IMAGE_SIZES},
    "video-ft-tiny-kinetics-reference": tiny_kinetics_reference(),
    "video-ft-pico": video_ft_pico(),
    **{f"video-ft-{_dashed(size)}": replace(video_ft(size), views=(5, 3)) for size in VIDEO_SIZES},
}
