"""A pretend CUDA device: tensors on "cuda:0" whose numbers lie in host memory, or that have none.

Import this module before torch, in a process of its own: the device guard and the changed functions
of `torch.cuda` hold for the whole process. The environment variable `PRETEND_GUARD` names the
library made of `guard.cpp`.

A tensor of the device is a wrapper around a tensor of the CPU, whose numbers are then those that a
GPU would compute, or around one of torch's meta device, which has a size only: so layers of true
width take no memory. `Device` refuses what a GPU refuses (tensors of the CPU, unequal dtypes,
pointers that a fused kernel cannot load), counts bytes, and notes transfers that make the host
wait, double precision and kernels.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType, SimpleNamespace
from typing import Any, cast

assert "torch" not in sys.modules, "import this module before torch"
ctypes.CDLL(os.environ["PRETEND_GUARD"], mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

CARD = torch.device("cuda", 0)
CPU = torch.device("cpu")
CAPABILITY = (9, 0)
EXPLAINS = bool(os.environ.get("PRETEND_PEAKS"))
"""Whether `Device.largest` says which lines made the bytes of the peak; this takes time."""
ALIGNED_BYTES = 16
"""Steps in which fused kernels load rows."""

# Operators that only look at a tensor, and launch nothing.
_VIEWS = {
    *("view", "_unsafe_view", "transpose", "permute", "slice", "select", "unbind", "split"),
    *("split_with_sizes", "expand", "detach", "t", "unsqueeze", "squeeze", "alias", "as_strided"),
    *("view_as_complex", "view_as_real", "_reshape_alias", "lift_fresh", "unfold", "real", "imag"),
    *("_conj", "resolve_conj", "is_same_size", "diagonal", "empty", "empty_like", "empty_strided"),
    *("new_empty", "new_empty_strided"),
}
# Products whose operands must have one dtype.
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "linear", "matmul"}
# Operators whose result has a size that depends on numbers, so the host waits for them.
_SIZED_BY_NUMBERS = {"nonzero", "masked_select", "unique_consecutive", "_unique2", "bincount"}
_FLASH = {"_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention"}
_EFFICIENT = "_scaled_dot_product_efficient_attention"


class CardTensor(Tensor):
    """A tensor of the pretend device around a tensor of the CPU or of torch's meta device."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> CardTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CARD,
        )
        made.held = inner
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types, args, kwargs
        raise RuntimeError(f"{func} reached a tensor of the pretend device outside of it")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A file holds numbers; who loads the file says where they go.
        return self.detach().cpu().__reduce_ex__(protocol)


