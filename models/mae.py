"""Masked autoencoder for Hiera (arXiv 2306.00989, after MAE, arXiv 2111.06377).

The encoder sees only the kept mask units. The decoder attends over all tokens of the coarsest map. Attention
does not depend on the order of tokens, so the decoder's are [kept, in unit order | masked, in spatial order].
This needs no scatter, and predictions and labels are computed only for the masked tokens.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from torch import Tensor, nn

from models.hiera import Encoder, HieraConfig
from models.layers import NORM_EPS, Block, conv, init_uniform, random_share, unit_mask
from models.unroll import FRAMES, STRIDE, UNIT, gather_cells, unroll
from pipelines.errors import UserError

VARIANCE_EPS = 1e-6


class MaeOutput(NamedTuple):
    """Result of a forward pass; M is the number of decoded tokens in the batch, P = patch**2 * channels."""

    loss: Tensor  # scalar
    pred: Tensor  # [M, P]
    label: Tensor  # [M, P]
    mask: Tensor  # bool [B, units], True = kept


class MaskedAutoencoder(Encoder):
    """Hiera encoder, multi-scale fusion, and a plain transformer decoder that predicts pixels."""

    unit_tokens: Tensor  # int64 [units, n]: spatial indices of each unit's tokens in the coarsest map

    def __init__(self, config: HieraConfig) -> None:
        super().__init__(config, pools=config.mae_pools)
        if config.mae_pools not in (2, 3):
            raise UserError(f"mae_pools is {config.mae_pools}; choose 2 or 3")
        if not 0 < config.decode_ratio <= 1:
            raise UserError(f"decode_ratio is {config.decode_ratio}; choose a share above 0 and at most 1")
        if config.decoder_heads < 1 or config.decoder_width % config.decoder_heads:
            raise UserError(
                f"decoder_heads is {config.decoder_heads}; choose a divisor of the decoder's width, "
                f"{config.decoder_width}"
            )
        dim, pools = config.decoder_width, config.mae_pools
        self.patch = STRIDE << pools  # pixels along a predicted patch's side
        side = UNIT >> pools  # tokens along a unit's side in the coarsest map
        self.grid = (self.units[0], side * self.units[1], side * self.units[2])
        self.encoder_norm = nn.LayerNorm(self.width_out, eps=NORM_EPS)
        self.multi_scale_fusion_heads = nn.ModuleList(self._fusion_heads())
        self.decoder_embed = nn.Linear(self.width_out, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid), dim))
        blocks = (Block(dim, dim, config.decoder_heads) for _ in range(config.decoder_depth))
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(dim, self.patch**2 * config.in_chans)
        tokens = torch.arange(math.prod(self.grid)).view(1, *self.grid, 1)
        self.register_buffer("unit_tokens", unroll(tokens, side.bit_length() - 1)[0, :, :, 0], False)
        self.init_weights()

    def _fusion_heads(self) -> list[nn.Module]:
        """Convolutions that bring finer stages to the coarsest map's grid and the last stage's width."""
        width, out, video, pools = self.config.width, self.width_out, self.config.video, self.config.mae_pools
        return [conv(video, width << stage, out, 1, side=1 << (pools - stage)) for stage in range(pools)]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize all parameters as the authors' release does."""
        for name, parameter in self.named_parameters():
            if "pos_embed" in name or name == "mask_token":
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            if isinstance(module, LayerScale):
                module.reset_parameters()
        for head in self.multi_scale_fusion_heads:
            init_uniform(head, "weight", "bias")
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        init_uniform(self.patch_embed.proj, "bias")

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        mask_ratio: float = 0.6,
        keep: Tensor | None = None,
        row_keys: Tensor | None = None,
    ) -> MaeOutput:
        """Predict the masked patches of images [B, C, H, W] or clips [B, C, T, H, W].

        mask: bool [B, units], True = kept; every row keeps the same number. Reading it syncs the host.
        keep: the same as sorted indices, int64 [B, kept]. It needs no sync and has a static shape.
        Without mask and keep, a random share `mask_ratio` of the units is masked.
        row_keys: int64 [B], keys of the rows' drop path and decoded tokens in training; None draws from
        torch's generator.
        The loss is the mean squared error over masked pixels, by default normalized per patch.
        """
        if keep is None:
            keep = random_keep(x, self.num_mask_units, mask_ratio) if mask is None else mask_to_keep(mask)
        kept, masked = self.split_tokens(keep)
        if self.training and self.config.decode_ratio < 1:
            # The dual masking of arXiv 2303.16727.
            masked = random_share(masked, self.config.decode_ratio, row_keys)
        pred = self.decode(self.fuse(self.encode(x, keep, row_keys)), kept, masked)
        with torch.no_grad():
            label, _, _ = self.labels(x, masked)
        loss = F.mse_loss(pred.to(label.dtype), label)
        return MaeOutput(loss, pred.flatten(0, 1), label.flatten(0, 1), unit_mask(keep, self.num_mask_units))

    def split_tokens(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Spatial indices of the coarsest tokens: kept [B, kn] in unit order, masked [B, rest] ascending."""
        kept = self.unit_tokens[keep].flatten(1)
        flags = torch.zeros(keep.shape[0], math.prod(self.grid), dtype=torch.int8, device=keep.device)
        order = flags.scatter(1, kept, 1).argsort(dim=1, stable=True)
        return kept, order[:, : order.shape[1] - kept.shape[1]]

    def fuse(self, stages: list[Tensor]) -> Tensor:
        """Sum the fused stages and the last one, and normalize: [B, kept, n, width_out]."""
        x = stages[-1]
        for head, stage in zip(self.multi_scale_fusion_heads, stages, strict=False):
            x = x + _unit_conv(stage, head, cells=x.shape[2])
        return self.encoder_norm(x)

    def decode(self, latent: Tensor, kept: Tensor, masked: Tensor) -> Tensor:
        """Predictions [B, masked, P] from the latent [B, kept units, n, width_out] and token indices."""
        x = self.decoder_embed(latent).flatten(1, 2)
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(*masked.shape, -1)], dim=1)
        x = x + F.embedding(torch.cat([kept, masked], dim=1), self.decoder_pos_embed[0])
        x = x[:, None]  # the blocks' unit axis
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, 0, kept.shape[1] :]))

    def labels(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The targets of patches `ids` [B, M]: [B, M, P]; the means and deviations that restore their pixels.

        Without `normalize_targets` the targets are the pixels, the means 0 and the deviations 1.
        """
        patches = gather_cells(self.patches(x), ids).flatten(2)
        if not self.config.normalize_targets:
            return patches, patches.new_zeros(()), patches.new_ones(())
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        deviation = (variance + VARIANCE_EPS).sqrt()
        return (patches - mean) / deviation, mean, deviation

    def patches(self, x: Tensor) -> Tensor:
        """View the target pixels as patches, [B, t, h, w, ...]: (C, s, s) for images, (s, s, C) for clips.

        The target of a clip's token is the first of its frames. Both layouts are those of the release.
        """
        x = x[:, :, ::FRAMES] if self.config.video else x.unsqueeze(2)
        x = x.unfold(3, self.patch, self.patch).unfold(4, self.patch, self.patch)  # [B, C, t, h, w, s, s]
        return x.permute(0, 2, 3, 4, 5, 6, 1) if self.config.video else x.permute(0, 2, 3, 4, 1, 5, 6)


def _unit_conv(x: Tensor, conv: nn.Module, cells: int) -> Tensor:
    """Apply a convolution whose kernel and stride are one cell to tokens in pooling order.

    x: [B, units, n, C] with n tokens in `cells` cells. In pooling order the tokens of a cell are `cells`
    apart, so the convolution is one matrix product. Returns [B, units, cells, channels out].
    """
    weight = conv.get_parameter("weight")
    side = weight.shape[-1]
    kernel = weight.reshape(*weight.shape[:2], 1, side, side).permute(0, 2, 3, 4, 1)
    x = x.unflatten(2, (side * side, cells)).transpose(2, 3).flatten(3)
    return F.linear(x, unroll(kernel, side.bit_length() - 1).flatten(1), conv.get_parameter("bias"))


def random_keep(x: Tensor, units: int, mask_ratio: float) -> Tensor:
    """Sorted indices of randomly kept units, int64 [B, int(units * (1 - mask_ratio))].

    Raises UserError if the ratio keeps no unit or all of them.
    """
    kept = int(units * (1 - mask_ratio))
    if not 0 < kept < units:
        raise UserError(
            f"mask_ratio {mask_ratio} keeps {kept} of {units} mask units; choose a larger input_size, or a "
            "ratio that keeps and hides at least 1"
        )
    noise = torch.rand(x.shape[0], units, device=x.device)
    return noise.argsort(dim=1)[:, :kept].sort(dim=1).values


def mask_to_keep(mask: Tensor) -> Tensor:
    """Sorted indices of a boolean mask's True entries, int64 [B, kept]. Syncs the host.

    Raises UserError if the rows keep different numbers of units.
    """
    counts = mask.sum(dim=1).tolist()
    if len(set(counts)) != 1:
        raise UserError(
            f"the mask's rows keep {sorted(set(counts))} units; every row must keep the same number"
        )
    return mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : counts[0]]


@torch.no_grad()
def reconstruct(model: MaskedAutoencoder, x: Tensor, keep: Tensor) -> Tensor:
    """The input with predictions in its masked patches: [B, C, H, W], or [B, C, T / 2, H, W] for clips.

    A model that predicts normalized patches gets the means and deviations of the true ones.
    """
    kept, masked = model.split_tokens(keep)
    pred = model.decode(model.fuse(model.encode(x, keep)), kept, masked)
    _, mean, deviation = model.labels(x, masked)
    patches = model.patches(x).clone(memory_format=torch.contiguous_format)
    shape = patches.shape
    flat = patches.flatten(4).flatten(1, 3)
    flat = flat.scatter(1, masked[..., None].expand_as(pred), pred.to(x.dtype) * deviation + mean)
    patches = flat.view(shape)
    if not model.config.video:
        return patches.squeeze(1).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)
