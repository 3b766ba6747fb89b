"""Every setting: frozen dataclasses that check their values.

On resume, settings in FREE may change, those in FIXED never, all others only if run.allow names them.
"""

import dataclasses
import difflib
import json
import operator
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipelines.config import ABOVE_0, ANY, BELOW_1, DataConfig, DecodeConfig, check_range, check_settings
from pipelines.errors import UserError

SEED = (1 << 63) - 1  # the largest


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which Hiera."""

    name: str = "hiera_base_224"
    """A name from `python -m models.zoo`."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block, rising linearly from 0."""
    dropout: float = 0.0
    """Dropout before the classifier's last layer."""
    abs_win: bool = False
    """Absolute-window position embeddings (arXiv 2311.05613), images only. Models named abswin always have
    them."""
    checkpoint_stages: tuple[int, ...] = ()
    """Stages (1 to 4) with activation checkpointing (recomputation): less memory, about a third slower."""
    init: str = ""
    """Starting weights: a file, an official name such as mae_hiera_base_16x224:mae_k400, or empty for random
    ones. This is a warm start; to resume a run, repeat its command."""
    reuse_encoder_norm: bool = False
    """A classifier's final norm starts from the autoencoder's (as in timm), not from initial values (as the
    authors do)."""

    def __post_init__(self) -> None:
        check_settings(self, "model.", drop_path=(0, BELOW_1), dropout=(0, BELOW_1))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, warmup, cosine. The batch is global: all processes and accumulation together."""

    batch: int = 1024
    """Samples per optimizer step over all processes; clips are the unit for video."""
    lr: float = 1e-3
    """Learning rate at `lr_batch`; the run scales it linearly to `batch` and prints the result."""
    lr_batch: int = 1024
    """The batch to which `lr` refers."""
    epochs: float = 100.0
    warmup_epochs: float = 5.0
    name: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd with `momentum` and `nesterov`."""
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    """Learning rate factor from each layer to the one before it; the head has 1."""
    decay_last_block: bool = True
    """True: the last block has one factor (MAE, SlowFast). False: the head's rate (the authors' draft)."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.9999; 0 = none. If set, the average is
    evaluated and exported."""
    clip_norm: float = 0.0
    """Clip gradients to this norm; 0 = never."""
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        ranges = dict.fromkeys(("lr", "min_lr", "warmup_epochs", "weight_decay", "clip_norm"), (0, ANY))
        ranges |= {"epochs": (ABOVE_0, ANY), "layer_decay": (ABOVE_0, 1), "momentum": (0, BELOW_1)}
        check_settings(self, "optim.", batch=(1, ANY), lr_batch=(1, ANY), ema=(0, BELOW_1), **ranges)
        for name, beta in zip(("first", "second"), self.betas, strict=True):
            check_range(f"optim.betas' {name}", beta, (0, BELOW_1))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where results go and how often."""

    name: str = ""
    """Folder name under `root`; empty = the preset's name."""
    root: Path = Path("runs")
    seed: int = 0
    log_every: int = 20
    """Steps between metric rows."""
    eval_every: int = 0
    """Steps between evaluations on the validation split; 0 = once per epoch, but at least 10 and at most 100
    times per run. The last step is always evaluated."""
    patience: int = 0
    """End the run after this number of evaluations without improvement; 0 = never."""
    checkpoint_every: int = 500
    """Steps between checkpoints: a crash costs at most that many."""
    keep: int = 2
    """How many checkpoints are kept; the best weights are kept in best.safetensors."""
    allow: tuple[str, ...] = ()
    """Settings that may differ from the run's on resume, such as optim.epochs; `data` for other shards."""
    detail: bool = False
    """Also write every step of every process to detail/rank-N.csv."""
    track: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Live trackers: any of tensorboard, wandb, mlflow, trackio."""
    max_skipped: int = 10
    """Stop after this number of consecutive non-finite steps, at least 1."""

    def __post_init__(self) -> None:
        counts = ("log_every", "checkpoint_every", "keep", "max_skipped")
        ranges = {**dict.fromkeys(counts, (1, ANY)), "eval_every": (0, ANY), "patience": (0, ANY)}
        check_settings(self, "run.", **ranges, seed=(0, SEED))
        parts = self.name.split("/")
        # An absolute path starts with an empty part. make passes the name through a shell.
        if self.name and ({"", ".", ".."} & set(parts) or re.search(r"[\s'\"]", self.name)):
            raise UserError(
                f"run.name is '{self.name}'; it must name a folder below {self.root}, without spaces or "
                "quotes"
            )
        if (longest := max(len(os.fsencode(part)) for part in parts)) > 255:
            raise UserError(f"run.name has a part of {longest} bytes; choose parts of at most 255 bytes")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.root / self.name


@dataclass(frozen=True, kw_only=True)
class SpeedConfig(DecodeConfig):
    """How it is computed. Nothing here changes what is computed, rounding apart."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto (CUDA when there is one), cuda or cpu."""
    processes: int = 1
    """Processes to start on this machine, one per GPU. Leave it at 1 under torchrun."""
    restarts: int = 0
    """How often the processes of this machine are started again after one of them failed."""
    timeout: float = 600.0
    """Seconds that a process waits for the others before it gives up, for example if one of them hangs."""
    micro_batch: int = 64
    """Samples per process per forward; gradients accumulate up to optim.batch."""
    eval_batch: int = 0
    """Views (images, or clips) per process per evaluation step; 0 = micro_batch."""
    precision: Literal["auto", "bf16", "fp32", "tf32"] = "auto"
    """auto (bf16 autocast on CUDA, fp32 on the CPU), bf16, fp32 or tf32."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """torch.compile: auto (on CUDA), yes or no."""
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = "auto"
    """Attention on CUDA: auto (flash, or efficient where flash cannot), flash, efficient, cudnn or math."""
    deterministic: bool = False
    """Kernels without atomic adds on CUDA, slower: the same inputs then give the same step."""
    profile: str = ""
    """First and last step to profile, such as 10:15; empty = none. The files are in the run's profile/."""

    @property
    def profiled(self) -> range:
        """The steps that `profile` names; raises UserError if it is malformed."""
        found = re.fullmatch(r"(\d+):(\d+)", self.profile, re.ASCII)
        first, last = map(int, found.groups()) if found else (0, 0)
        if self.profile and not 1 <= first <= last:
            raise UserError(
                f"speed.profile is '{self.profile}'; give the first and the last step, such as 10:15"
            )
        return range(first, last + 1) if found else range(0)

    def __post_init__(self) -> None:
        super().__post_init__()
        assert isinstance(self.profiled, range)
        check_settings(
            self, "speed.", micro_batch=(1, ANY), eval_batch=(0, ANY), timeout=(1, ANY), restarts=(0, ANY)
        )


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups of settings that both kinds of training have."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)


