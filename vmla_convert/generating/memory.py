"""Peak memory of generation and of the clips that a model samples, by formula."""

from __future__ import annotations

from vmla_convert.config import MediaConfig, ModelConfig, RuntimeConfig
from vmla_convert.layers.memory import Memory, streaming_activations, streaming_memory
from vmla_convert.media.memory import decoding_memory, text_encoder_memory, vae_kept_bytes


def sampling_memory(config: ModelConfig, itemsize: int, clips: int, on_gpu: bool = True) -> Memory:
    """Peak of sampling latents from a dense model: the text encoder, then the model alone.

    Args:
        config: The dense model.
        itemsize: Bytes of a number of the model's dtype.
        clips: Clips that are sampled together.
        on_gpu: Whether the model runs on a GPU.
    """
    stream = streaming_memory(config, RuntimeConfig(), itemsize, clips, on_gpu)
    return stream if config.media == "demo" else text_encoder_memory(config).peak(stream)


def generation_memory(
    config: ModelConfig,
    runtime: RuntimeConfig,
    itemsize: int,
    media: MediaConfig | None = None,
    on_gpu: bool = True,
) -> Memory:
    """Peak of generating one video: the text encoder, then the model beside the VAE.

    The VAE decodes a chunk while weights and cache stay, and keeps features while the model works
    on the next chunk. The VAE counted is that of Wan 2.1.

    Args:
        config: The model, dense or converted.
        runtime: Size, place and tiles of the cache.
        itemsize: Bytes of a number of the model's dtype.
        media: Settings of the VAE.
        on_gpu: Whether the model runs on a GPU.
    """
    stream = streaming_memory(config, runtime, itemsize, 1, on_gpu)
    if config.media == "demo":
        return stream
    tiled = (media or MediaConfig()).vae_tiling
    decoding = decoding_memory(config.latent_size, itemsize, tiled)
    kept = vae_kept_bytes(config.latent_size, itemsize, tiled)
    beside = max(
        kept, decoding.device - streaming_activations(config, runtime, itemsize, 1, on_gpu)
    )
    both = stream._replace(device=stream.device + beside, host=stream.host + decoding.host)
    return text_encoder_memory(config).peak(both)