class Device(TorchDispatchMode):
    """The device, in a `with` block.

    Args:
        computes: Whether tensors have numbers.

    Attributes:
        live: Bytes of the tensors that exist.
        peak: Largest value of `live` since the last `reset`.
        largest: Bytes of the peak by the line that made them; see `EXPLAINS`.
        waits: Transfers and other operators for which the host waits, by name and line of code.
        doubles: Operators with a float64 result of more than one number, by name and line.
        kernels: Launched operators, by name.
        attention: Kernels of attention, by name and head width.
    """

    def __init__(self, computes: bool) -> None:
        super().__init__()
        self.computes = computes
        self.live = self.peak = 0
        self.largest: Counter[str] = Counter()
        self.waits, self.doubles = Counter[str](), Counter[str]()
        self.kernels, self.attention = Counter[str](), Counter[str]()
        self._bytes: dict[int, tuple[int, str]] = {}

    def reset(self) -> None:
        """Forget all counts, and count the peak from here."""
        self.peak, self.largest = self.live, Counter()
        for counter in (self.waits, self.doubles, self.kernels, self.attention):
            counter.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator on the device if a tensor or the keyword `device` is of the device."""
        kwargs = dict(kwargs or {})
        name, written = _described(func)
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        target = kwargs.get("device")
        target = None if target is None else torch.device(target)
        if not any(isinstance(tensor, CardTensor) for tensor in tensors):
            if target is None or target.type != "cuda":
                return func(*args, **kwargs)
            if name == "_to_copy":
                return self._upload(args[0], kwargs)
        if name == "_to_copy" and target is not None and target.type == "cpu":
            return self._download(args[0], kwargs)
        if name == "copy_" and isinstance(args[0], CardTensor) != isinstance(args[1], CardTensor):
            return self._copy_across(args[0], args[1], non_blocking=len(args) > 2 and args[2])
        if name == "_local_scalar_dense":
            self.waits[f"item {site()}"] += 1
            return self._number(args[0])
        self._check(name, args, tensors)
        if target is not None:
            kwargs["device"] = CPU if self.computes else torch.device("meta")
        inner = {key: _unwrapped(value) for key, value in kwargs.items()}
        result = self._run(func, name, [_unwrapped(argument) for argument in args], inner)
        changed = [args[place] if place < len(args) else kwargs.get(key) for place, key in written]
        return self._returned(name, changed, result)

    # Between host and device

    def _upload(self, tensor: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if not (kwargs.get("non_blocking") and tensor.is_pinned()):
            self.waits[f"to the device {site()}"] += 1
        dtype = kwargs.get("dtype") or tensor.dtype
        if self.computes:
            return self._made(tensor.to(dtype, copy=True))
        return self._made(torch.empty_like(tensor, dtype=dtype, device="meta"))

    def _download(self, tensor: CardTensor, kwargs: dict[str, Any]) -> Tensor:
        if not kwargs.get("non_blocking"):
            self.waits[f"to the host {site()}"] += 1
        dtype = kwargs.get("dtype") or tensor.dtype
        if self.computes:
            return tensor.held.to(dtype, copy=True)
        return torch.zeros((), dtype=dtype).expand(tensor.shape)

    def _copy_across(self, to: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
        way = "to the device" if isinstance(to, CardTensor) else "to the host"
        if not non_blocking:
            self.waits[f"{way} {site()}"] += 1
        if self.computes:
            cast(Tensor, _inner(to)).copy_(cast(Tensor, _inner(source)))
        return to

    def _number(self, tensor: CardTensor) -> Any:
        if self.computes:
            return tensor.held.item()
        return 0.5 if tensor.dtype.is_floating_point else 1

    # Refusals of a GPU

    def _check(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        # An index may be of the host, and a number as well; both cost a transfer.
        indices = list(_tensors(args[1])) if name in ("index", "index_put_") else []
        for tensor in tensors:
            if isinstance(tensor, CardTensor) or tensor.is_meta:
                continue
            if any(tensor is index for index in indices):
                self.waits[f"index of the host {site()}"] += 1
            elif tensor.dim():
                raise RuntimeError(
                    f"{name} at {site()} takes tensors of the card and of the host: "
                    f"{tuple(tensor.shape)}"
                )
        if any(index.dtype == torch.bool for index in indices):
            self.waits[f"mask as index {site()}"] += 1
        if name in _PRODUCTS:
            _same_dtype(name, [t for t in tensors if t.dtype.is_floating_point])
        if name in _FLASH or name == _EFFICIENT:
            _same_dtype(name, list(args[:3]))
        if name in _FLASH:
            _aligned(name, args[:3])

    # Running

    def _run(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name in _SIZED_BY_NUMBERS:
            self.waits[f"{name} {site()}"] += 1
            if not self.computes:
                return _half_of(name, args[0])
        if not self.computes and name == "index":
            args = (args[0], [_counted_mask(index) for index in args[1]])
        if name in _FLASH or name == _EFFICIENT:
            return self._attend(name, args, kwargs)
        if name == "_conj":
            # Below here no operator looks at the mark of a conjugate, so there is none.
            return torch.conj_physical(args[0])
        if func.namespace == "vmla":
            return _twin(name, self.computes, *args)
        return func(*args, **kwargs)

    def _attend(self, name: str, args: Any, kwargs: Any) -> Any:
        """Run a kernel of a GPU by the kernel of the CPU."""
        self.attention[f"{name} {args[0].shape[-1]}"] += 1
        mask = args[3] if name == _EFFICIENT and len(args) > 3 else None
        output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *args[:3], attn_mask=mask, scale=kwargs.get("scale")
        )
        if name == _EFFICIENT:
            empty = torch.empty((), dtype=torch.long)
            return output, log_sum, empty, empty
        none = torch.empty(0, dtype=torch.long)
        return (output, log_sum, none, none, 0, 0, none, none, none)

    def _returned(self, name: str, changed: list[Any], result: Any) -> Any:
        """The results as tensors of the device; an operator in place returns its argument."""
        if name not in _VIEWS:
            self.kernels[name] += 1
            made = result if isinstance(result, tuple | list) else [result]
            if any(_is_double(each) for each in made):
                self.doubles[f"{name} {site()}"] += 1
        if result is None:
            return None
        if changed:
            return changed[0] if isinstance(result, Tensor) else tuple(changed)
        if isinstance(result, Tensor):
            return self._made(result)
        if isinstance(result, tuple | list):
            return type(result)(self._made(x) if isinstance(x, Tensor) else x for x in result)
        return result

    def _made(self, inner: Tensor) -> CardTensor:
        storage = inner.untyped_storage()
        key = storage._cdata
        if key not in self._bytes:
            nbytes = storage.nbytes()
            self._bytes[key] = nbytes, site() if EXPLAINS else ""
            self.live += nbytes
            if self.live > self.peak:
                self.peak = self.live
                if EXPLAINS:
                    self.largest = Counter()
                    for each, line in self._bytes.values():
                        self.largest[line] += each
            weakref.finalize(storage, self._freed, key)
        return CardTensor(inner)

    def _freed(self, key: int) -> None:
        self.live -= self._bytes.pop(key)[0]


def site() -> str:
    """The innermost running line of the package or its evals, such as `layers/codec.py:80`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        for part in ("vmla_convert/", "evals/"):
            if part in frame.f_code.co_filename:
                return f"{frame.f_code.co_filename.rsplit(part, 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


