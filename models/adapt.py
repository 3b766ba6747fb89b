"""Fitting weights to a model of another input: inflation to clips, resampled position embeddings."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import ModelError
from models.formats import State, is_video
from models.hiera import Encoder
from models.mae import PATCH, MaskedAutoencoder
from models.unroll import UNIT, Grid


def inflate(state: State, model: Encoder) -> tuple[State, list[str]]:
    """Turn an image model's weights into a clip model's; gives them and the names that changed.

    A clip that stands still is to look like its image: the patch kernel is spread evenly over its three
    frames (arXiv 1705.07750), every time step has the image's positions, temporal embeddings are zero.
    """
    if is_video(state) or not model.config.video or "pos_embed" not in state:
        return state, []
    state, steps = dict(state), model.units[0]
    kernel = state["patch_embed.proj.weight"]
    new = {"patch_embed.proj.weight": kernel.unsqueeze(2).expand(-1, -1, 3, -1, -1) / 3}
    new["pos_embed_spatial"] = state.pop("pos_embed")
    new["pos_embed_temporal"] = torch.zeros(1, steps, len(kernel))
    if "decoder_pos_embed" in state:
        new["decoder_pos_embed"] = state["decoder_pos_embed"].repeat(1, steps, 1)
        # Images are predicted as (channel, row, column), clips as (row, column, channel).
        for name in ("decoder_pred.weight", "decoder_pred.bias"):
            new[name] = state[name].unflatten(0, (-1, PATCH * PATCH)).transpose(0, 1).flatten(0, 1)
    for name in state:
        if name.startswith("multi_scale_fusion_heads.") and name.endswith("weight"):
            new[name] = state[name].unsqueeze(2)
    return state | new, list(new)


def resample_positions(state: State, model: Encoder) -> tuple[State, list[str]]:
    """Resample position embeddings to the model's grid: bicubic in space, linear in time.

    Gives the weights and the names that changed. Raises ModelError when a source grid is not square.
    """
    own, state = model.state_dict(), dict(state)
    steps = state["pos_embed_temporal"].shape[1] if is_video(state) else 1
    t, h, w = model.units
    grids: dict[str, tuple[int, Grid]] = {  # time steps there, grid here
        "pos_embed": (1, (1, h * UNIT, w * UNIT)),
        "pos_embed_spatial": (1, (1, h * UNIT, w * UNIT)),
        "pos_embed_temporal": (steps, (t, 1, 1)),
    }
    if isinstance(model, MaskedAutoencoder):
        grids["decoder_pos_embed"] = (steps, model.grid)
    changed = [n for n in grids if n in state and n in own and state[n].shape != own[n].shape]
    for name in changed:
        if state[name].ndim != own[name].ndim:
            raise ModelError("absolute-window and plain position embeddings cannot replace one another")
        if own[name].ndim == 4:
            state[name] = F.interpolate(state[name], own[name].shape[2:], mode="bicubic", antialias=True)
        else:
            state[name] = resample(state[name], *grids[name])
    return state, changed


def resample(table: Tensor, steps: int, grid: Grid) -> Tensor:
    """[1, steps * side * side, C] -> [1, t * h * w, C] for grid (t, h, w)."""
    side = math.isqrt(table.shape[1] // steps)
    if steps * side * side != table.shape[1]:
        raise ModelError(f"position embeddings for {table.shape[1]} tokens belong to no square input")
    x = table[0].float().unflatten(0, (steps, side, side)).permute(0, 3, 1, 2)
    if (side, side) != grid[1:]:
        x = F.interpolate(x, grid[1:], mode="bicubic", antialias=True)
    if steps != grid[0]:
        channels = x.shape[1]
        x = x.flatten(1).T[None]  # [1, C * h * w, t]
        x = F.interpolate(x, grid[0], mode="linear")[0].T.unflatten(1, (channels, *grid[1:]))
    return x.permute(0, 2, 3, 1).reshape(1, -1, table.shape[2]).to(table.dtype)
