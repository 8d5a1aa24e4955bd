"""Choose the fused attention kernel: those of torch, or those of packages that are installed.

No GPU has run the packages' kernels here yet. Tests hold the calls to stand-ins of the packages.

Shapes: B batch, T query tokens, S keys, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Kernel = Literal["auto", "sdpa", "cudnn", "flash", "flash3", "flash4", "sage"]


class Package(NamedTuple):
    """An attention kernel of a package.

    Attributes:
        module: Module with the function.
        function: Name of the function, which takes (B, S, H, D).
        scale: Name of its argument for the factor of the logits.
        widest: Largest head dim.
        capability: Least compute capability of the GPU.
        options: Further arguments.
    """

    module: str
    function: str
    scale: str
    widest: int
    capability: tuple[int, int]
    options: dict[str, Any]


PACKAGES: dict[str, Package] = {
    "flash": Package("flash_attn", "flash_attn_func", "softmax_scale", 256, (8, 0), {}),
    "flash3": Package("flash_attn_interface", "flash_attn_func", "softmax_scale", 256, (9, 0), {}),
    "flash4": Package("flash_attn.cute", "flash_attn_func", "softmax_scale", 128, (9, 0), {}),
    "sage": Package("sageattention", "sageattn", "sm_scale", 128, (8, 0), {"tensor_layout": "NHD"}),
}
# SageAttention rounds queries and keys to 8 bits, so it is never chosen unasked. FlashAttention-2
# is torch's own flash kernel.
CHOSEN_BY_AUTO = ("flash4", "flash3")
# cuDNN is the fastest of torch's kernels from Hopper on.
HOPPER = (9, 0)
TORCH_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def is_installed(kernel: str) -> bool:
    """Whether the package of a kernel is here; torch's own kernels always are."""
    if kernel not in PACKAGES:
        return True
    try:
        return find_spec(PACKAGES[kernel].module) is not None
    except ModuleNotFoundError:  # the package above a module is not here
        return False


def choose(kernel: Kernel, capability: tuple[int, int] | None, itemsize: int, width: int) -> str:
    """Name the kernel that computes an attention: `sdpa`, `cudnn` or a package's.

    A kernel that does not take the numbers or the GPU gives way to torch's choice.

    Args:
        kernel: What was asked for.
        capability: Compute capability of the GPU; None for a CPU.
        itemsize: Bytes of a number.
        width: Head dim.
    """
    if capability is None or itemsize != 2:
        return "sdpa"
    named = CHOSEN_BY_AUTO if kernel == "auto" else (kernel,)
    for name in named:
        package = PACKAGES.get(name)
        takes = package and capability >= package.capability and width <= package.widest
        if takes and is_installed(name):
            return name
    asked = kernel == "cudnn" or (kernel == "auto" and capability >= HOPPER)
    return "cudnn" if asked else "sdpa"


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, kernel: Kernel) -> Tensor:
    """Softmax attention of queries (B, T, H, D) to keys and values (B, S, H, D): (B, T, H, D).

    Args:
        q: Queries.
        k: Keys.
        v: Values, of the width of keys.
        scale: Factor of the logits, 1/sqrt(D) by default.
        kernel: The kernel to prefer.
    """
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    chosen = choose(kernel, capability, q.dtype.itemsize, q.shape[-1])
    if chosen in PACKAGES:
        return from_package(PACKAGES[chosen], q, k, v, scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if chosen == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    with sdpa_kernel(TORCH_KERNELS, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def from_package(package: Package, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """The attention by a package's kernel; arguments as in `fused_attention`."""
    call: Callable[..., Any] = getattr(import_module(package.module), package.function)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    result = call(q, k, v, **{package.scale: scale}, **package.options)
    # Some releases return the sums of exponentials as well.
    return result[0] if isinstance(result, tuple) else result
