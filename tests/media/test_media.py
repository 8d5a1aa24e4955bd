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


def test_decoding_undoes_encoding() -> None:
    video = noise(2, 3, 3, 6, 8)
    latents = MEDIA.encode(video)
    assert latents.shape == (2, 3, 12, 3, 4)
    assert torch.equal(MEDIA.decode(latents), video)


def test_a_latent_pixel_holds_its_own_four_pixels() -> None:
    video = torch.zeros(1, 1, 3, 6, 8)
    video[..., 2:4, 4:6] = 1
    latents = MEDIA.encode(video)
    assert (latents[..., 1, 2] == 1).all()
    assert latents.sum() == 12


@pytest.mark.parametrize("digit", range(10))
def test_a_digit_has_a_numeral_and_a_word(digit: int) -> None:
    word = DIGIT_WORDS[digit]
    prompts = [str(digit), word, f"A bouncing {word.upper()}!", f"the digit {digit}, {word}"]
    contexts = MEDIA.encode_prompts(prompts)
    assert contexts.shape == (4, 1, 10)
    assert (contexts.argmax(-1) == digit).all()
    assert (contexts.count_nonzero(dim=-1) == 1).all()
    torch.testing.assert_close(contexts.square().mean(-1), torch.ones(4, 1))


def test_prompts_and_labels_agree() -> None:
    assert torch.equal(
        MEDIA.encode_prompts(["seven", "0", "a 3"]), MEDIA.encode_labels(torch.tensor([7, 0, 3]))
    )


@pytest.mark.parametrize("prompt", ["", "a cat", "3 or 4", "one and 2", "12", "seventy", "someone"])
def test_a_prompt_without_one_digit_is_refused(prompt: str) -> None:
    with pytest.raises(VmlaError, match="must name one digit") as caught:
        MEDIA.encode_prompts(["5", prompt])
    assert "--prompt" in caught.value.hint


def test_a_model_names_its_media() -> None:
    config = tiny_config()
    assert isinstance(open_media(dataclasses.replace(config, media="demo")), DemoMedia)
    with pytest.raises(ConfigError, match="no text encoder and VAE are known") as caught:
        open_media(config)
    assert "--base" in caught.value.hint
    with pytest.raises(ConfigError, match="calibration needs") as caught:
        require_demo_media(config, "calibration")
    assert "--no-calibration" in caught.value.hint


def test_prompts_are_checked_as_their_media_reads_them() -> None:
    config = tiny_config()
    check_prompts(config, ["a cat", "7"])
    with pytest.raises(VmlaError, match="'a cat' must name one digit"):
        check_prompts(dataclasses.replace(config, media="demo"), ["7", "a cat"])


def test_time_is_counted_in_latent_frames() -> None:
    config = tiny_config()
    fast = dataclasses.replace(config, frames_per_second=24)
    demo = dataclasses.replace(config, media="demo", frames_per_second=8)
    rates = [latent_frames_per_second(c) for c in (config, fast, demo)]
    assert rates == [4, 6, 8]
    assert open_media(demo).frames_per_second == 8


def test_the_demo_decodes_chunk_by_chunk_as_whole() -> None:
    latents, decoder = noise(2, 3, 12, 3, 4), MEDIA.decoder()
    parts = [decoder.decode(part) for part in latents.split(2, dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), MEDIA.decode(latents))
