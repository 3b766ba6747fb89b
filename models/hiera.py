"""Hiera, the hierarchical vision transformer of Ryali et al. 2023 (arXiv 2306.00989).

Parameter names and initialization are those of the authors' release, so its weights load unchanged.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.layers import NORM_EPS, Block, PatchEmbed, drop_path_scales, dropout, init_uniform
from models.unroll import UNIT, reroll, unit_grid, unroll
from pipelines.errors import UserError


@dataclass(frozen=True)
class HieraConfig:
    """Architecture of a model. The last two groups of fields are for classifiers and for autoencoders."""

    input_size: tuple[int, ...] = (224, 224)  # (H, W), or (T, H, W) for clips
    in_chans: int = 3
    width: int = 96  # channels of the first stage; each further stage doubles them
    heads: int = 1  # of the first stage; each further stage doubles them
    stages: tuple[int, int, int, int] = (2, 3, 16, 3)  # blocks per stage
    drop_path_rate: float = 0.0  # of the last block; increases linearly from 0 at the first
    checkpoint_stages: tuple[int, ...] = ()  # stages (1 to 4) whose activations are recomputed
    abs_win: bool = False  # absolute-window position embeddings, for images only
    global_pos_size: tuple[int, int] = (14, 14)  # grid of their global part
    layer_scale: float = 0.0  # initial scale of every branch's output, per channel; 0 = no layer scale
    expand_proj: bool = True  # stages are widened by a linear layer; False: by max and mean pooling

    num_classes: int = 1000
    head_dropout: float = 0.0

    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    decode_ratio: float = 1.0  # share of the masked tokens that are decoded in training
    normalize_targets: bool = True  # of the autoencoder: each patch by its own mean and deviation
    mae_pools: int = 2  # poolings of the autoencoder; with 3 it predicts patches of 32 pixels, not 16

    @property
    def video(self) -> bool:
        """Whether the model takes clips."""
        return len(self.input_size) == 3


class Encoder(nn.Module):
    """Patch embedding, position embeddings and blocks, shared by the classifier and the autoencoder.

    pools: number of 2x2 poolings; there is one after each of the first `pools` stages.
    """

    def __init__(self, config: HieraConfig, pools: int) -> None:
        super().__init__()
        if not set(config.checkpoint_stages) <= {1, 2, 3, 4}:
            raise UserError(f"checkpoint_stages is {config.checkpoint_stages}; choose from 1, 2, 3 and 4")
        self.config = config
        self.input_size = config.input_size
        self.units = unit_grid(config.input_size)
        self.mask_units = self.units if config.video else self.units[1:]
        self.num_mask_units = math.prod(self.units)
        self.patch_embed = PatchEmbed(config.video, config.in_chans, config.width)
        self._add_positions()
        self.blocks = nn.ModuleList(_blocks(config, pools))
        self.width_out = config.width * 2 ** (len(config.stages) - 1)

    def _add_positions(self) -> None:
        width, (t, h, w) = self.config.width, (self.units[0], *(UNIT * n for n in self.units[1:]))
        if self.config.abs_win and self.config.video:
            raise UserError("abs_win position embeddings are for images only; turn abs_win off")
        if self.config.abs_win:
            self.pos_embed = nn.Parameter(torch.empty(1, width, *self.config.global_pos_size))
            self.pos_embed_win = nn.Parameter(torch.empty(1, width, UNIT, UNIT))
        elif self.config.video:
            self.pos_embed_spatial = nn.Parameter(torch.empty(1, h * w, width))
            self.pos_embed_temporal = nn.Parameter(torch.empty(1, t, width))
        else:
            self.pos_embed = nn.Parameter(torch.empty(1, h * w, width))

    def positions(self) -> Tensor:
        """Position embeddings in token order, [units, 64, width]."""
        t, h, w = self.units[0], UNIT * self.units[1], UNIT * self.units[2]
        if self.config.abs_win:  # arXiv 2311.05613: a resampled global map plus a tiled window
            table = F.interpolate(self.pos_embed, size=(h, w), mode="bicubic", antialias=True)
            table = (table + self.pos_embed_win.tile(self.units[1:])).permute(0, 2, 3, 1)
        elif self.config.video:
            table = self.pos_embed_spatial + self.pos_embed_temporal.view(t, 1, -1)
        else:
            table = self.pos_embed
        return unroll(table.reshape(1, t, h, w, -1))[0]

    def encode(self, x: Tensor, keep: Tensor | None = None, row_keys: Tensor | None = None) -> list[Tensor]:
        """The output of each stage for pixels [B, C, (T), H, W]: [B, units or kept, n, channels].

        keep: int64 [B, k], sorted indices of the mask units to encode; None encodes all.
        row_keys: int64 [B], keys of the rows' drop path in training; None draws from torch's generator.
        Raises UserError if the input does not have the model's input size.
        """
        if x.shape[1:] != (self.config.in_chans, *self.input_size):
            wanted = ", ".join(map(str, (self.config.in_chans, *self.input_size)))
            raise UserError(f"the input has shape {list(x.shape)}; this model takes [B, {wanted}]")
        x = self.patch_embed(x if self.config.video else x.unsqueeze(2), keep, self.units)
        table = self.positions()
        x = x + (table if keep is None else F.embedding(keep, table.flatten(1)).view(x.shape))
        scales: list[Tensor | None] = [None] * len(self.blocks)
        if self.training and self.config.drop_path_rate > 0:
            scales = drop_path_scales(x, self.config.drop_path_rate, len(self.blocks), row_keys)
        outputs, blocks = [], zip(self.blocks, scales, strict=True)
        for stage, depth in enumerate(self.config.stages, start=1):
            recompute = self.training and stage in self.config.checkpoint_stages
            for _ in range(depth):
                block, drop = next(blocks)
                x = checkpoint(block, x, drop, use_reentrant=False) if recompute else block(x, drop)
            outputs.append(x)
        return outputs

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: position embeddings and the mask token."""
        return {name for name, _ in self.named_parameters() if "pos_embed" in name or name == "mask_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layer groups for timm's layer decay: the stem, one per block, then norm and head together."""
        return {"stem": r"^patch_embed|^pos_embed", "blocks": r"^blocks\.(\d+)"}


def _blocks(config: HieraConfig, pools: int) -> list[Block]:
    """The blocks of all stages in one list."""
    blocks: list[Block] = []
    for stage, depth in enumerate(config.stages):
        dim, heads = config.width * 2**stage, config.heads * 2**stage
        for number in range(depth):
            first = number == 0 and stage > 0
            # Stages 1 and 2 attend inside units. So does the first block of stage 3: its keys are unpooled.
            windowed = stage < 2 or (stage == 2 and first)
            pool = first and stage <= pools
            before = dim // 2 if first else dim
            blocks.append(Block(before, dim, heads, windowed, pool, config.layer_scale, config.expand_proj))
    return blocks


class Hiera(Encoder):
    """Classifier of images [B, C, H, W] or clips [B, C, T, H, W]."""

    def __init__(self, config: HieraConfig) -> None:
        super().__init__(config, pools=3)
        self.norm = nn.LayerNorm(self.width_out, eps=NORM_EPS)
        self.head = nn.Sequential()
        self.head.projection = nn.Linear(self.width_out, config.num_classes)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize all parameters as the authors' release does."""
        for name, parameter in self.named_parameters():
            if "pos_embed" in name:
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear | nn.LayerNorm):
                nn.init.constant_(module.bias, 0.02)
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
            if isinstance(module, LayerScale):
                module.reset_parameters()
        init_uniform(self.patch_embed.proj, "bias")
        for parameter in self.head.parameters():
            parameter.mul_(0.001)

    def features(self, x: Tensor) -> Tensor:
        """The input of the head: the mean over the last stage's tokens, normalized, [B, width_out]."""
        return self._pooled(self.encode(x))

    def _pooled(self, outputs: list[Tensor]) -> Tensor:
        return self.norm(outputs[-1].flatten(1, 2).mean(dim=1))

    def forward(
        self, x: Tensor, return_intermediates: bool = False, row_keys: Tensor | None = None
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits [B, classes].

        return_intermediates: also return each stage's output in spatial order, [B, (t), h, w, C].
        row_keys: int64 [B], keys of the rows' drop path and dropout in training; None draws from torch's
        generator.
        """
        outputs = self.encode(x, row_keys=row_keys)
        pooled = self._pooled(outputs)
        if self.training and self.config.head_dropout > 0:
            pooled = dropout(pooled, self.config.head_dropout, row_keys)
        logits = self.head(pooled)
        if not return_intermediates:
            return logits
        maps = [reroll(output, self.units) for output in outputs]
        return logits, maps if self.config.video else [m.squeeze(1) for m in maps]
