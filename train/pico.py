"""Recipes of size pico, for CPUs and first trials; the numbers were tuned on the demo data."""

from pathlib import Path

from train.config import (
    DataConfig,
    FinetuneConfig,
    MaeConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SpeedConfig,
)

IMAGES, CLIPS = Path("shards/imagenet"), Path("shards/kinetics")
PICO_RUN = RunConfig(log_every=10, eval_every=100, checkpoint_every=50)


def image_mae_pico() -> MaeConfig:
    """MAE for a CPU: 96-pixel images; expect minutes on 2 cores for a few thousand images.

    Twice this lr makes the third stage's outputs nearly constant, and the encoder a poor start (NOTES.md).
    """
    return MaeConfig(
        data=DataConfig(path=IMAGES, size=96),
        model=ModelConfig("mae_hiera_pico_96"),
        optim=OptimConfig(64, 5e-4, 64, epochs=20, warmup_epochs=2, betas=(0.9, 0.95)),
        run=PICO_RUN,
        speed=SpeedConfig(micro_batch=32),
    )


def video_mae_pico() -> MaeConfig:
    """MAE for a CPU: clips of 16 frames of 64 pixels at stride 2; on its lr see image_mae_pico."""
    return MaeConfig(
        data=DataConfig(path=CLIPS, size=64, frames=16, stride=2, scale=(0.5, 1.0)),
        model=ModelConfig("mae_hiera_pico_16x64"),
        optim=OptimConfig(16, 4e-4, 16, epochs=20, warmup_epochs=2, betas=(0.9, 0.95), clip_norm=1.0),
        run=PICO_RUN,
        speed=SpeedConfig(micro_batch=8),
        mask_ratio=0.75,
    )


def image_ft_pico() -> FinetuneConfig:
    """Finetuning for a CPU; pairs with image-mae-pico."""
    return FinetuneConfig(
        data=DataConfig(path=IMAGES, size=96, scale=(0.35, 1.0)),
        model=ModelConfig("hiera_pico_96"),
        optim=OptimConfig(32, 1e-3, 32, epochs=20, warmup_epochs=2, layer_decay=0.8, clip_norm=1.0),
        run=PICO_RUN,
        speed=SpeedConfig(micro_batch=16),
    )


def video_ft_pico() -> FinetuneConfig:
    """Finetuning for a CPU; pairs with video-mae-pico."""
    return FinetuneConfig(
        data=DataConfig(path=CLIPS, size=64, frames=16, stride=2, scale=(0.5, 1.0)),
        model=ModelConfig("hiera_pico_16x64"),
        optim=OptimConfig(8, 6e-4, 8, epochs=20, warmup_epochs=1, layer_decay=0.75, clip_norm=1.0),
        run=PICO_RUN,
        speed=SpeedConfig(micro_batch=8),
        smoothing=0.0,
    )
