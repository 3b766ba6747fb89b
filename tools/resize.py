"""Scale pictures with torch's kernel, without the import of torch.

The import takes 3 seconds, the library of its kernels 0.3. The kernel is called through torch's stable C
interface: torch/csrc/stable/c/shim.h.
"""

import ctypes
from ctypes import c_int64, c_size_t, c_uint64, c_void_p
from importlib.util import find_spec
from pathlib import Path

import numpy as np

VERSION = 2 << 56 | 10 << 48  # of the interface: torch 2.10
_PACKAGE = find_spec("torch")
assert _PACKAGE is not None and _PACKAGE.origin is not None
_TORCH = ctypes.CDLL(str(Path(_PACKAGE.origin).parent / "lib/libtorch_cpu.so"))


def bicubic(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [height, width, 1 or 4], scaled to (width, height): bicubic, antialiased.

    It takes a sixth of the time of Pillow and differs by at most 2 levels.
    """
    out = np.empty((size[1], size[0], pixels.shape[2]), np.uint8)
    shape = c_void_p()
    _check(_TORCH.torch_new_list_reserve_size(c_size_t(2), ctypes.byref(shape)))
    for side in out.shape[:2]:
        _check(_TORCH.torch_list_push_back(shape, c_uint64(side)))
    # self, output_size, align_corners, scales_h, scales_w, out; the call frees the first two and the last
    arguments = (c_uint64 * 6)(_planes(pixels), shape.value, 0, 0, 0, _planes(out))
    version = c_uint64(VERSION)
    _check(_TORCH.torch_call_dispatcher(b"aten::_upsample_bicubic2d_aa", b"out", arguments, version))
    _check(_TORCH.aoti_torch_delete_tensor_object(c_void_p(arguments[0])))  # the result, which is `out`
    return out


def use_one_thread() -> None:
    """Scale in one thread from now on: without AVX2, the kernel uses several."""
    _TORCH.omp_set_num_threads(1)


def _planes(pixels: np.ndarray) -> int | None:
    """The address of a new tensor [1, channels, height, width] of the same memory."""
    height, width, channels = pixels.shape
    sizes = (c_int64 * 4)(1, channels, height, width)
    strides = (c_int64 * 4)(pixels.size, 1, width * channels, channels)
    made, place, dtype = c_void_p(), c_void_p(pixels.ctypes.data), _TORCH.aoti_torch_dtype_uint8()
    none, cpu = c_int64(0), _TORCH.aoti_torch_device_type_cpu()
    _check(
        _TORCH.aoti_torch_create_tensor_from_blob(
            place, c_int64(4), sizes, strides, none, dtype, cpu, 0, ctypes.byref(made)
        )
    )
    return made.value


def _check(code: int) -> None:
    """Raise `RuntimeError` if a function of torch failed; it has printed the reason."""
    if code:
        raise RuntimeError("torch's kernel for scaling failed")
