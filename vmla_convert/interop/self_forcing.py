"""Hosts of Self-Forcing's type: self-attention layers that are handed a dictionary as their cache.

Source: `pipeline/causal_inference.py` and `wan/modules/causal_model.py` of Self-Forcing, and their
forks. A layer's `forward` takes `kv_cache`, a dictionary with keys "k" and values "v" (B, N, H, D),
`current_start`, the number of the chunk's first token, and `grid_sizes`, (B, 3) with frames, rows
and columns of tokens. Keys are cached rotated. The layer slides its window by assigning one slice
of "k" and "v" to another, assigns the chunk to a slice, and attends to a slice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from vmla_convert.errors import ConfigError
from vmla_convert.interop.dictionary import CacheSide, DictionaryCache
from vmla_convert.interop.host import HOST_PAGE, NewCache, modules_of, uncompiled
from vmla_convert.interop.tokens import Slots

ATTRIBUTES = ("q", "k", "v", "o", "norm_q", "norm_k", "num_heads")
CACHE, POSITIONS = "kv_cache", ("current_start", "grid_sizes")
_INITIALISE = "_initialize_kv_cache"


class SelfForcingHost:
    """A program whose self-attention layers take a dictionary cache.

    Attributes:
        layers: Self-attention of every layer.
        rotated: Keys are cached after RoPE.
    """

    rotated = True
    looked_for = f"layers with {', '.join(ATTRIBUTES)}, whose forward takes {CACHE}"

    def __init__(self, program: object) -> None:
        self.program = program
        self.layers = [layer for layer in modules_of(program) if is_layer(layer)]
        self._pairs: WeakSet[DictionaryCache] = WeakSet()

    def first_token(self, given: Mapping[str, Any]) -> int:
        """Number of a chunk's first token, from the arguments of a layer's forward."""
        return int(given["current_start"])

    def connect(self, new_cache: NewCache) -> Callable[[], None]:
        """Put caches in place of dense tensors, now and whenever the program makes new ones."""
        for layer in self.layers:
            _require_positions(layer)
        for number, entries in self._dictionaries():
            self._replace(new_cache, number, entries, entries["k"].device)
        hooks = [
            hook
            for number, layer in enumerate(self.layers)
            for hook in (
                layer.register_forward_pre_hook(
                    uncompiled(partial(self._start, new_cache, number)),
                    with_kwargs=True,
                ),
                layer.register_forward_hook(uncompiled(self._end), with_kwargs=True),
            )
        ]
        initialise = getattr(self.program, _INITIALISE, None)
        if initialise and "device" not in inspect.signature(initialise).parameters:
            initialise = None  # dense tensors are replaced at the first pass
        if initialise:
            setattr(self.program, _INITIALISE, partial(self._initialise, new_cache, initialise))

        def disconnect() -> None:
            for hook in hooks:
                hook.remove()
            if initialise:
                delattr(self.program, _INITIALISE)
            for pair in list(self._pairs):
                pair.restore()

        return disconnect

    def _start(self, new_cache: NewCache, number: int, layer: nn.Module, *call: Any) -> None:
        given = _arguments(layer, *call)
        entries = given.get(CACHE)
        if entries is None:
            return
        if isinstance(entries["k"], Tensor):
            self._replace(new_cache, number, entries, entries["k"].device)
        if isinstance(entries["k"], CacheSide):
            _, rows, columns = given["grid_sizes"][0].tolist()
            entries["k"].pair.start(self.first_token(given), (rows, columns))

    def _end(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG002
        entries = _arguments(layer, args, kwargs).get(CACHE)
        if entries is not None and isinstance(entries["k"], CacheSide):
            entries["k"].pair.end()

    def _initialise(self, new_cache: NewCache, initialise: Any, *args: Any, **kwargs: Any) -> None:
        """Make the program's dictionaries without their dense tensors, which may not fit."""
        given = inspect.signature(initialise).bind(*args, **kwargs).arguments
        device = torch.device(given["device"])
        initialise(**{**given, "device": "meta"})
        for number, entries in self._dictionaries():
            self._replace(new_cache, number, entries, device)
            for name, value in entries.items():
                if isinstance(value, Tensor) and value.is_meta:
                    entries[name] = torch.zeros_like(value, device=device)

    def _replace(
        self, new_cache: NewCache, number: int, entries: dict[str, Any], device: torch.device
    ) -> None:
        slots = Slots(*entries["k"].shape, dtype=entries["k"].dtype, device=device)
        cache = new_cache(number, slots)
        if cache is not None:
            self._pairs.add(DictionaryCache(cache, entries))

    def _dictionaries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every cache with dense tensors among the program's attributes, with its layer."""
        # The cross-attention's dictionaries have no "global_end_index".
        found = [v for v in vars(self.program).values() if isinstance(v, list)]
        for caches in (v for v in found if len(v) == len(self.layers)):
            for number, entries in enumerate(caches):
                dense = isinstance(entries, dict) and isinstance(entries.get("k"), Tensor)
                if dense and "global_end_index" in entries:
                    yield number, entries


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a self-attention layer that takes a dictionary cache."""
    named = all(hasattr(module, name) for name in ATTRIBUTES)
    return named and CACHE in inspect.signature(module.forward).parameters


def _require_positions(layer: nn.Module) -> None:
    taken = inspect.signature(layer.forward).parameters
    if missing := [name for name in POSITIONS if name not in taken]:
        raise ConfigError(
            f"the positions of cached keys cannot be told: {type(layer).__name__}.forward takes "
            f"no {' and no '.join(missing)}",
            HOST_PAGE,
        )


def _arguments(layer: nn.Module, args: Any, kwargs: Any) -> Mapping[str, Any]:
    bound = inspect.signature(layer.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments
