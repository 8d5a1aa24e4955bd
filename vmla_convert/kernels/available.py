"""Where the Triton kernels run."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
FUSED = {"enable_fp_fusion": True}
"""Compile option of all kernels: a product and a sum are one instruction."""


def runs_kernels(x: Tensor) -> bool:
    """Whether a kernel can take a tensor: it has numbers, on a GPU, and triton is installed."""
    return x.is_cuda and HAS_TRITON and x.numel() > 0
