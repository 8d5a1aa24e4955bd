"""The demo media loses nothing, and prompts name exactly one digit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import noise, tiny_config

from vmla_convert.errors import ConfigError, VmlaError
from vmla_convert.media.base import latent_frames_per_second
from vmla_convert.media.demo import DIGIT_WORDS, DemoMedia, require_demo_media
from vmla_convert.media.open import check_prompts, open_media

MEDIA = DemoMedia()


def test_a_latent_pixel_holds_its_own_four_pixels() -> None:
    video = noise(2, 3, 3, 6, 8)
    latents, decoder = MEDIA.encode(video), MEDIA.decoder()
    assert latents.shape == (2, 3, 12, 3, 4)
    assert torch.equal(MEDIA.decode(latents), video)
    assert torch.equal(torch.cat([decoder.decode(part) for part in latents.split(2, 1)], 1), video)
    video = torch.zeros(1, 1, 3, 6, 8)
    video[..., 2:4, 4:6] = 1
    latents = MEDIA.encode(video)
    assert (latents[..., 1, 2] == 1).all()
    assert latents.sum() == 12


@pytest.mark.parametrize("digit", [0, 7])
def test_a_digit_has_a_numeral_and_a_word(digit: int) -> None:
    word = DIGIT_WORDS[digit]
    prompts = [str(digit), word, f"A bouncing {word.upper()}!", f"the digit {digit}, {word}"]
    contexts = MEDIA.encode_prompts(prompts)
    assert contexts.shape == (4, 1, 10)
    assert (contexts.argmax(-1) == digit).all()
    assert (contexts.count_nonzero(dim=-1) == 1).all()
    torch.testing.assert_close(contexts.square().mean(-1), torch.ones(4, 1))
    assert torch.equal(contexts[:1], MEDIA.encode_labels(torch.tensor([digit])))


@pytest.mark.parametrize("prompt", ["", "a cat", "3 or 4", "one and 2", "12", "seventy", "someone"])
def test_a_prompt_without_one_digit_is_refused(prompt: str) -> None:
    with pytest.raises(VmlaError, match=repr(prompt)):
        MEDIA.encode_prompts(["5", prompt])
    config = tiny_config()
    check_prompts(config, [prompt])
    with pytest.raises(VmlaError, match=repr(prompt)):
        check_prompts(dataclasses.replace(config, media="demo"), ["7", prompt])


def test_a_model_names_its_media() -> None:
    config = tiny_config()
    assert isinstance(open_media(dataclasses.replace(config, media="demo")), DemoMedia)
    with pytest.raises(ConfigError, match="text encoder and VAE") as caught:
        open_media(config)
    assert "media.base" in caught.value.hint
    with pytest.raises(ConfigError, match="calibration") as caught:
        require_demo_media(config, "calibration")
    assert "--data" in caught.value.hint


def test_time_is_counted_in_latent_frames() -> None:
    config = tiny_config()
    fast = dataclasses.replace(config, frames_per_second=24)
    demo = dataclasses.replace(config, media="demo", frames_per_second=8)
    rates = [latent_frames_per_second(c) for c in (config, fast, demo)]
    assert rates == [4, 6, 8]
    assert open_media(demo).frames_per_second == 8
