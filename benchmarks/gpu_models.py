"""The checks of `make gpu-check` on augmentations and models: the device compared with the CPU."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_place import Place, need
from models.mae import MaskedAutoencoder

# What training uses by default. cuDNN's attention, which it does not use, is a check of its own.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
MODELS = ("mae_hiera_pico_96", "hiera_pico_16x64", "mae_hiera_base_224")


def augmentations(place: Place) -> str:
    """Every operation of RandAugment has the CPU's pixels."""
    from pipelines import augment

    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (16, 4, 64, 64, 3), dtype=torch.uint8)
    level, sign = np.linspace(0.05, 1, 16), np.where(np.arange(16) % 2, 1.0, -1.0)
    worst = {}
    for name, (operation, strength) in augment.OPERATIONS.items():
        values = torch.from_numpy(strength(level, sign).astype(np.float32)).view(-1, 1, 1, 1, 1)
        one, other = (operation(pixels.to(d), values.to(d)).cpu().int() for d in ("cpu", place.device))
        worst[name] = ((one - other).abs() > 1).float().mean().item()
    bad = [f"{name} {share:.2%}" for name, share in worst.items() if share > 0.001]
    need(not bad, f"share of values that differ by more than a level: {', '.join(bad)}")
    return f"{len(worst)} operations, at most {max(worst.values()):.3%} of the values differ"


# ---- models


def loss_and_norm(model: nn.Module, x: Tensor, bf16: bool) -> tuple[float, float]:
    """Loss and gradient norm of one forward and backward."""
    rows = len(x)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        if isinstance(model, MaskedAutoencoder):
            keep = torch.arange(model.num_mask_units // 3, device=x.device).expand(rows, -1).contiguous()
            loss = model(x, keep=keep).loss
        else:
            loss = model(x).float().logsumexp(1).mean()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf")).item()
    model.zero_grad()
    return loss.item(), norm


def compare_models(
    place: Place, bf16: bool, backend: SDPBackend | None = None, compiled: bool = False
) -> str:
    """Compare loss and gradient norm with the CPU's in fp32."""
    from models import create

    torch.backends.cudnn.allow_tf32 = False
    loss_limit, norm_limit = (2e-2, 5e-2) if bf16 else (1e-3, 5e-3)
    texts = []
    for name in MODELS if place.gpu else MODELS[:2]:
        torch.manual_seed(0)
        model = create(name).eval()  # without dropping
        x = torch.randn(2, 3, *model.config.input_size)
        wanted, norm = loss_and_norm(model, x, bf16=False)
        model = model.to(place.device)
        if compiled:
            model.compile(fullgraph=True)
        with sdpa_kernel(backend or ATTENTION):
            found, found_norm = loss_and_norm(model, x.to(place.device), bf16)
        apart, norm_apart = abs(found / wanted - 1), abs(found_norm / norm - 1)
        need(
            apart < loss_limit and norm_apart < norm_limit,
            f"{name}: loss {found:.4f}, not {wanted:.4f}; gradient norm {found_norm:.4f}, not {norm:.4f}",
        )
        texts.append(f"{name} {apart:.1e}")
    return "relative difference of the loss: " + ", ".join(texts)


def models_fp32(place: Place) -> str:
    """fp32: the CPU's loss and gradient norm."""
    return compare_models(place, bf16=False)


def models_bf16(place: Place) -> str:
    """bf16 autocast: nearly the CPU's fp32 loss and gradient norm."""
    return compare_models(place, bf16=True)


def attention_flash(place: Place) -> str:
    """bf16 with flash attention."""
    return compare_models(place, bf16=True, backend=SDPBackend.FLASH_ATTENTION)


def attention_efficient(place: Place) -> str:
    """bf16 with memory-efficient attention."""
    return compare_models(place, bf16=True, backend=SDPBackend.EFFICIENT_ATTENTION)


def attention_cudnn(place: Place) -> str:
    """bf16 with cuDNN's attention. Training does not need it."""
    return compare_models(place, bf16=True, backend=SDPBackend.CUDNN_ATTENTION)


def models_compiled(place: Place) -> str:
    """bf16, compiled as one graph."""
    return compare_models(place, bf16=True, compiled=True)


def random_draws(place: Place) -> str:
    """Drop path, dropout and the decoded share draw the CPU's numbers, eager and compiled."""
    from models import layers

    def drawn(keys: Tensor) -> list[Tensor]:
        ones, ids = keys.new_ones(len(keys), 1024).float(), torch.arange(300, device=keys.device)
        scales = layers.drop_path_scales(ones, 0.2, 24, keys)[1:]
        share = layers.random_share(ids.expand(len(keys), -1), 0.5, keys)
        return [*(scale for scale in scales if scale is not None), layers.dropout(ones, 0.1, keys), share]

    keys = torch.arange(8) * 123_456_789_012_345
    wanted = drawn(keys)
    for name, function in (("eager", drawn), ("compiled", torch.compile(drawn, fullgraph=True))):
        found = [part.cpu() for part in function(keys.to(place.device))]
        # Compiled code may multiply by 1 / (1 - rate), which rounds differently.
        wrong = sum(not torch.allclose(a, b, rtol=1e-6, atol=0) for a, b in zip(found, wanted, strict=True))
        need(wrong == 0, f"{name}: {wrong} of {len(wanted)} tensors differ from the CPU's")
    return f"{len(wanted)} tensors are those of the CPU"
