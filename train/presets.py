"""Every recipe as a named preset: `image-mae-SIZE`, `video-mae-SIZE`, `image-ft-SIZE`, `video-ft-SIZE`.

Numbers are from the Hiera paper (arXiv 2306.00989, appendix), MAE-st and SlowFast's configurations;
docs/which.md lists them. Where the paper's numbers depend on the length of pretraining, a suffix gives it in
epochs, such as `video-ft-large-800`. `pico` is this project's own size, for CPUs and first trials; its
numbers were tuned on the demo data.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.config import Augment, DataConfig
from train.config import FinetuneConfig, MaeConfig, ModelConfig, OptimConfig, RunConfig, SpeedConfig

IMAGES, CLIPS, SSV2 = Path("shards/imagenet"), Path("shards/kinetics"), Path("shards/ssv2")
IMAGE_SIZES = ("tiny", "small", "base", "base_plus", "large", "huge")
VIDEO_SIZES = ("base", "base_plus", "large", "huge")
VIDEO_AUGMENT = Augment(layers=2, magnitude=7.0, magnitude_std=0.5)


def at_batch(batch: int, lr: float, **settings: Any) -> OptimConfig:
    """Optimizer settings whose learning rate is stated for the recipe's own batch."""
    return OptimConfig(batch=batch, lr=lr, lr_batch=batch, **settings)


def image_mae(size: str) -> MaeConfig:
    """MAE on ImageNet-1K images, paper table 14a: batch 4096, lr 8e-4, 400 epochs or `--optim.epochs 1600`.

    Drop path by size: 0 for tiny and small, 0.3 for huge, else 0.2. `--mask-ratio`: the paper's ablation at
    size large, finetuned, has 85.5 / 85.6 / 85.3 for 0.5 / 0.6 / 0.7.
    make train-mae RECIPE=image-mae-base DATA=shards/imagenet GPUS=8
    """
    drop_path = {"tiny": 0.0, "small": 0.0, "huge": 0.3}.get(size, 0.2)
    return MaeConfig(
        data=DataConfig(path=IMAGES, scale=(0.2, 1.0), interpolation="cubic"),
        model=ModelConfig(name=f"mae_hiera_{size}_224", drop_path=drop_path),
        optim=at_batch(4096, 8e-4, epochs=400, warmup_epochs=40, betas=(0.9, 0.95)),
        mask_ratio=0.6,
    )


def video_mae(size: str, epochs: int = 800) -> MaeConfig:
    """MAE on Kinetics clips, paper table 11a: batch 512 clips, lr 8e-4, 16 frames at stride 4 of 30 fps.

    Base, base-plus and large have the same numbers for 800, 1600 and 3200 epochs: the presets have 800, and
    `--optim.epochs` sets another. Huge has other numbers for each length, and none for 800: `video-mae-huge`
    is `video-mae-huge-1600`; `video-mae-huge-3200` has lr 3.2e-4 and drop path 0.4.
    A video that is opened gives 4 clips, which count as epochs: 800 are 200 passes over the videos.
    The gradient clip of 0.02 is MAE-st's and SlowFast's; the paper does not name it for Kinetics.
    `--decoder-heads 8` is the paper's text, 16 the released weights' code.
    make train-mae RECIPE=video-mae-base DATA=shards/kinetics GPUS=8
    """
    longest = size == "huge" and epochs == 3200
    drop_path = 0.4 if longest else {"base": 0.1, "huge": 0.3}.get(size, 0.2)
    lr = 3.2e-4 if longest else 8e-4
    return MaeConfig(
        data=DataConfig(path=CLIPS, frames=16, scale=(0.5, 1.0), repeats=4),
        model=ModelConfig(name=f"mae_hiera_{size}_16x224", drop_path=drop_path),
        optim=at_batch(512, lr, epochs=epochs, warmup_epochs=120, betas=(0.9, 0.95), clip_norm=0.02),
        speed=SpeedConfig(micro_batch=32),
        mask_ratio=0.9,
    )


