"""Put a codec's cache into SGLang-Diffusion.

SGLang imports the module that SGLANG_EXTERNAL_MODEL_PACKAGE names in each of its processes. When
that is this module, every causal denoising stage makes a `CodecKVCache` in place of its dense
caches. VMLA_CODEC names the codec, and VMLA_BYTES_PER_TOKEN the size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from vmla_convert.config import Sizes
from vmla_convert.errors import ConfigError
from vmla_convert.interop.sglang_cache import CodecKVCache, HeadCodecs
from vmla_convert.interop.tokens import RotaryTables, Slots
from vmla_convert.loading.codec import Codec, open_codec

PACKAGE, CODEC, SIZE = "SGLANG_EXTERNAL_MODEL_PACKAGE", "VMLA_CODEC", "VMLA_BYTES_PER_TOKEN"
_RUNTIME = "sglang.multimodal_gen.runtime"
# A pass needs rotations of two sinks, the window and the chunk.
_ROTATIONS = 4


def connect(stage_class: Any, codec: Codec, size: Sizes | None, parallel: Any) -> None:
    """Make a class of causal denoising stages use a codec.

    Args:
        stage_class: `CausalDMDDenoisingStage`, the base class of all causal stages.
        codec: A codec of the model that the stage runs.
        size: Bytes per token and layer; None for the codec's default.
        parallel: SGLang's module of process groups.

    Raises:
        ConfigError: The codec does not have the size.
    """
    forward = stage_class._forward_causal_transformer
    codecs: list[HeadCodecs] = []
    pairs = list(zip(codec.layers, codec.rates(size), strict=True))

    def allocate(
        stage: Any,
        *,
        batch_size: int,
        kv_cache_size: int,
        num_attention_heads: int,
        attention_head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        sink_tokens: int = 0,
        global_sink_tokens: int = 0,
        attention_window_size: int | None = None,
        allow_growth: bool = False,
        use_int_indices: bool = True,  # noqa: ARG001
    ) -> list[CodecKVCache]:
        _check_model(codec, stage.num_transformer_blocks, num_attention_heads, attention_head_dim)
        _check_groups(parallel)
        if not codecs:  # SGLang makes its process groups after it has imported this module
            split = parallel.get_tp_world_size() > 1
            reduce = parallel.tensor_model_parallel_all_reduce if split else None
            codecs.extend(HeadCodecs(layer, rate, reduce) for layer, rate in pairs)
        slots = Slots(
            batch_size,
            kv_cache_size,
            num_attention_heads,
            attention_head_dim,
            dtype,
            torch.device(device),
        )
        rotary = RotaryTables(attention_head_dim, slots.device, _ROTATIONS)
        return [
            CodecKVCache(
                layer,
                slots,
                rotary,
                sink_tokens=sink_tokens,
                global_sink_tokens=global_sink_tokens,
                attention_window_size=attention_window_size or kv_cache_size,
                allow_growth=allow_growth,
            )
            for layer in codecs
        ]

    def forward_pass(stage: Any, batch: Any, **given: Any) -> Any:
        _start(stage.transformer.config.patch_size, given)
        return forward(stage, batch, **given)

    stage_class._allocate_causal_kv_cache = allocate
    stage_class._forward_causal_transformer = forward_pass


def _start(patch_size: Any, given: Mapping[str, Any]) -> None:
    """Tell the caches where the chunk of a pass stands in RoPE."""
    frame, sides = given["start_frame"], given["latent_model_input"].shape[-2:]
    rows, columns = (side // patch for side, patch in zip(sides, patch_size[-2:], strict=True))
    if frame != int(frame):
        raise ConfigError(
            f"a chunk starts at frame {frame:g}, between two frames",
            "set multi_shot_rope_offset to whole frames",
        )
    ahead = int(frame) * rows * columns - given["current_start_tokens"]
    for cache in given["kv_cache"]:
        if isinstance(cache, CodecKVCache):  # a stage may quantise its dense caches instead
            cache.start((rows, columns), ahead)


def _check_model(codec: Codec, layers: int, heads: int, head_dim: int) -> None:
    geometry = codec.config.geometry
    expected = (geometry.num_layers, geometry.num_heads, geometry.head_dim)
    if (layers, heads, head_dim) != expected:
        raise ConfigError(
            f"the model's cache has {layers} layers of {heads} heads of {head_dim}, the codec is "
            f"for {expected[0]} layers of {expected[1]} heads of {expected[2]}",
            f"set {CODEC} to a codec of this model",
        )


def _check_groups(parallel: Any) -> None:
    if (size := parallel.get_sp_world_size()) > 1:
        raise ConfigError(
            f"a codec cannot be split over {size} processes by tokens",
            "start SGLang with --sp-degree 1; tensor parallelism works",
        )


def _connect(settings: Mapping[str, str]) -> None:
    if not settings.get(CODEC):
        raise ConfigError(f"{CODEC} is not set", f"set {CODEC} to the folder of a codec")
    try:
        size = Sizes(float(settings[SIZE])) if settings.get(SIZE) else None
    except ValueError as error:
        raise ConfigError(f"{SIZE} {settings[SIZE]} is no number", f"set {SIZE}=200") from error
    stage = import_module(f"{_RUNTIME}.pipelines_core.stages.causal_denoising")
    parallel = import_module(f"{_RUNTIME}.distributed")
    connect(stage.CausalDMDDenoisingStage, open_codec(settings[CODEC]), size, parallel)


if os.environ.get(PACKAGE) == __name__:
    _connect(os.environ)
