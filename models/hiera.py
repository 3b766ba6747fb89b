"""Hiera, the hierarchical vision transformer of Ryali et al. 2023 (arXiv 2306.00989).

Parameter names and initialisation are those of the authors' release, so its weights load as they are.
Shapes: x is [B, units, tokens per unit, channels] between blocks (see unroll.py).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.errors import ModelError
from models.unroll import FRAMES, STRIDE, UNIT, max_pool, reroll, take, unit_grid, unroll

KERNEL, PADDING = 7, 3  # patch embedding, in pixels; in time it is 3 frames, 1 padded in front
HALO = KERNEL - STRIDE  # pixels that a unit's tokens see above and left of the unit
NORM_EPS = 1e-6


@dataclass(frozen=True)
class HieraConfig:
    """All that decides a model's shape; the last two groups concern the classifier or the autoencoder."""

    input_size: tuple[int, ...] = (224, 224)  # (H, W), or (T, H, W) for clips
    in_chans: int = 3
    width: int = 96  # channels of the first stage; every stage doubles them
    heads: int = 1  # of the first stage; doubled likewise
    stages: tuple[int, int, int, int] = (2, 3, 16, 3)  # blocks per stage
    drop_path_rate: float = 0.0  # of the last block; rises linearly from 0
    checkpoint_stages: tuple[int, ...] = ()  # stages (1 to 4) whose activations are recomputed
    abs_win: bool = False  # absolute-window position embeddings, images only
    global_pos_size: tuple[int, int] = (14, 14)  # their global part's grid

    num_classes: int = 1000
    head_dropout: float = 0.0

    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    decode_ratio: float = 1.0  # share of the masked tokens that training decodes

    @property
    def video(self) -> bool:
        """Whether the input is clips."""
        return len(self.input_size) == 3


