"""Wan's text encoder and VAE, as a diffusers pipeline holds them: modules that may be swapped."""

from __future__ import annotations

import html
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from vmla_convert.checkpoint.components import Components, Part
from vmla_convert.config import Geometry
from vmla_convert.errors import CheckpointError


def load_component(components: Components, part: Part, dtype: torch.dtype) -> Any:
    """One part of a pipeline.

    Raises:
        CheckpointError: It cannot be had.
    """
    folder = components.folder(part)
    try:
        if part == "tokenizer":
            return AutoTokenizer.from_pretrained(folder)
        if part == "text_encoder":
            return UMT5EncoderModel.from_pretrained(folder, dtype=dtype)
        return AutoencoderKLWan.from_pretrained(folder, torch_dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}", "download it again") from error


def encode_prompts(
    text_encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    geometry: Geometry,
    device: torch.device,
) -> Tensor:
    """Contexts (B, text_len, text_dim) of prompts, 0 after their ends, on the CPU.

    Args:
        text_encoder: UMT5.
        tokenizer: Its own.
        prompts: B of them.
        geometry: Of the model that reads them.
        device: Where the encoder works.
    """
    contexts = torch.zeros(len(prompts), geometry.text_len, geometry.text_dim)
    for context, prompt in zip(contexts, prompts, strict=True):
        read = tokenizer(
            clean_prompt(prompt), truncation=True, max_length=geometry.text_len, return_tensors="pt"
        )
        # Called as a module, which is what brings an offloaded one to its device.
        hidden = text_encoder(read["input_ids"].to(device)).last_hidden_state[0]
        context[: len(hidden)] = hidden.to(context)
    return contexts


def clean_prompt(prompt: str) -> str:
    """As Wan cleans it: broken Unicode mended, HTML entities undone, white space single."""
    import ftfy

    # Twice, as Wan does: of "&amp;lt;" stays "<".
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def decode_latents(vae: AutoencoderKLWan, latents: Tensor, device: torch.device) -> Tensor:
    """Pixels (B, 3, F', H, W) in −1 … 1 of normalised latents (B, C, F, h, w).

    Args:
        vae: Wan's.
        latents: As a model of the Wan family sees them.
        device: Where the VAE works.
    """
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config["latents_mean"]).view(shape).to(latents)
    deviation = torch.tensor(vae.config["latents_std"]).view(shape).to(latents)
    inputs = (latents * deviation + mean).to(device, vae.dtype)
    return vae.decode(inputs, return_dict=False)[0]