@cache
def _described(func: Any) -> tuple[str, list[tuple[int, str]]]:
    """Name of an operator, and place and name of the arguments that it writes to."""
    schema = func._schema
    return schema.name.split("::")[1], [
        (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among the arguments of an operator, and in their lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from (each for each in value if isinstance(each, Tensor))


def _inner(value: Any) -> Any:
    return value.held if isinstance(value, CardTensor) else value


def _unwrapped(value: Any) -> Any:
    """An argument of an operator with the tensors inside the wrappers."""
    if isinstance(value, CardTensor):
        return value.held
    return type(value)(map(_inner, value)) if type(value) in (tuple, list) else value


def _is_double(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    return value.dtype in (torch.float64, torch.complex128) and value.numel() > 1


def _twin(name: str, computes: bool, x: Tensor, *rest: Any) -> Tensor | None:
    """Compute the result of a kernel of the package by plain operations on tensors of the CPU."""
    from vmla_convert.maths.quantise import dequantise, unpack
    from vmla_convert.maths.rope3d import Rotary, rotate

    if name == "unpacked":
        _, widths, tables, dtype = rest
        if not computes:
            return x.new_empty((*x.shape[:-1], len(widths)), dtype=dtype)
        bits = widths.tolist()
        return dequantise(unpack(x, bits), tables, bits, dtype)
    if not computes:
        return torch.empty_like(x) if name == "rotated" else None
    if name == "rotated":
        return rotate(x, Rotary(rest[0]))
    if name == "rotate_":
        x.copy_(rotate(x, Rotary(rest[0])))
        return None
    assert name == "decode_rotated", name
    weight, mean, table, out = rest
    keys = torch.nn.functional.linear(x, weight, mean).unflatten(-1, out.shape[-2:])
    out.copy_(rotate(keys, Rotary(table)))
    return None


def _same_dtype(name: str, tensors: list[Tensor]) -> None:
    if len(dtypes := {tensor.dtype for tensor in tensors}) > 1:
        raise RuntimeError(f"{name} at {site()} takes {sorted(map(str, dtypes))}")


def _aligned(name: str, tensors: list[CardTensor]) -> None:
    """Refuse rows that do not start at multiples of what a kernel loads at once."""
    for which, tensor in zip("qkv", tensors, strict=True):
        inner = tensor.held
        starts = (inner.storage_offset(), *inner.stride()[:-1])
        size = tensor.dtype.itemsize
        if inner.stride(-1) != 1 or any(start * size % ALIGNED_BYTES for start in starts):
            raise RuntimeError(f"{name} at {site()} takes an unaligned {which}: {starts}")


def _half_of(name: str, tensor: Tensor) -> Any:
    """A result for half of a tensor's numbers, without numbers."""
    count = max(1, tensor.numel() // 2)
    if name == "nonzero":
        return torch.empty(count, tensor.dim(), dtype=torch.long, device="meta")
    if name == "masked_select":
        return torch.empty(count, dtype=tensor.dtype, device="meta")
    raise NotImplementedError(f"{name} on tensors without numbers, at {site()}")


def _counted_mask(index: Tensor | None) -> Tensor | None:
    """Indices of half of the places, for a mask without numbers."""
    if index is None or index.dtype != torch.bool:
        return index
    return torch.empty(max(1, index.numel() // 2), dtype=torch.long, device="meta")


# Stand-ins for the driver


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` as torch runs it on a GPU: it picks one kernel.

    Autograd knows the CPU's fused kernel, so this kernel runs, after the checks of the GPU's.
    """
    if not isinstance(query, CardTensor) or _CURRENT[0] is None:
        options = {"scale": scale, "enable_gqa": enable_gqa}
        return _PLAIN_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    tensors, width, itemsize = [query, key, value], query.shape[-1], query.dtype.itemsize
    name = "flash" if itemsize == 2 and width <= 256 and attn_mask is None else "efficient"
    if name == "efficient" and (width * itemsize % ALIGNED_BYTES or itemsize > 4):
        name = "math"
    scale, kept = scale or width**-0.5, value.shape[-1]
    if name == "flash" and width % 8:
        # torch pads by itself, and a padded copy is aligned.
        tensors = [torch.nn.functional.pad(tensor, (0, -width % 8)) for tensor in tensors]
    _same_dtype(name, tensors)
    if name == "flash":
        _aligned(name, cast(list[CardTensor], tensors))
    _CURRENT[0].attention[f"{name} {width}"] += 1
    if name == "math":
        attend = torch.ops.aten._scaled_dot_product_attention_math
    else:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(*tensors, attn_mask=attn_mask, is_causal=is_causal, scale=scale)[0][..., :kept]


_PLAIN_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_PLAIN_TENSOR = torch.tensor
_CURRENT: list[Device | None] = [None]


def _tensor(data: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> Tensor:
    """`torch.tensor`, which a GPU runs as a tensor of the host and a transfer."""
    made = _PLAIN_TENSOR(data, dtype=dtype, **options)
    return made if device is None else made.to(device)


def install(memory: int = 80 * 10**9) -> None:
    """Make torch believe that the device is there.

    Args:
        memory: Bytes of the device.
    """
    properties = SimpleNamespace(
        name="Pretend", total_memory=memory, major=CAPABILITY[0], minor=CAPABILITY[1],
        multi_processor_count=132,
    )  # fmt: skip
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": CAPABILITY,
        "get_device_properties": properties,
        "get_device_name": "Pretend",
        "is_bf16_supported": True,
        "is_initialized": True,
        "mem_get_info": (memory, memory),
        "max_memory_allocated": 0,
        "memory_allocated": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }
    nothing = (
        "set_device synchronize empty_cache reset_peak_memory_stats manual_seed manual_seed_all "
        "set_rng_state init _lazy_init"
    )
    for name in nothing.split():
        answers[name] = None
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    torch.cuda.default_generators = (torch.Generator(),)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.nn.functional.scaled_dot_product_attention = _attention
    torch.tensor = _tensor
    # Parameters of the device replace those of the CPU: they are of another class.
    torch.__future__.set_overwrite_module_params_on_conversion(True)


@contextmanager
def pretend(computes: bool) -> Iterator[Device]:
    """Run a block on the pretend device."""
    device = Device(computes)
    _CURRENT[0] = device
    with device:
        yield device
    _CURRENT[0] = None