def video_mae_ssv2() -> MaeConfig:
    """MAE of size large on Something-Something v2, paper table 12a: batch 1024 clips, lr 8e-4, 1600 epochs.

    One frame from each of 16 equal parts of a clip, and no flips. The paper names no repeated sampling here.
    make train-mae RECIPE=video-mae-ssv2-large DATA=shards/ssv2 GPUS=8
    """
    config = video_mae("large", 1600)
    return replace(
        config,
        data=replace(config.data, path=SSV2, sampling="segments", flip=0.0, repeats=1),
        optim=replace(config.optim, batch=1024, lr_batch=1024, warmup_epochs=30),
    )


def image_ft(size: str, pretrained_epochs: int = 1600) -> FinetuneConfig:
    """Finetuning on ImageNet-1K at batch 1024, paper table 14b.

    Size large depends on the length of pretraining: `image-ft-large` is for weights of 1600 epochs,
    `image-ft-large-400` for 400. Published top-1: tiny 82.8, small 83.8, base 84.5, base-plus 85.2,
    large 86.1, huge 86.9. Not in the paper but in the authors' unfinished code are random erasing
    at 0.25 (`data.augment.erase`) and the head's rate for the last block (`optim.decay_last_block`).
    make train-ft RECIPE=image-ft-base INIT=runs/image-mae-base/model.safetensors GPUS=8
    """
    shorter = size == "large" and pretrained_epochs == 400
    epochs = {"tiny": 300, "small": 200, "large": 50, "huge": 50}.get(size, 100)
    decay = {"tiny": 0.65, "small": 0.65, "large": 0.9 if shorter else 0.85, "huge": 0.85}.get(size, 0.7)
    drop_path = {"large": 0.2 if shorter else 0.1, "huge": 0.3}.get(size, 0.1)
    lr = 2e-3 if size in ("tiny", "small", "base") else 1e-3
    return FinetuneConfig(
        data=DataConfig(
            path=IMAGES,
            scale=(0.08, 1.0),
            interpolation="cubic",
            augment=Augment(layers=2, magnitude=9.0, magnitude_std=0.5),
        ),
        model=ModelConfig(name=f"hiera_{size}_224", drop_path=drop_path),
        optim=at_batch(1024, lr, epochs=epochs, warmup_epochs=5, layer_decay=decay),
        mixup=0.8,
        cutmix=1.0,
        pretrained_epochs=pretrained_epochs if size == "large" else 0,
    )


# Layer decay by the epochs of pretraining, paper table 11b. After 800 it gives none for base and base-plus.
SMALL_DECAY = {1600: 0.85, 3200: 0.8}
BIG_DECAY = {800: 0.925, 1600: 0.9, 3200: 0.875}
VIDEO_DECAY = {"base": SMALL_DECAY, "base_plus": SMALL_DECAY, "large": BIG_DECAY, "huge": BIG_DECAY}


def video_ft(size: str, pretrained_epochs: int = 3200) -> FinetuneConfig:
    """Finetuning on Kinetics-400 at batch 256 clips, paper table 11b, tested with 5 x 3 views.

    Layer decay depends on the length of pretraining: `video-ft-SIZE` is for 3200 epochs, as the released
    weights, `video-ft-SIZE-1600` for 1600, `-800` for 800 (large and huge).
    Published top-1, 15 views: base 84.0, base-plus 85.0, large 87.3, huge 87.8.
    RandAugment (7, 0.5) is the paper's. It names neither the crop area nor the number of operations, and
    follows MAE-st: area 0.08 to 1, 2 operations. Every clip that is decoded gives two augmented rows.
    As there, the side of the three spatial views is the clip's short side. For `--views 5 1`, MAE-st takes
    the center at 224 / 256 (`--data.crop 0.875`).
    make train-ft RECIPE=video-ft-base INIT=mae_hiera_base_16x224:mae_k400 DATA=shards/kinetics GPUS=8
    """
    big = size in ("large", "huge")
    return FinetuneConfig(
        data=DataConfig(
            path=CLIPS,
            frames=16,
            scale=(0.08, 1.0),
            crop=1.0,
            repeats=2,
            same_clip=True,
            augment=VIDEO_AUGMENT,
        ),
        model=ModelConfig(
            name=f"hiera_{size}_16x224", drop_path=0.3 if size == "huge" else 0.2, dropout=0.5 if big else 0.3
        ),
        optim=at_batch(
            256,
            4e-4 if size == "huge" else 8e-4,
            epochs=100 if big else 150,
            warmup_epochs=10,
            layer_decay=VIDEO_DECAY[size][pretrained_epochs],
            clip_norm=5.0,
        ),
        speed=SpeedConfig(micro_batch=16),
        mixup=0.8,
        cutmix=1.0,
        views=(5, 3),
        pretrained_epochs=pretrained_epochs,
    )


