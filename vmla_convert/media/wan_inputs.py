"""What Wan's text encoder and VAE are given, and what comes out of them.

`WanMedia` drives them chunk by chunk and `VMLAPipeline` calls them whole; prompts are read and
latents scaled here for both.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vmla_convert.config import Geometry


def clean_prompt(prompt: str) -> str:
    """As Wan cleans it: broken Unicode mended, HTML entities undone, white space single."""
    import ftfy

    # Twice, as Wan does: of "&amp;lt;" stays "<".
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(text.split())


def read_contexts(
    text_encoder: Any,
    tokenizer: Any,
    prompts: list[str],
    geometry: Geometry,
    device: torch.device,
) -> Tensor:
    """Contexts (B, text_len, text_dim) of prompts, 0 after their ends, on the CPU.

    Args:
        text_encoder: UMT5 (`transformers.UMT5EncoderModel`); the contexts are of its dtype.
        tokenizer: Its own.
        prompts: B of them.
        geometry: Of the model that reads the contexts.
        device: Where the encoder works.
    """
    shape = (len(prompts), geometry.text_len, geometry.text_dim)
    contexts = torch.zeros(shape, dtype=text_encoder.dtype)
    for context, prompt in zip(contexts, prompts, strict=True):
        read = tokenizer(
            clean_prompt(prompt), truncation=True, max_length=geometry.text_len, return_tensors="pt"
        )
        # Alone, a prompt needs no padding, which the encoder would not see anyway.
        hidden = text_encoder(read["input_ids"].to(device)).last_hidden_state[0]
        context[: len(hidden)] = hidden.to(context)
    return contexts


def normalise(latents: Tensor, vae: Mapping[str, Any]) -> Tensor:
    """Latents (B, C, F, h, w) as a model of the Wan family sees them, in float32.

    Args:
        latents: As the VAE makes them.
        vae: Its configuration, with the mean and deviation of each channel.
    """
    mean, deviation = _scale(vae, latents.device)
    return (latents.float() - mean) / deviation


def denormalise(latents: Tensor, vae: Mapping[str, Any]) -> Tensor:
    """The inverse of `normalise`: latents (B, C, F, h, w) as the VAE sees them, in float32."""
    mean, deviation = _scale(vae, latents.device)
    return latents.float() * deviation + mean


def _scale(vae: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a VAE's latents, (C, 1, 1, 1) each."""
    mean, deviation = (
        torch.tensor(vae[name], device=device).view(-1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    return mean, deviation
