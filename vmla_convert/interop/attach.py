"""Give a running program a codec's cache, and give it its own cache back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal
from weakref import WeakSet

import torch

from vmla_convert.checkpoint.base import PRECISION, base_tensors, differing
from vmla_convert.checkpoint.keymap import listed
from vmla_convert.config import Sizes
from vmla_convert.errors import CheckpointError, ConfigError
from vmla_convert.interop.host import HOST_PAGE, Host, NewCache, linear_of, sizes_of
from vmla_convert.interop.self_forcing import SelfForcingHost
from vmla_convert.interop.tokens import (
    EncodedStore,
    RotaryTables,
    Slots,
    TokenCache,
    placed_codec,
)
from vmla_convert.interop.witness import Witness, WitnessedCache
from vmla_convert.layers.codec import LayerCodec
from vmla_convert.loading.codec import Codec, open_codec
from vmla_convert.progress import Silent

HOSTS = (SelfForcingHost,)
"""Known hosts, which are tried in this order."""

# Attribute of a program's first layer: undoes what is in progress there.
_UNDO = "_vmla_disconnect"


class Attachment:
    """A codec in a program.

    Attributes:
        caches: Caches that the program holds now, one for each layer and stream.
    """

    def __init__(self) -> None:
        self.caches: WeakSet[TokenCache] = WeakSet()

    @property
    def nbytes(self) -> int:
        """Bytes of the caches between two passes."""
        return sum(cache.nbytes for cache in self.caches)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense caches in whose place these are."""
        return sum(cache.slots.dense_bytes for cache in self.caches)


def attach(
    program: object,
    codec: Codec | str | Path,
    *,
    bytes_per_token: float | None = None,
    cut: float | None = None,
    cache_dtype: Literal["auto", "model"] = "auto",
    layers: Sequence[int] | None = None,
    check_base: bool = True,
) -> Attachment:
    """Replace the dense cache of a running program by the latents of a codec.

    Attach between two clips. The program's model, attention and window stay as they are.

    Args:
        program: A pipeline of Self-Forcing's type, or a `Host`.
        codec: A codec, or the folder of one.
        bytes_per_token: Size of the cache, in bytes per token and layer.
        cut: Size of the cache, as the share of the dense cache to remove.
        cache_dtype: `auto` quantises channels; `model` keeps them in the cache's dtype.
        layers: Layers that get the codec, for example `range(2, 30)`; None for all.
        check_base: Refuse a model other than the one that the codec was made for. False allows
            a fine-tuned model or one with LoRAs merged into its weights.

    Raises:
        ConfigError: The program is no known host, has a codec already, or the size does not fit.
        CheckpointError: There is no codec, or the codec was made for another model.
    """
    codec = codec if isinstance(codec, Codec) else open_codec(codec)
    host = find_host(program)
    _check_model(host, codec, check_base)
    given = bytes_per_token is not None or cut is not None
    size = Sizes(bytes_per_token, cut) if given else None
    chosen = range(len(codec.layers)) if layers is None else sorted(set(layers))
    if not chosen or min(chosen) < 0 or max(chosen) >= len(codec.layers):
        raise ConfigError(
            f"layers {list(chosen)} are not some of 0 to {len(codec.layers) - 1}",
            "leave layers out to encode all of them",
        )
    rates = dict(zip(chosen, codec.rates(size, cache_dtype == "auto", chosen), strict=True))
    attached, placed = Attachment(), dict[tuple[int, torch.dtype, torch.device], LayerCodec]()
    tables: dict[torch.device, RotaryTables] = {}
    witness = Witness(host.layers[chosen[0]])

    def new_cache(layer: int, slots: Slots) -> TokenCache | None:
        if layer not in rates:
            return None
        place = (layer, slots.dtype, slots.device)
        if place not in placed:
            placed[place] = placed_codec(codec.layers[layer], rates[layer], slots)
        store = EncodedStore(placed[place], rates[layer], slots)
        if not host.rotated:
            cache = TokenCache(slots, store, None)
        else:
            rotary = RotaryTables(slots.head_dim, slots.device)
            rotary = tables.setdefault(slots.device, rotary)
            cache = TokenCache(slots, store, rotary)
            if layer == chosen[0]:
                cache = WitnessedCache(slots, store, rotary, witness)
        attached.caches.add(cache)
        return cache

    connect(host, new_cache, witness.close)
    return attached


def detach(program: object) -> None:
    """Give a program its dense cache back, with the tokens that the codec's cache holds.

    Raises:
        ConfigError: The program has no codec.
    """
    disconnect(find_host(program))


def connect(host: Host, new_cache: NewCache, close: Callable[[], None]) -> None:
    """Connect a host until `disconnect`, which also calls `close`.

    Raises:
        ConfigError: The host is connected already.
    """
    layer = host.layers[0]
    if _UNDO in vars(layer):
        close()
        raise ConfigError(
            "the program has a codec already, or is being observed",
            "call detach first, or leave the with block of observe",
        )
    undo = host.connect(new_cache)
    vars(layer)[_UNDO] = lambda: (close(), undo())


def disconnect(host: Host) -> None:
    """Undo `connect`.

    Raises:
        ConfigError: The host is not connected.
    """
    if _UNDO not in vars(host.layers[0]):
        raise ConfigError("the program has no codec", "call attach first")
    vars(host.layers[0]).pop(_UNDO)()


def find_host(program: object) -> Host:
    """Recognise a program.

    Raises:
        ConfigError: The program is no known host; the message says what was looked for.
    """
    if isinstance(program, Host):
        return program
    for kind in HOSTS:
        if (host := kind(program)).layers:
            return host
    looked_for = "; ".join(kind.looked_for for kind in HOSTS)
    name = type(program).__name__
    raise ConfigError(f"{name} is no known host: it has no {looked_for}", HOST_PAGE)


def base_tensors_of(host: Host) -> dict[str, torch.Tensor]:
    """Tensors of a host's model that a codec depends on, by native name."""
    found: dict[str, torch.Tensor] = {}
    for name in base_tensors(len(host.layers)):
        _, layer, _, part, kind = name.split(".")
        if (tensor := getattr(linear_of(host.layers[int(layer)], part), kind, None)) is not None:
            found[name] = tensor.detach()
    return found


def _check_model(host: Host, codec: Codec, check_base: bool) -> None:
    geometry, (dim, heads) = codec.config.geometry, sizes_of(host.layers[0])
    sizes = [
        ("layers", geometry.num_layers, len(host.layers)),
        ("heads", geometry.num_heads, heads),
        ("numbers in a key", geometry.dim, dim),
    ]
    for name, expected, found in sizes:
        if expected != found:
            raise CheckpointError(
                f"the codec is for a model of {expected} {name}, this model has {found}",
                "fit a codec to this model: observe it, then fit",
            )
    record = codec.record.get("base", {})
    if not check_base or record.get("precision") != PRECISION:
        return  # hashes of an older record depend on the dtype of the weights
    other = differing(record, base_tensors_of(host).get, Silent())
    if other:
        raise CheckpointError(
            f"the codec was made for another model: {len(other)} of {len(record['tensors'])} "
            f"tensors differ: {listed(other)}",
            "fit a codec to this model, or pass check_base=False for a fine-tuned model",
        )