def video_ft_ssv2(frames: int = 16) -> FinetuneConfig:
    """Finetuning of size large on Something-Something v2, paper table 12b: SGD, no flips, 1 x 3 views.

    One frame from each of `frames` equal parts of a clip: 16 at batch 256, or 32 at batch 128 without mixing
    and smoothing. Nesterov momentum is SlowFast's default, the crop area MAE-st's; the paper names neither.
    The side of the views is the clip's short side, as in SlowFast.
    Published top-1: 75.1 after pretraining on SSv2, 74.7 after K400; with 32 frames 76.5.
    make train-ft RECIPE=video-ft-ssv2-large INIT=runs/video-mae-ssv2-large/model.safetensors GPUS=8
    """
    short = frames == 16
    batch, lr = (256, 0.16) if short else (128, 0.08)
    return FinetuneConfig(
        data=DataConfig(
            path=SSV2,
            frames=frames,
            sampling="segments",
            scale=(0.08, 1.0),
            crop=1.0,
            flip=0.0,
            augment=VIDEO_AUGMENT,
        ),
        model=ModelConfig(name="hiera_large_16x224", drop_path=0.1 if short else 0.2, dropout=0.5),
        optim=at_batch(
            batch, lr, epochs=40, warmup_epochs=3, name="sgd", weight_decay=1e-4, layer_decay=0.875
        ),
        speed=SpeedConfig(micro_batch=16 if short else 8),
        mixup=0.8 if short else 0.0,
        cutmix=1.0 if short else 0.0,
        smoothing=0.1 if short else 0.0,
        views=(1, 3),
    )


def tiny_kinetics_reference() -> FinetuneConfig:
    """The reference trainer's finetuning of Tiny-Kinetics-400, evaluated on the TRAINING videos as it does.

    15,000 steps of 8 clips x 10 accumulated (its own steps are micro batches of 8), AdamW at 1e-4, no
    augmentation. Training clips begin at frame 10, and evaluation starts at frame 40. It reports 0.15 from
    scratch (`--freeze none`) and 0.8575 from K400 MAE weights with the trunk frozen
    (`--model.init mae_hiera_base_16x224:mae_k400`).
    """
    return FinetuneConfig(
        data=DataConfig(
            path=CLIPS,
            frames=16,
            clip_start=10,
            eval_clip_start=40,
            eval_split="train",
            scale=(1.0, 1.0),
            ratio=(1.0, 1.0),
            flip=0.0,
        ),
        model=ModelConfig(name="hiera_base_16x224"),
        optim=at_batch(80, 1e-4, epochs=3000, warmup_epochs=0, min_lr=1e-4),
        run=RunConfig(log_every=1000, eval_every=1000),
        speed=SpeedConfig(micro_batch=8),
        freeze="trunk",
        smoothing=0.0,
    )


PICO_RUN = RunConfig(log_every=10, checkpoint_every=50)


def image_mae_pico() -> MaeConfig:
    """MAE for a CPU: 96-pixel images; expect minutes on 2 cores for a few thousand images.

    With twice this lr the last two stages collapse, and finetuning on photographs reached 58.8 % instead of
    67.0 (docs/learning.md).
    """
    return MaeConfig(
        data=DataConfig(path=IMAGES, size=96),
        model=ModelConfig(name="mae_hiera_pico_96"),
        optim=at_batch(64, 2.5e-4, epochs=20, warmup_epochs=2, betas=(0.9, 0.95)),
        run=PICO_RUN,
        speed=SpeedConfig(micro_batch=32),
    )


def video_mae_pico() -> MaeConfig:
    """MAE for a CPU: clips of 16 frames of 64 pixels at stride 2; for its lr see image_mae_pico."""
    return MaeConfig(
        data=DataConfig(path=CLIPS, size=64, frames=16, stride=2, scale=(0.5, 1.0)),
        model=ModelConfig(name="mae_hiera_pico_16x64"),
        optim=at_batch(16, 4e-4, epochs=20, warmup_epochs=2, betas=(0.9, 0.95), clip_norm=1.0),
        run=PICO_RUN,
        speed=SpeedConfig(micro_batch=8),
        mask_ratio=0.75,
    )


def image_ft_pico() -> FinetuneConfig:
    """Finetuning for a CPU; pairs with image-mae-pico."""
    return FinetuneConfig(
        data=DataConfig(path=IMAGES, size=96, scale=(0.35, 1.0)),
        model=ModelConfig(name="hiera_pico_96"),
        optim=at_batch(32, 1e-3, epochs=20, warmup_epochs=2, layer_decay=0.8, clip_norm=1.0),
        run=PICO_RUN,
        speed=SpeedConfig(micro_batch=16),
    )


def video_ft_pico() -> FinetuneConfig:
    """Finetuning for a CPU; pairs with video-mae-pico."""
    return FinetuneConfig(
        data=DataConfig(path=CLIPS, size=64, frames=16, stride=2, scale=(0.5, 1.0)),
        model=ModelConfig(name="hiera_pico_16x64"),
        optim=at_batch(8, 6e-4, epochs=20, warmup_epochs=1, layer_decay=0.75, clip_norm=1.0),
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
    **{f"video-mae-{_dashed(size)}": video_mae(size) for size in VIDEO_SIZES if size != "huge"},
    "video-mae-huge": video_mae("huge", 1600),
    **{f"video-mae-huge-{epochs}": video_mae("huge", epochs) for epochs in (1600, 3200)},
    "video-mae-ssv2-large": video_mae_ssv2(),
}
FINETUNE_PRESETS: dict[str, FinetuneConfig] = {
    "image-ft-pico": image_ft_pico(),
    **{f"image-ft-{_dashed(size)}": image_ft(size) for size in IMAGE_SIZES},
    **{f"image-ft-large-{epochs}": image_ft("large", epochs) for epochs in (400, 1600)},
    "video-ft-tiny-kinetics-reference": tiny_kinetics_reference(),
    "video-ft-pico": video_ft_pico(),
    **{f"video-ft-{_dashed(size)}": video_ft(size) for size in VIDEO_SIZES},
    **{
        f"video-ft-{_dashed(size)}-{epochs}": video_ft(size, epochs)
        for size in VIDEO_SIZES
        for epochs in VIDEO_DECAY[size]
    },
    "video-ft-ssv2-large": video_ft_ssv2(),
    "video-ft-ssv2-large-32": video_ft_ssv2(32),
}
NOT_GIVEN = {  # presets that do not exist because the paper leaves their cells empty
    "video-mae-huge-800": "the paper gives no learning rate and no drop path for 800 epochs (table 11a); use "
    "video-mae-huge-1600 or video-mae-huge-3200",
    **{
        f"video-ft-{size}-800": "the paper gives no layer decay after 800 epochs of pretraining (table 11b); "
        f"use video-ft-{size}-1600 or video-ft-{size}-3200"
        for size in ("base", "base-plus")
    },
}