@dataclass(frozen=True, kw_only=True)
class MaeConfig(Groups):
    """Masked-autoencoder pretraining."""

    mask_ratio: float = 0.6
    """Share of mask units hidden."""
    decode_ratio: float = 1.0
    """Share of the masked tokens that training decodes (dual masking, arXiv 2303.16727); 1 = the paper."""
    normalize_targets: bool = True
    """Predict pixels that are normalized per patch (norm_pix_loss in MAE); False: raw pixels."""
    decoder_heads: int = 0
    """0 = the model's own: 16, as released; the paper says 8 for video."""
    health: bool = True
    """Measure the features of every stage at each evaluation, and warn if a stage collapses."""

    def __post_init__(self) -> None:
        check_settings(self, "", mask_ratio=(0, 1), decoder_heads=(0, ANY))


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Groups):
    """Supervised finetuning."""

    freeze: Literal["none", "trunk"] = "none"
    """none, or trunk: only the last norm and the head are trained (a linear probe)."""
    smoothing: float = 0.1
    """Label smoothing."""
    mixup: float = 0.0
    """Beta parameter of mixup; 0 = off."""
    cutmix: float = 0.0
    """Beta parameter of cutmix; 0 = off. A clip's box is the same in every frame."""
    views: tuple[int, int] = (1, 1)
    """Temporal x spatial views averaged per clip in evaluation."""
    pretrained_epochs: int = 0
    """Pretraining epochs for which the recipe's hyperparameters are; the run warns if its starting weights
    had another number. 0 = any."""

    def __post_init__(self) -> None:
        check_settings(self, "", smoothing=(0, BELOW_1), mixup=(0, ANY), cutmix=(0, ANY))
        check_range("views", min(self.views), (1, ANY))


