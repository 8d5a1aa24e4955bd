"""Formulas of the text encoder's and the VAE's memory are those of the real classes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from peak_bytes import counted_bytes

from vmla_convert.config import CachePolicy, Geometry, ModelConfig, SamplerConfig
from vmla_convert.media.memory import decoding_memory, text_encoder_memory, vae_kept_bytes
from vmla_convert.media.wan import _decode_frame

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


def test_the_text_encoder_is_umt5_xxl() -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    # Sizes of google/umt5-xxl.
    sizes: dict[str, Any] = {
        "vocab_size": 256_384,
        "d_model": 4096,
        "d_ff": 10_240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    }
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config(**sizes))
    weights = 2 * sum(parameter.numel() for parameter in encoder.parameters())
    geometry = Geometry(1536, 8960, 12, 30, 16, 16)
    memory = text_encoder_memory(
        ModelConfig(geometry, (60, 104), 3, CachePolicy(21), SamplerConfig())
    )
    assert memory.staging == pytest.approx(weights, rel=1e-3)
    assert weights < memory.device < 1.05 * weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decoding_takes_the_memory_of_the_formula(dtype: torch.dtype) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    size = (60, 104)
    with torch.device("meta"):
        vae = AutoencoderKLWan()
    with torch.no_grad(), counted_bytes() as counted:
        fake = {name: torch.zeros(t.shape, dtype=dtype) for name, t in vae.state_dict().items()}
        vae.load_state_dict(fake, assign=True)
        del fake
        features: dict[int, Any] = defaultdict(lambda: None)
        latents = torch.zeros(1, 16, 1, *size, dtype=dtype)
        for _ in range(3):
            _decode_frame(vae, latents, features)
        del latents
    assert decoding_memory(size, dtype.itemsize).device == pytest.approx(counted.peak, rel=0.1)
    assert vae_kept_bytes(size, dtype.itemsize) == pytest.approx(counted.live, rel=0.1)
