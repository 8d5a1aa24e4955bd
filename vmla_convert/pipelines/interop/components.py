"""Wan's text encoder and VAE as a diffusers pipeline has them: modules that may be swapped.

Both are called whole, by `forward` and `decode`, which is what brings an offloaded one to its
device, and what the VAE's own tiling goes with; `WanCodec` drives their insides.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from vmla_convert.config import Geometry
from vmla_convert.pipelines.wan import clean_prompt


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
        hidden = text_encoder(read["input_ids"].to(device)).last_hidden_state[0]
        context[: len(hidden)] = hidden.to(context)
    return contexts


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
