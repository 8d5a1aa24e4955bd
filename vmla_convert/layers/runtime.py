"""Checks of a runtime against a model, and the layer caches that follow from it."""

from __future__ import annotations

from collections.abc import Sequence

from vmla_convert.config import (
    DENSE_BITS,
    DENSE_ITEMSIZE,
    CachePolicy,
    ModelConfig,
    RuntimeConfig,
    Sizes,
)
from vmla_convert.errors import ConfigError
from vmla_convert.kernels.attention import PACKAGES, is_installed
from vmla_convert.layers.block import Block
from vmla_convert.layers.cache import CodecStore, CompressedCache, EntryCache, LayerCache, Storage
from vmla_convert.layers.codec import LayerCodec
from vmla_convert.layers.mla import LatentSelfAttention
from vmla_convert.layers.quantised import QuantisedStore
from vmla_convert.maths.rates import Rate, allocate, truncate


def check_size(config: ModelConfig, size: Sizes, quantised: bool = True) -> int:
    """Check a codec's size, and return the bytes of a token in all layers together.

    Raises:
        ConfigError: The size is below one channel of each layer, or above what the codec holds.
    """
    assert config.codec is not None
    asked, layers = size.token_bytes(config.geometry), config.geometry.num_layers
    # Cutting 640 bytes by 0.95 must leave 32 bytes, in spite of floating-point rounding.
    total = int(asked * layers + 1e-6)
    least = 1 if quantised else DENSE_ITEMSIZE
    most = config.codec.rank * DENSE_ITEMSIZE
    if total < least * layers:
        raise ConfigError(
            f"{asked:g} bytes per token are below {least}, the cost of a channel in each layer",
            f"use --bytes-per-token {least} or more",
        )
    if total > most * layers:
        raise ConfigError(
            f"{asked:g} bytes per token are above {most:g}, all that this codec holds",
            f"use --bytes-per-token {most:g} or less, or convert with more convert.channels",
        )
    return total


def codec_rates(
    config: ModelConfig, codecs: Sequence[LayerCodec], size: Sizes, quantised: bool = True
) -> list[Rate]:
    """The rate of each of some layers at a size, quantised or in the model's dtype.

    Args:
        config: A model with a codec.
        codecs: The codecs that share the bytes of their layers, of all layers or of some.
        size: Bytes per token and layer.
        quantised: False keeps as many channels as the size pays for, each in the model's dtype.

    Raises:
        ConfigError: The codec does not have the size.
    """
    total = check_size(config, size, quantised) * len(codecs) // config.geometry.num_layers
    if not quantised:
        return truncate([codec.energies.cpu() for codec in codecs], total // DENSE_ITEMSIZE)
    return allocate([codec.purchases() for codec in codecs], total)


def check_runtime(config: ModelConfig, runtime: RuntimeConfig) -> None:
    """Refuse settings that a model cannot run with.

    Raises:
        ConfigError: The runtime wants an absorbed backend without MLA layers, a size without a
            codec, an attention kernel that is not installed, or a quantised dense cache for a
            converted model.
    """
    if runtime.backend == "absorbed" and config.mla is None:
        raise ConfigError(
            "backend 'absorbed' needs MLA layers, and this model has none",
            "leave runtime.backend out, or convert with --preset videomla",
        )
    if not is_installed(runtime.attention_backend):
        module = PACKAGES[runtime.attention_backend].module
        raise ConfigError(
            f"attention backend {runtime.attention_backend} needs the package {module}",
            "install the package, or leave --attention-backend out",
        )
    if runtime.size is not None and config.codec is None:
        raise ConfigError(
            "a cache size needs a codec, and this model has none",
            "make one first: vmla convert CKPT -o OUT",
        )
    if runtime.cache_dtype in DENSE_BITS and not config.is_dense:
        raise ConfigError(
            f"cache_dtype {runtime.cache_dtype} is for dense models, and this model is converted",
            "use --bytes-per-token for a codec; MLA latents are not quantised",
        )


def new_layer_cache(
    block: Block, rate: Rate | None, policy: CachePolicy, storage: Storage, runtime: RuntimeConfig
) -> LayerCache:
    """An empty cache for one block; `rate` is that of the block's codec, if there is one."""
    attention, slots, parallel = block.self_attn, policy.window_frames, storage.parallel
    own = parallel.own_heads(attention.num_heads)
    heads = own.stop - own.start
    width = heads * (attention.o.in_features // attention.num_heads)
    bits = DENSE_BITS.get(runtime.cache_dtype)
    if block.codec is not None and rate is not None:
        store = CodecStore(block.codec, rate, slots, storage)
    elif bits is not None:
        store = QuantisedStore(heads, width, bits, slots, storage)
    elif isinstance(attention, LatentSelfAttention):
        return EntryCache(attention.entry_widths, policy, storage)
    else:
        widths = {name: width for name in attention.entry_widths}
        return EntryCache(widths, policy, storage, parallel)
    return CompressedCache(store, width, policy, storage)
