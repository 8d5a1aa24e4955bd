"""Wan's text encoder and VAE, tiny and random: the same numbers as diffusers, chunk by chunk."""

from __future__ import annotations

import gc
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import noise
from tiny_wan import LATENT_SIZE, PROMPT, TEXT_DIM, tiny_wide_vae, wan_latents
from torch import Tensor, nn

from vmla_convert.config import MediaConfig, ModelConfig
from vmla_convert.media import wan as module
from vmla_convert.media.open import open_media
from vmla_convert.media.prompts import EncodedPrompts
from vmla_convert.media.wan import WanMedia

pytest_plugins = ["tiny_wan"]


def opened(config: ModelConfig, folder: Path, **how: Any) -> WanMedia:
    media = open_media(config, MediaConfig(str(folder), **how))
    assert isinstance(media, WanMedia)
    return media


@pytest.fixture
def tiled(wan_config: ModelConfig, wan_folder: Path, monkeypatch: pytest.MonkeyPatch) -> WanMedia:
    """Tiles of 32 pixels with an overlap of 16."""
    monkeypatch.setattr(module, "TILE_PIXELS", 32)
    monkeypatch.setattr(module, "TILE_OVERLAP", 16)
    return opened(wan_config, wan_folder, vae_tiling=True)


def reference_vae(media: WanMedia) -> tuple[Any, Tensor, Tensor]:
    """diffusers' own VAE, with mean and deviation of its latents (B, C, F, h, w)."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    vae: Any = AutoencoderKLWan.from_pretrained(media.components.folder("vae"))
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return vae, mean, deviation


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).square().mean() / wanted.square().mean()).item()


# Text


def test_contexts_are_those_of_diffusers(wan_media: WanMedia, wan_folder: Path) -> None:
    """diffusers pads and masks the prompts, we encode each alone: equal up to rounding."""
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    prompts = [PROMPT, "", " two  dogs\n&amp;amp; a “city” at night " * 3]
    expected, _ = WanPipeline.from_pretrained(wan_folder).encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=512
    )
    contexts = wan_media.encode_prompts(prompts)
    assert contexts.shape == (3, 512, TEXT_DIM)
    torch.testing.assert_close(contexts, expected, atol=1e-5, rtol=1e-4)
    length = int(contexts[0].any(-1).sum())
    assert 1 < length < 100
    assert contexts[0, :length].any(-1).all() and not contexts[0, length:].any()


def test_a_long_prompt_is_cut(wan_media: WanMedia) -> None:
    context = wan_media.encode_prompts(["cat " * 2000])
    assert context.shape == (1, 512, TEXT_DIM)
    assert context.any(-1).all()


def test_the_text_encoder_is_freed_when_all_prompts_are_encoded(
    wan_config: ModelConfig, wan_folder: Path, wan_media: WanMedia
) -> None:
    own = opened(wan_config, wan_folder)
    held = weakref.ref(own.component("text_encoder"))
    encoded = EncodedPrompts(own, [PROMPT, "two dogs", PROMPT])
    gc.collect()
    assert held() is None
    again = ["two dogs", PROMPT]
    expected = wan_media.encode_prompts(again)
    assert torch.equal(encoded.encode_prompts(again), expected)
    assert torch.equal(own.encode_prompts(again), expected)


# Decoding


@pytest.mark.parametrize("sizes", [[1, 1, 1], [2, 1], [1, 2]])
def test_decoding_in_chunks_equals_whole_to_the_bit(sizes: list[int], wan_media: WanMedia) -> None:
    clip, decoder = wan_latents(3, batch=2), wan_media.decoder()
    parts = [decoder.decode(part) for part in clip.split(sizes, dim=1)]
    assert [p.shape[1] for p in parts] == [4 * n - 3 * (not i) for i, n in enumerate(sizes)]
    assert torch.equal(torch.cat(parts, dim=1), wan_media.decode(clip))


@pytest.mark.parametrize("wide", [False, True], ids=["wan2.1", "wan2.2"])
def test_decoding_is_that_of_diffusers_to_the_bit(
    wide: bool, wan_media: WanMedia, wan_folder: Path, wan_config: ModelConfig, tmp_path: Path
) -> None:
    media = wan_media
    if wide:
        for part in ("text_encoder", "tokenizer"):
            shutil.copytree(wan_folder / part, tmp_path / part)
        tiny_wide_vae().save_pretrained(tmp_path / "vae")
        geometry = replace(wan_config.geometry, in_dim=48, out_dim=48)
        media = opened(replace(wan_config, geometry=geometry, frames_per_second=24), tmp_path)
        assert media.pixel_shape(4, LATENT_SIZE) == (13, 64, 96)
        assert media.frames_per_second == 24
    vae, mean, deviation = reference_vae(media)
    clip = noise(2, 3, 48 if wide else 16, *LATENT_SIZE)
    with torch.no_grad():
        expected = vae.decode(clip.transpose(1, 2) * deviation + mean).sample.transpose(1, 2)
    assert expected.std() > 0.1
    assert torch.equal(media.decode(clip), expected)


def test_videos_decoded_in_turns_do_not_mix(wan_media: WanMedia) -> None:
    clips = [wan_latents(3, seed=seed) for seed in (1, 2)]
    decoders = [wan_media.decoder() for _ in clips]
    made: list[list[Tensor]] = [[], []]
    for frame in range(3):
        for clip, decoder, parts in zip(clips, decoders, made, strict=True):
            parts.append(decoder.decode(clip[:, frame : frame + 1]))
            wan_media.encode(noise(1, 5, 3, 32, 48).clamp(-1, 1))
    for clip, parts in zip(clips, made, strict=True):
        assert torch.equal(torch.cat(parts, dim=1), wan_media.decode(clip))


def test_a_decoder_remembers_no_more_of_a_longer_video(wan_media: WanMedia) -> None:
    decoder: Any = wan_media.decoder()

    def held() -> int:
        return sum(t.nbytes for t in decoder._features[0].values() if isinstance(t, Tensor))

    sizes = [held() for _ in range(6) if decoder.decode(wan_latents(1)) is not None]
    assert sizes[2] > 0 and set(sizes[2:]) == {sizes[2]}


def test_decoding_in_tiles_is_near_and_streams(wan_media: WanMedia, tiled: WanMedia) -> None:
    clip = wan_latents(2)
    whole, decoder = tiled.decode(clip), tiled.decoder()
    parts = [decoder.decode(part) for part in clip.split(1, dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    # In a tile, attention and borders see less of the frame, so the result is near, not equal.
    assert 0 < relative_error(whole, wan_media.decode(clip)) < 0.2


def test_one_tile_that_covers_the_frame_changes_nothing(
    wan_config: ModelConfig, wan_folder: Path, wan_media: WanMedia
) -> None:
    tiled = opened(wan_config, wan_folder, vae_tiling=True)
    assert torch.equal(tiled.decode(wan_latents(2)), wan_media.decode(wan_latents(2)))


# Encoding


def test_encoding_is_that_of_diffusers_normalised(wan_media: WanMedia) -> None:
    video = noise(2, 9, 3, 32, 48).clamp(-1, 1)
    vae, mean, deviation = reference_vae(wan_media)
    with torch.no_grad():
        modes = vae.encode(video.transpose(1, 2)).latent_dist.mode()
    found = wan_media.encode(video)
    assert found.shape == (2, 3, 16, *LATENT_SIZE)
    torch.testing.assert_close(found.transpose(1, 2) * deviation + mean, modes)


def test_encoding_takes_the_frames_of_pixel_shape(wan_media: WanMedia) -> None:
    for frames in (1, 2, 3):
        pixels, height, width = wan_media.pixel_shape(frames, LATENT_SIZE)
        assert (pixels, height, width) == (4 * frames - 3, 32, 48)
        assert wan_media.encode(torch.zeros(1, pixels, 3, height, width)).shape[1] == frames


def test_encoding_in_tiles_is_near(wan_media: WanMedia, tiled: WanMedia) -> None:
    video = noise(1, 5, 3, 32, 48).clamp(-1, 1)
    assert 0 < relative_error(tiled.encode(video), wan_media.encode(video)) < 0.2


# Precision and place


def test_components_may_be_bfloat16(
    wan_config: ModelConfig, wan_folder: Path, wan_media: WanMedia
) -> None:
    half = open_media(wan_config, MediaConfig(str(wan_folder)), dtype=torch.bfloat16)
    assert half.encode_prompts([PROMPT]).dtype == torch.bfloat16
    pixels = half.decode(wan_latents(2))
    assert pixels.dtype == torch.float32
    assert (pixels - wan_media.decode(wan_latents(2))).abs().mean() < 0.05


# Two names of the same memory, so that the test sees moves between them.
DEVICE, HOST = torch.device("cpu", 0), torch.device("cpu")


@pytest.mark.parametrize("offload", [False, True])
def test_components_may_stay_in_host_memory(
    offload: bool, wan_config: ModelConfig, wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = open_media(wan_config, MediaConfig(str(wan_folder), cpu_offload=offload), device=DEVICE)
    places: dict[str, list[torch.device]] = {}
    move = nn.Module.to

    def to(self: nn.Module, place: Any) -> nn.Module:
        places.setdefault(type(self).__name__, []).append(torch.device(place))
        return move(self, place)

    monkeypatch.setattr(nn.Module, "to", to)
    media.encode_prompts([PROMPT])
    media.decode(wan_latents(1))
    media.encode(torch.zeros(1, 1, 3, 32, 48))
    work = [DEVICE, HOST] if offload else [DEVICE]
    loaded = HOST if offload else DEVICE
    assert places == {
        "UMT5EncoderModel": [loaded, *work],
        "AutoencoderKLWan": [loaded, *work, *work],
    }
