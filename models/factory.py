"""Models by name: `[mae_]hiera_SIZE_224`, `[mae_]hiera_SIZE_16x224`, and the small `pico`s."""

import difflib
from dataclasses import fields, replace

from models.errors import ModelError
from models.hiera import Hiera, HieraConfig
from models.mae import MaskedAutoencoder

# width, heads of the first stage, blocks per stage (arXiv 2306.00989, table 2; pico is ours, for CPUs)
SIZES = {
    "pico": (48, 1, (1, 2, 4, 1)),
    "tiny": (96, 1, (1, 2, 7, 2)),
    "small": (96, 1, (1, 2, 11, 2)),
    "base": (96, 1, (2, 3, 16, 3)),
    "base_plus": (112, 2, (2, 3, 16, 3)),
    "large": (144, 2, (2, 6, 36, 4)),
    "huge": (256, 4, (2, 6, 36, 4)),
}
CLASSIFIER_ONLY = {"num_classes", "head_dropout"}
DECODER_ONLY = {"decoder_width", "decoder_depth", "decoder_heads", "decode_ratio"}


def _configs() -> dict[str, HieraConfig]:
    configs = {}
    for size, (width, heads, stages) in SIZES.items():
        pico = size == "pico"
        image = HieraConfig((96, 96) if pico else (224, 224), 3, width, heads, stages)
        if pico:
            image = replace(image, decoder_width=128, decoder_depth=2, decoder_heads=4)
        video = replace(image, input_size=(16, 64, 64) if pico else (16, 224, 224), num_classes=400)
        configs[f"hiera_{size}_{image.input_size[-1]}"] = image
        configs[f"hiera_{size}_16x{video.input_size[-1]}"] = video
    return configs


CONFIGS = _configs()


def list_models() -> list[str]:
    """All names that `create` knows: classifiers, then autoencoders."""
    return [*CONFIGS, *(f"mae_{name}" for name in CONFIGS)]


def create(name: str, **overrides: object) -> Hiera | MaskedAutoencoder:
    """Build a model with random weights.

    overrides: fields of HieraConfig, such as input_size (an int is the side of a square; frames stay),
    num_classes, in_chans, drop_path_rate, head_dropout; None leaves the default.
    Raises ModelError on an unknown name or setting and on a size that cannot be cut into mask units.
    """
    config = config_of(name, **overrides)
    return MaskedAutoencoder(config) if name.startswith("mae_") else Hiera(config)


def config_of(name: str, **overrides: object) -> HieraConfig:
    """The configuration that `create` would build; same arguments, same errors."""
    if name not in list_models():
        raise ModelError(f"there is no model {name!r}{_closest(name, list_models())}")
    config = CONFIGS[name.removeprefix("mae_")]
    given = {key: value for key, value in overrides.items() if value is not None}
    unfit = CLASSIFIER_ONLY if name.startswith("mae_") else DECODER_ONLY
    allowed = sorted({field.name for field in fields(HieraConfig)} - unfit)
    for key in given:
        if key not in allowed:
            raise ModelError(f"{name} has no setting {key!r}{_closest(key, allowed)}")
    if "input_size" in given:
        given["input_size"] = _full_size(given["input_size"], config.input_size)
    return replace(config, **given)  # pyrefly: ignore


def _full_size(size: object, default: tuple[int, ...]) -> tuple[int, ...]:
    """Complete an input size: an int is the side of a square, with the default's frames."""
    full = (*default[:-2], size, size) if isinstance(size, int) else tuple(size)  # pyrefly: ignore
    if len(full) != len(default):
        axes = "(T, H, W)" if len(default) == 3 else "(H, W)"
        raise ModelError(f"this model's input_size is a side or {axes}, not {size}")
    return full


def _closest(word: str, known: list[str]) -> str:
    """A hint to append to an error: the closest known word, or all."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