class Attention(nn.Module):
    """Multi-head attention inside mask units (`windowed`) or over all tokens, queries pooled on demand."""

    def __init__(
        self, dim: int, dim_out: int, heads: int, windowed: bool = False, pool: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.windowed, self.pool = heads, windowed, pool
        self.qkv = nn.Linear(dim, 3 * dim_out)
        self.proj = nn.Linear(dim_out, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, U, n, dim] -> [B, U, n or n / 4, dim_out]."""
        batch, units = x.shape[:2]
        # Four dimensions, windows in the batch: with a fifth, PyTorch leaves the fused kernels.
        windows = batch * units if self.windowed else batch
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.pool:
            q = max_pool(q)
        q, k, v = (z.reshape(windows, -1, self.heads, z.shape[-1] // self.heads) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(y.transpose(1, 2).reshape(batch, units, -1, self.proj.in_features))


class Mlp(nn.Module):
    """Two linear layers around a GELU, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; at the start of a stage it widens, and pools where the stage does."""

    def __init__(
        self,
        dim: int,
        dim_out: int,
        heads: int,
        windowed: bool = False,
        pool: bool = False,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, dim_out, heads, windowed, pool)
        self.norm2 = nn.LayerNorm(dim_out, eps=NORM_EPS)
        self.mlp = Mlp(dim_out)
        self.proj = nn.Linear(dim, dim_out) if dim != dim_out else None
        self.drop_path = DropPath(drop) if drop > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, U, n, dim] -> [B, U, n or n / 4, dim_out]."""
        y = self.norm1(x)
        if self.proj is not None:
            x = max_pool(self.proj(y)) if self.attn.pool else self.proj(y)
        x = x + self.drop_path(self.attn(y))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Overlapping convolution from pixels to tokens, computed for the kept mask units alone."""

    def __init__(self, config: HieraConfig) -> None:
        super().__init__()
        conv, kernel = (nn.Conv3d, (3, KERNEL, KERNEL)) if config.video else (nn.Conv2d, (KERNEL, KERNEL))
        self.proj = conv(config.in_chans, config.width, kernel)  # holds the parameters; see forward
        self.span, self.step = (3, FRAMES) if config.video else (1, 1)

    def forward(self, x: Tensor, keep: Tensor | None, units: tuple[int, int, int]) -> Tensor:
        """[B, C, T, H, W], keep [B, k] or None -> [B, k or all units, 64, width].

        Time taps are laid beside the channels and time steps into the batch, so that a two-dimensional
        convolution does it all.
        """
        batch = x.shape[0]
        x = F.pad(x, (0, 0, 0, 0, self.span // 2, 0)) if keep is None else self._hide(x, keep, units)
        x = x.unfold(2, self.span, self.step).permute(0, 2, 1, 5, 3, 4)  # [B, t, C, taps, H, W]
        weight = self.proj.weight.flatten(1, -3)
        if keep is None:
            x = F.conv2d(x.flatten(2, 3).flatten(0, 1), weight, self.proj.bias, STRIDE, PADDING)
            x = x.unflatten(0, (batch, -1)).permute(0, 1, 3, 4, 2)
            return unroll(x)
        side = UNIT * STRIDE
        x = x.unfold(4, side + HALO, side).unfold(5, side + HALO, side).permute(0, 1, 4, 5, 2, 3, 6, 7)
        x = take(x, keep).flatten(0, 1).flatten(1, 2)  # [B * k, C * taps, 35, 35]
        x = F.conv2d(x, weight, self.proj.bias, STRIDE)
        return unroll(x.permute(0, 2, 3, 1)[:, None]).reshape(batch, keep.shape[1], UNIT * UNIT, -1)

    def _hide(self, x: Tensor, keep: Tensor, units: tuple[int, int, int]) -> Tensor:
        """Zero the masked pixels, which would leak through the overlap, and pad in front of every axis."""
        mask = unit_mask(keep, math.prod(units)).view(-1, 1, *units)
        for axis, size in zip((2, 3, 4), x.shape[2:], strict=True):
            mask = mask.repeat_interleave(size // mask.shape[axis], dim=axis)
        return F.pad(x * mask, (HALO, 0, HALO, 0, self.span // 2, 0))


def unit_mask(keep: Tensor, units: int) -> Tensor:
    """Boolean mask [B, units], True where `keep` [B, k] lists the unit."""
    mask = torch.zeros(keep.shape[0], units, dtype=torch.bool, device=keep.device)
    return mask.scatter(1, keep, True)


class Encoder(nn.Module):
    """Patch embedding, positions and blocks: what the classifier and the autoencoder share.

    `pools` counts the poolings: after each of the first `pools` stages tokens shrink four times.
    """

    def __init__(self, config: HieraConfig, pools: int) -> None:
        super().__init__()
        self.config = config
        self.input_size = config.input_size
        self.units = unit_grid(config.input_size)
        self.mask_units = self.units if config.video else self.units[1:]
        self.num_mask_units = math.prod(self.units)
        self.patch_embed = PatchEmbed(config)
        self._add_positions()
        self.blocks = nn.ModuleList(_blocks(config, pools))
        self.width_out = config.width * 2 ** (len(config.stages) - 1)

    def _add_positions(self) -> None:
        width, (t, h, w) = self.config.width, (self.units[0], *(UNIT * n for n in self.units[1:]))
        if self.config.abs_win and self.config.video:
            raise ModelError("abs_win position embeddings exist for images only")
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
        if self.config.abs_win:  # arXiv 2311.05613: a global map, resampled, plus a tiled window
            table = F.interpolate(self.pos_embed, size=(h, w), mode="bicubic", antialias=True)
            table = (table + self.pos_embed_win.tile(self.units[1:])).permute(0, 2, 3, 1)
        elif self.config.video:
            table = self.pos_embed_spatial + self.pos_embed_temporal.transpose(0, 1)
        else:
            table = self.pos_embed
        return unroll(table.reshape(1, t, h, w, -1))[0]

    def encode(self, x: Tensor, keep: Tensor | None = None) -> list[Tensor]:
        """Output of every stage for pixels [B, C, (T), H, W]: [B, units or kept, n, channels] each.

        keep: int64 [B, k], sorted indices of the mask units to look at; None looks at all.
        Raises ModelError when the input's shape is not the model's.
        """
        if x.shape[1:] != (self.config.in_chans, *self.input_size):
            wanted = ", ".join(map(str, (self.config.in_chans, *self.input_size)))
            raise ModelError(f"this model takes inputs of shape [B, {wanted}], not {list(x.shape)}")
        x = self.patch_embed(x if self.config.video else x.unsqueeze(2), keep, self.units)
        table = self.positions()
        x = x + (table if keep is None else F.embedding(keep, table.flatten(1)).view(x.shape))
        outputs, blocks = [], iter(self.blocks)
        for stage, depth in enumerate(self.config.stages, start=1):
            recompute = self.training and stage in self.config.checkpoint_stages
            for _ in range(depth):
                block = next(blocks)
                x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            outputs.append(x)
        return outputs

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone: position embeddings and the mask token."""
        return {name for name, _ in self.named_parameters() if "pos_embed" in name or name == "mask_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layer groups for timm's layer decay: stem, one per block, then norm and head as the last."""
        return {"stem": r"^patch_embed|^pos_embed", "blocks": r"^blocks\.(\d+)"}


def _blocks(config: HieraConfig, pools: int) -> list[Block]:
    """All stages' blocks in a flat list."""
    rates = torch.linspace(0, config.drop_path_rate, sum(config.stages)).tolist()
    blocks: list[Block] = []
    for stage, depth in enumerate(config.stages):
        dim, heads = config.width * 2**stage, config.heads * 2**stage
        for number in range(depth):
            first = number == 0 and stage > 0
            # Stages 1 and 2 attend inside units, and so does the block that leaves stage 2, still unpooled.
            windowed = stage < 2 or (stage == 2 and first)
            pool = first and stage <= pools
            drop = rates[len(blocks)]
            blocks.append(Block(dim // 2 if first else dim, dim, heads, windowed, pool, drop))
    return blocks


class Head(nn.Module):
    """Dropout and the linear classifier; gives logits in training and evaluation alike."""

    def __init__(self, dim: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim] -> logits [B, classes]."""
        return self.projection(self.dropout(x))


class Hiera(Encoder):
    """Classifier of images [B, C, H, W] or clips [B, C, T, H, W]."""

    def __init__(self, config: HieraConfig) -> None:
        super().__init__(config, pools=3)
        self.norm = nn.LayerNorm(self.width_out, eps=NORM_EPS)
        self.head = Head(self.width_out, config.num_classes, config.head_dropout)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every parameter anew, as the authors' release does."""
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
        init_uniform(self.patch_embed.proj, "bias")
        for parameter in self.head.projection.parameters():
            parameter.mul_(0.001)

    def forward(self, x: Tensor, return_intermediates: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits [B, classes]; on demand also each stage's map, [B, (t), h, w, channels], in spatial order."""
        outputs = self.encode(x)
        logits = self.head(self.norm(outputs[-1].flatten(1, 2).mean(dim=1)))
        if not return_intermediates:
            return logits
        maps = [reroll(output, self.units) for output in outputs]
        return logits, maps if self.config.video else [m.squeeze(1) for m in maps]


def init_uniform(conv: nn.Module, *names: str) -> None:
    """PyTorch's own draw for convolutions, uniform within 1 / sqrt(fan in), on the named parameters."""
    bound = 1 / math.sqrt(conv.get_parameter("weight")[0].numel())
    for name in names:
        nn.init.uniform_(conv.get_parameter(name), -bound, bound)