Config = MaeConfig | FinetuneConfig
KINDS: dict[str, type] = {"mae": MaeConfig, "finetune": FinetuneConfig}


def hint(word: str, known: typing.Iterable[str]) -> str:
    """A suffix that names the known word most like this one, empty if none is."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def to_dict(config: Config) -> dict:
    """The resolved configuration as JSON-ready values, with its kind ("mae" or "finetune")."""
    kind = next(name for name, cls in KINDS.items() if cls is type(config))
    return {"kind": kind, **json.loads(json.dumps(dataclasses.asdict(config), default=str))}


def from_dict(values: Mapping) -> Config:
    """The inverse of `to_dict`; ignores settings that no longer exist."""
    if values.get("protocol"):  # of an older version: the reference trainer's, now ordinary settings
        data = {**values["data"], "clip_start": 10, "eval_clip_start": 40, "eval_split": "train"}
        values = {**values, "data": data}
    return _build(KINDS[values["kind"]], values)


def _build(cls: type, values: Mapping) -> typing.Any:
    hints = typing.get_type_hints(cls)
    known = [f for f in dataclasses.fields(cls) if f.name in values]
    return cls(**{f.name: _coerce(hints[f.name], values[f.name]) for f in known})


def _coerce(hint: typing.Any, value: typing.Any) -> typing.Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value)
    convert = {tuple: tuple, Path: Path, int: operator.index}.get(typing.get_origin(hint) or hint)
    return convert(value) if convert else value


def flatten(values: Mapping, prefix: str = "") -> dict[str, object]:
    """Nested settings as {"optim.lr": 0.1, ...}."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# Settings that may change on resume, because they do not change the result.
FREE = (
    "speed.", "run.name", "run.root", "run.keep", "run.allow", "run.detail", "run.log_every",
    "run.eval_every", "run.patience", "run.checkpoint_every", "run.max_skipped", "run.track", "data.max_bad",
    "data.path", "health",
)  # fmt: skip
# Settings that never change within a run, not even with run.allow: its checkpoints would not fit.
FIXED = (
    "kind", "data.eval_split", "model.name", "model.abs_win", "model.init", "model.reuse_encoder_norm",
    "data.size", "data.frames", "data.repeats", "optim.name", "optim.batch", "decoder_heads",
)  # fmt: skip
# Settings of a machine: they may differ between the processes of a run.
LOCAL = ("run.root", "data.path", "speed.device", "speed.threads", "speed.hw_decoder_load", "speed.decode")


def shared_settings(config: Config) -> dict[str, object]:
    """The settings that must be equal in all processes of a run."""
    return {key: value for key, value in flatten(to_dict(config)).items() if key not in LOCAL}


def differences(old: Config, new: Config) -> dict[str, str]:
    """The settings that change results and differ, as {"optim.lr": "0.1 -> 0.2"}."""
    before, after = flatten(to_dict(old)), flatten(to_dict(new))
    keys = [key for key in sorted(before.keys() | after.keys()) if not key.startswith(FREE)]
    return {k: f"{before.get(k)} -> {after.get(k)}" for k in keys if before.get(k) != after.get(k)}


def refused_changes(old: Config | None, new: Config) -> tuple[dict[str, str], dict[str, str]]:
    """The differences that no run allows, and those that `new` does not allow; none without an `old`.

    Raises UserError if run.allow names a setting that does not exist.
    """
    known = {"data", *flatten(to_dict(new))}
    allowed = {name.lstrip("-").replace("-", "_") for name in new.run.allow}
    for name in sorted(allowed - known):
        raise UserError(f"run.allow names '{name}', which is not a setting{hint(name, known)}")
    changed = differences(old, new) if old else {}
    fixed = {key: change for key, change in changed.items() if key in FIXED}
    return fixed, {key: change for key, change in changed.items() if key not in allowed}
