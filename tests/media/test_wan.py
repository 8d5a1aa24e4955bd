"""Wan's own components, tiny and random: prompts in, video out, chunk by chunk as whole."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from checkpoints import Vmla, refused
from conftest import noise
from PIL import Image
from safetensors.torch import load_file
from tiny_wan import LATENT_SIZE, SETTINGS, TEXT_DIM, tiny_wide_vae
from torch import Tensor, nn

from vmla_convert.config import (
    ConvertConfig,
    DataConfig,
    GenerateConfig,
    Geometry,
    MediaConfig,
    ModelConfig,
    Sizes,
    SourceConfig,
)
from vmla_convert.errors import CheckpointError, ConfigError, MissingExtraError, OutputError
from vmla_convert.fitting.convert import convert
from vmla_convert.generating.film import check_video_path, write_film
from vmla_convert.generating.generate import Switch, generate
from vmla_convert.generating.make_clips import prepare_clips
from vmla_convert.generating.prefix import prefix_chunks, read_prefix
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading import load as loading
from vmla_convert.loading.load import load, open_named
from vmla_convert.measuring.compare import compare
from vmla_convert.media import wan as pipeline
from vmla_convert.media.base import Media
from vmla_convert.media.clips import open_clips
from vmla_convert.media.components import Components, find_components
from vmla_convert.media.open import open_media
from vmla_convert.media.prompts import EncodedPrompts, clean_prompt
from vmla_convert.media.video import partial_path, read_frames, write_mp4, write_png
from vmla_convert.media.wan import WanMedia

pytest_plugins = ["checkpoints", "tiny_wan"]

PROMPT = "a cat walks on a red roof"
SET = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.fixture(scope="module")
def source(wan_folder: Path) -> SourceConfig:
    return SourceConfig(str(wan_folder), overrides=SETTINGS)


@pytest.fixture(scope="module")
def config(source: SourceConfig) -> ModelConfig:
    return open_named(source).config


@pytest.fixture(scope="module")
def media(config: ModelConfig, wan_folder: Path) -> WanMedia:
    opened = open_media(config, MediaConfig(str(wan_folder)))
    assert isinstance(opened, WanMedia)
    return opened


@pytest.fixture(scope="module")
def converted(source: SourceConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan_latent") / "converted"
    convert(source, folder, ConvertConfig(calibrate=False, size=Sizes(cut=0.5)))
    return folder


@pytest.fixture(params=["dense", "converted"])
def model(request: pytest.FixtureRequest, source: SourceConfig, converted: Path) -> CausalWanModel:
    return load(source if request.param == "dense" else converted)


def latents(frames: int, batch: int = 1, seed: int = 0) -> Tensor:
    return noise(batch, frames, 16, *LATENT_SIZE, seed=seed)


def reference_vae(media: WanMedia) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(media.components.folder("vae"))


def wide_media(wan_folder: Path, config: ModelConfig, folder: Path) -> WanMedia:
    """Wan 2.2's VAE beside the tiny text encoder."""
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(wan_folder / part, folder / part)
    tiny_wide_vae().save_pretrained(folder / "vae")
    geometry = replace(config.geometry, in_dim=48, out_dim=48)
    wide = replace(config, geometry=geometry, frames_per_second=24)
    opened = open_media(wide, MediaConfig(str(folder)))
    assert isinstance(opened, WanMedia)
    return opened


class TestText:
    def test_is_what_diffusers_makes_of_it(self, media: WanMedia, wan_folder: Path) -> None:
        """Padded and masked there, read alone here: equal to rounding."""
        from diffusers.pipelines.wan.pipeline_wan import WanPipeline

        prompts = [PROMPT, "", " two  dogs\n&amp;amp; a “city” at night " * 3]
        whole = WanPipeline.from_pretrained(wan_folder)
        expected, _ = whole.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=512
        )
        contexts = media.encode_prompts(prompts)
        assert contexts.shape == (3, 512, TEXT_DIM)
        torch.testing.assert_close(contexts, expected, atol=1e-5, rtol=1e-4)

    def test_is_zero_after_its_end(self, media: WanMedia) -> None:
        context = media.encode_prompts([PROMPT])[0]
        length = int(context.any(-1).sum())
        assert 1 < length < 100
        assert context[:length].any(-1).all() and not context[length:].any()

    def test_that_is_too_long_is_cut(self, media: WanMedia) -> None:
        context = media.encode_prompts(["cat " * 2000])
        assert context.shape == (1, 512, TEXT_DIM)
        assert context.any(-1).all()

    def test_is_cleaned(self) -> None:
        assert clean_prompt("  a\n\tcat &amp;lt;3 dâ€™oh ") == "a cat <3 d'oh"


class TestDecoding:
    @pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1], [3, 2], [1, 3, 1], [5]])
    def test_in_chunks_equals_whole_to_the_bit(self, sizes: list[int], media: WanMedia) -> None:
        clip, decoder = latents(5, batch=2), media.decoder()
        parts = [decoder.decode(part) for part in clip.split(sizes, dim=1)]
        assert [p.shape[1] for p in parts] == [4 * n - 3 * (not i) for i, n in enumerate(sizes)]
        assert torch.equal(torch.cat(parts, dim=1), media.decode(clip))

    def test_is_diffusers_own_to_the_bit(self, media: WanMedia) -> None:
        vae, clip = reference_vae(media), latents(4, batch=2)
        mean, deviation = (
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        with torch.no_grad():
            expected = vae.decode(clip.transpose(1, 2) * deviation + mean).sample
        pixels = media.decode(clip)
        assert pixels.shape == (2, 13, 3, 32, 48)
        assert pixels.std() > 0.1
        assert torch.equal(pixels, expected.transpose(1, 2))

    def test_in_turns_does_not_mix_videos(self, media: WanMedia) -> None:
        clips = [latents(4, seed=seed) for seed in (1, 2)]
        decoders = [media.decoder() for _ in clips]
        made: list[list[Tensor]] = [[], []]
        for frame in range(4):
            for clip, decoder, parts in zip(clips, decoders, made, strict=True):
                parts.append(decoder.decode(clip[:, frame : frame + 1]))
                media.encode(noise(1, 5, 3, 32, 48).clamp(-1, 1))
        for clip, parts in zip(clips, made, strict=True):
            assert torch.equal(torch.cat(parts, dim=1), media.decode(clip))

    def test_remembers_no_more_of_a_longer_video(self, media: WanMedia) -> None:
        decoder: Any = media.decoder()

        def held() -> int:
            return sum(t.nbytes for t in decoder._features[0].values() if isinstance(t, Tensor))

        sizes = [held() for _ in range(8) if decoder.decode(latents(1)) is not None]
        assert sizes[2] > 0 and set(sizes[2:]) == {sizes[2]}

    def test_of_wan_2_2_is_diffusers_own_too(
        self, wan_folder: Path, config: ModelConfig, tmp_path: Path
    ) -> None:
        media = wide_media(wan_folder, config, tmp_path)
        clip, decoder = noise(1, 4, 48, *LATENT_SIZE), media.decoder()
        assert media.pixel_shape(4, LATENT_SIZE) == (13, 64, 96)
        assert media.frames_per_second == 24
        pixels = torch.cat([decoder.decode(part) for part in clip.split(1, dim=1)], dim=1)
        vae = reference_vae(media)
        mean, deviation = (
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        with torch.no_grad():
            expected = vae.decode(clip.transpose(1, 2) * deviation + mean).sample
        assert torch.equal(pixels, expected.transpose(1, 2))

    def test_in_tiles_is_near_and_streams(
        self, config: ModelConfig, wan_folder: Path, media: Media, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tiled = open_media(config, MediaConfig(str(wan_folder), vae_tiling=True))
        clip = latents(3)
        assert torch.equal(tiled.decode(clip), media.decode(clip))  # one tile covers it
        monkeypatch.setattr(pipeline, "TILE_PIXELS", 32)
        monkeypatch.setattr(pipeline, "TILE_OVERLAP", 16)
        whole, decoder = tiled.decode(clip), tiled.decoder()
        parts = [decoder.decode(part) for part in clip.split(1, dim=1)]
        assert torch.equal(torch.cat(parts, dim=1), whole)
        # Attention and borders see less of the frame in a tile, so this is near, not equal.
        error = (whole - media.decode(clip)).square().mean() / media.decode(clip).square().mean()
        assert 0 < error < 0.2


class TestEncoding:
    def test_is_diffusers_own_normalised(self, media: WanMedia) -> None:
        video, vae = noise(2, 9, 3, 32, 48).clamp(-1, 1), reference_vae(media)
        with torch.no_grad():
            modes = vae.encode(video.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
        got = media.encode(video)
        assert got.shape == (2, 3, 16, *LATENT_SIZE)
        mean, deviation = (
            torch.tensor(values).view(-1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        torch.testing.assert_close(got * deviation + mean, modes)

    def test_takes_the_frames_that_pixel_shape_tells(self, media: WanMedia) -> None:
        for frames in (1, 2, 5):
            pixels, height, width = media.pixel_shape(frames, LATENT_SIZE)
            assert (pixels, height, width) == (4 * frames - 3, 32, 48)
            assert media.encode(torch.zeros(1, pixels, 3, height, width)).shape[1] == frames

    def test_in_tiles_is_near(
        self, config: ModelConfig, wan_folder: Path, media: Media, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipeline, "TILE_PIXELS", 32)
        monkeypatch.setattr(pipeline, "TILE_OVERLAP", 16)
        tiled = open_media(config, MediaConfig(str(wan_folder), vae_tiling=True))
        video = noise(1, 5, 3, 32, 48).clamp(-1, 1)
        whole = media.encode(video)
        error = (tiled.encode(video) - whole).square().mean() / whole.square().mean()
        assert 0 < error < 0.2


# The same memory by another name, so that moves between the two can be told apart.
DEVICE, HOST = torch.device("cpu", 0), torch.device("cpu")


@pytest.mark.parametrize("offload", [False, True])
def test_components_may_stay_in_host_memory(
    offload: bool, config: ModelConfig, wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brought to the device for as long as they work, or once for all."""
    how = MediaConfig(str(wan_folder), cpu_offload=offload)
    media = open_media(config, how, device=DEVICE)
    places: dict[str, list[torch.device]] = {}
    move = nn.Module.to

    def to(self: nn.Module, place: Any) -> nn.Module:
        places.setdefault(type(self).__name__, []).append(torch.device(place))
        return move(self, place)

    monkeypatch.setattr(nn.Module, "to", to)
    media.encode_prompts([PROMPT])
    media.decode(latents(1))
    media.encode(torch.zeros(1, 1, 3, 32, 48))
    once = [DEVICE, HOST] if offload else [DEVICE]
    loaded = HOST if offload else DEVICE
    assert places == {
        "UMT5EncoderModel": [loaded, *once],
        "AutoencoderKLWan": [loaded, *once, *once],
    }


class TestTextEncoder:
    """It is several times as large as the video model, and done once all prompts are read."""

    def weights(self, media: Media) -> weakref.ref[nn.Module]:
        assert isinstance(media, WanMedia)
        return weakref.ref(media.component("text_encoder"))

    def test_is_let_go_when_all_prompts_are_read(
        self, config: ModelConfig, wan_folder: Path, media: Media
    ) -> None:
        own = open_media(config, MediaConfig(str(wan_folder)))
        held = self.weights(own)
        read = EncodedPrompts(own, [PROMPT, "two dogs", PROMPT])
        gc.collect()
        assert held() is None
        again = ["two dogs", PROMPT]
        expected = media.encode_prompts(again)
        assert torch.equal(read.encode_prompts(again), expected)
        assert torch.equal(own.encode_prompts(again), expected)

    def test_that_generate_opened_is_gone_before_the_first_chunk(
        self, wan_folder: Path, model: CausalWanModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held: list[weakref.ref[nn.Module]] = []

        def opened(config: ModelConfig, **how: Any) -> Media:
            own = open_media(config, MediaConfig(str(wan_folder)), **how)
            held.append(self.weights(own))
            return own

        monkeypatch.setattr("vmla_convert.generating.generate.open_media", opened)
        chunks = generate(model, PROMPT, frames=4)
        next(chunks)
        gc.collect()
        assert [weights() for weights in held] == [None]
        assert len(list(chunks)) == 1


def test_code_and_pickles_of_a_base_are_not_run(
    config: ModelConfig, wan_folder: Path, tmp_path: Path
) -> None:
    """Anyone can name anything a base."""
    base = tmp_path / "base"
    shutil.copytree(wan_folder, base)
    for part, name in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = base / part / f"{name}.safetensors"
        stem = "pytorch_model" if part == "text_encoder" else name
        torch.save(load_file(file), file.with_name(f"{stem}.bin"))
        file.unlink()
    media = open_media(config, MediaConfig(str(base)))
    with pytest.raises(CheckpointError, match=r"vae/ of .* cannot be loaded"):
        media.decode(latents(1))
    with pytest.raises(CheckpointError, match=r"text_encoder/ of .* cannot be loaded"):
        media.encode_prompts([PROMPT])


def test_components_may_be_bfloat16(config: ModelConfig, wan_folder: Path, media: Media) -> None:
    half = open_media(config, MediaConfig(str(wan_folder)), dtype=torch.bfloat16)
    assert half.encode_prompts([PROMPT]).dtype == torch.bfloat16
    pixels = half.decode(latents(2))
    assert pixels.dtype == torch.float32
    assert (pixels - media.decode(latents(2))).abs().mean() < 0.05


class TestWhereComponentsAre:
    def test_beside_the_checkpoint(self, config: ModelConfig, wan_folder: Path) -> None:
        for place in (wan_folder, wan_folder / "transformer"):
            assert find_components(config, checkpoint=place) == Components(str(wan_folder))

    def test_where_the_user_says(self, config: ModelConfig, wan_folder: Path) -> None:
        assert find_components(config, "owner/name", wan_folder).base == "owner/name"
        assert find_components(config, str(wan_folder)).base == str(wan_folder)

    @pytest.mark.parametrize(
        ("channels", "base_model", "found"),
        [
            (16, "gdhe17/Self-Forcing", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
            (16, "unknown", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
            (16, "Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
            (48, "Efficient-Large-Model/LongLive-2.0-5B", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
        ],
    )
    def test_by_what_is_known(
        self, channels: int, base_model: str, found: str, config: ModelConfig
    ) -> None:
        geometry = Geometry(1536, 8960, 12, 30, channels, channels)
        real = replace(config, geometry=geometry, base_model=base_model)
        assert find_components(real).base == found

    def test_each_part_for_itself(
        self, config: ModelConfig, wan_folder: Path, media: Media, tmp_path: Path
    ) -> None:
        """A VAE of one's own beside the checkpoint, the rest as known."""
        real = replace(config, geometry=Geometry(1536, 8960, 12, 30, 16, 16))
        shutil.copytree(wan_folder / "transformer", tmp_path / "model")
        vae = shutil.copytree(wan_folder / "vae", tmp_path / "model" / "vae")
        found = find_components(real, checkpoint=tmp_path / "model")
        assert found == Components("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", {"vae": vae})
        assert found.folder("vae") == vae
        own = WanMedia(
            config, Components(str(wan_folder), {"vae": vae}), MediaConfig(), HOST, torch.float32
        )
        assert torch.equal(own.decode(latents(1)), media.decode(latents(1)))
        assert str(vae.parent) in own.name and str(wan_folder) in own.name

    def test_nowhere(self, config: ModelConfig, converted: Path, tmp_path: Path) -> None:
        (tmp_path / "vae").mkdir()
        for base, error in ((None, ConfigError), ("no/such/place", CheckpointError),
                            (str(tmp_path), CheckpointError)):  # fmt: skip
            with pytest.raises(error) as caught:
                find_components(config, base, converted)
            assert "--base" in caught.value.hint

    @pytest.mark.parametrize("package", pipeline.PACKAGES)
    def test_need_the_extra(
        self, package: str, source: SourceConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened = open_named(source)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtraError) as caught:
            open_media(opened.config, checkpoint=opened.source.path)
        assert "[wan]" in caught.value.hint

    @pytest.mark.parametrize("part", ["vae", "text_encoder"])
    def test_of_another_model_are_refused(
        self, part: str, config: ModelConfig, wan_folder: Path, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(wan_folder, tmp_path / "other")
        file = folder / part / "config.json"
        table = json.loads(file.read_text())
        file.write_text(json.dumps({**table, "z_dim": 48, "d_model": 4096}))
        with pytest.raises(ConfigError, match=rf"{part} .* makes .* (48|4096)") as caught:
            open_media(config, MediaConfig(str(folder)))
        assert "--base" in caught.value.hint

    @pytest.mark.parametrize("damage", ["gone", "cut", "lacking", "table"])
    @pytest.mark.parametrize("part", ["vae", "text_encoder"])
    def test_that_are_damaged_are_named(
        self, part: str, damage: str, config: ModelConfig, wan_folder: Path, tmp_path: Path
    ) -> None:
        from safetensors.torch import save_file

        folder = shutil.copytree(wan_folder, tmp_path / "damaged")
        (file,) = (folder / part).glob("*.safetensors")
        if damage == "gone":
            file.unlink()
        elif damage == "cut":
            file.write_bytes(file.read_bytes()[:-100])
        elif damage == "table":
            (folder / part / "config.json").write_text("[]")
        else:
            tensors = load_file(file)
            del tensors[max(tensors)]
            save_file(tensors, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=part) as caught:
            media = open_media(config, MediaConfig(str(folder)))
            media.encode_prompts([PROMPT]) if part != "vae" else media.decode(latents(1))
        assert caught.value.hint


class TestGenerating:
    def test_is_decided_by_the_seed(self, model: CausalWanModel, media: Media) -> None:
        def made(seed: int) -> Tensor:
            return torch.cat(list(generate(model, PROMPT, 6, seed, text=media)), dim=1)

        assert torch.equal(made(3), made(3))
        assert not torch.equal(made(3), made(4))
        assert made(3).shape == (1, 6, 16, *LATENT_SIZE)

    def test_obeys_its_prompts(self, model: CausalWanModel, media: Media) -> None:
        clips = [list(generate(model, p, 4, text=media)) for p in (PROMPT, "two dogs")]
        assert not torch.equal(clips[0][0], clips[1][0])
        switched = list(generate(model, PROMPT, 4, switches=[Switch(2, ["two dogs"])], text=media))
        assert torch.equal(switched[0], clips[0][0])
        assert not torch.equal(switched[1], clips[0][1])

    def test_reads_all_prompts_once_before_the_first_chunk(
        self, model: CausalWanModel, media: Media
    ) -> None:
        read: list[list[str]] = []

        class Counting:
            def encode_prompts(self, prompts: list[str]) -> Tensor:
                read.append(prompts)
                return media.encode_prompts(prompts)

        chunks = generate(model, PROMPT, 8, switches=[Switch(4, ["a city"])], text=Counting())
        next(chunks)
        assert read == [[PROMPT, "a city"]]
        assert len(list(chunks)) == 3 and len(read) == 1


class TestPrefix:
    @pytest.mark.parametrize(
        ("given", "sizes"), [(1, [1]), (2, [2]), (3, [1, 2]), (4, [2, 2]), (5, [1, 2, 2])]
    )
    def test_is_written_with_its_rest_first(self, given: int, sizes: list[int]) -> None:
        clean = latents(given)
        chunks = prefix_chunks(clean, 2)
        assert [chunk.shape[1] for chunk in chunks] == sizes
        assert torch.equal(torch.cat(chunks, dim=1), clean)

    @pytest.mark.parametrize("given", [1, 2, 3, 7])
    def test_begins_the_clip_and_is_gone_on_from(
        self, given: int, model: CausalWanModel, media: Media
    ) -> None:
        def made(prefix: Tensor | None, frames: int = given + 3) -> Tensor:
            chunks = generate(model, [PROMPT, "a city"], frames, text=media, prefix=prefix)
            return torch.cat(list(chunks), dim=1)

        prefix = latents(given)
        clip = made(prefix)
        assert clip.shape[:2] == (2, given + 3)
        assert torch.equal(clip[:, :given], prefix.expand(2, -1, -1, -1, -1))
        # The noise is that of the same clip without a prefix: what differs is the past.
        assert not torch.equal(clip[:, given:], made(None, 3))
        assert not torch.equal(clip[:, given:], made(latents(given, seed=9))[:, given:])

    def test_of_what_was_generated_goes_on_as_before(
        self, model: CausalWanModel, media: Media, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whole chunks in the cache are the same, whether generated or given."""
        from vmla_convert.generating import generate as module

        whole = torch.cat(list(generate(model, PROMPT, 8, text=media)), dim=1)
        seeded = module.seeded
        monkeypatch.setattr(module, "seeded", lambda seed, i, name: seeded(seed, i + 2, name))
        again = generate(model, PROMPT, 8, text=media, prefix=whole[:, :4])
        assert torch.equal(torch.cat(list(again), dim=1), whole)

    def test_needs_room_in_the_clip(self, model: CausalWanModel, media: Media) -> None:
        for frames in (2, 3):
            with pytest.raises(ConfigError, match="at least 4") as caught:
                next(generate(model, PROMPT, frames, text=media, prefix=latents(3)))
            assert caught.value.hint

    def test_may_be_followed_by_another_prompt(self, model: CausalWanModel, media: Media) -> None:
        switch = Switch(5, ["two dogs"])
        plain, other = (
            torch.cat(list(generate(model, PROMPT, 9, 0, None, s, media, latents(3))), dim=1)
            for s in ((), (switch,))
        )
        assert torch.equal(plain[:, :5], other[:, :5])
        assert not torch.equal(plain[:, 5:], other[:, 5:])

    def test_is_read_from_an_image(self, media: Media, tmp_path: Path) -> None:
        Image.new("RGB", (200, 90), (255, 0, 0)).save(tmp_path / "red.jpg")
        red = torch.tensor([1.0, -1, -1]).view(1, 1, 3, 1, 1).expand(1, 1, 3, 32, 48)
        got = read_prefix(tmp_path / "red.jpg", media, LATENT_SIZE, 4)
        torch.testing.assert_close(got, media.encode(red), atol=0.05, rtol=0)

    @pytest.mark.parametrize(("frames", "given"), [(1, 1), (4, 1), (5, 2), (12, 3)])
    def test_is_the_end_of_a_video(
        self, frames: int, given: int, media: Media, tmp_path: Path
    ) -> None:
        write_mp4(tmp_path / "a.mp4", noise(frames, 3, 32, 48).clamp(-1, 1), scale=1)
        pixels = torch.stack(list(read_frames(tmp_path / "a.mp4")))[-(4 * given - 3) :]
        got = read_prefix(tmp_path / "a.mp4", media, LATENT_SIZE, 8)
        assert torch.equal(got, media.encode(pixels[None]))

    def test_that_cannot_be_read_is_named(self, media: Media, tmp_path: Path) -> None:
        (tmp_path / "text.png").write_text("no image")
        write_mp4(tmp_path / "long.mp4", torch.zeros(9, 3, 32, 48), scale=1)
        for name in ("nowhere.png", "text.png", "long.mp4"):
            with pytest.raises(ConfigError, match=name) as caught:
                read_prefix(tmp_path / name, media, LATENT_SIZE, 3)
            assert caught.value.hint


def test_a_comparison_shows_and_scores_nothing(
    source: SourceConfig, converted: Path, media: Media, tmp_path: Path
) -> None:
    """Scores need the ground truth that only the demo world has."""
    config = GenerateConfig((PROMPT,), frames=3)
    models = load(source), load(converted)
    assert compare(*models, config, tmp_path / "a.mp4", media=media) == []
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.png"}


class TestFilm:
    def test_shows_the_first_frame_before_the_second_chunk(
        self, media: Media, tmp_path: Path
    ) -> None:
        seen: list[bool] = []

        def chunks() -> Iterator[Tensor]:
            for chunk in latents(6).split(2, dim=1):
                seen.append((tmp_path / "a.png").is_file())
                assert not (tmp_path / "a.mp4").exists()
                yield chunk

        paths = write_film(tmp_path / "a.mp4", chunks(), media)
        assert seen == [False, True, True]
        assert [path.name for path in paths] == ["a.mp4", "a.png"]
        first = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)
        expected = (media.decode(latents(6))[0, 0] + 1) * 127.5
        assert (first - expected).abs().max() <= 0.5 + 1e-3
        with av.open(str(tmp_path / "a.mp4")) as file:
            stream = file.streams.video[0]
            assert stream.average_rate == 16
            assert (stream.height, stream.width, len(list(file.decode(stream)))) == (32, 48, 21)

    def test_takes_one_chunk_at_a_time(
        self, media: Media, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A chunk's pixels are gone before the next chunk but one is made."""
        made: list[weakref.ref[Tensor]] = []
        decoder = media.decoder()

        class Watched:
            def decode(self, latents: Tensor) -> Tensor:
                pixels = decoder.decode(latents)
                made.append(weakref.ref(pixels))
                return pixels

        def chunks() -> Iterator[Tensor]:
            for _ in range(4):
                assert all(pixels() is None for pixels in made[:-1])
                yield latents(1)

        monkeypatch.setattr(media, "decoder", Watched)
        write_film(tmp_path / "a.mp4", chunks(), media)
        assert len(made) == 4

    def test_is_begun_anew_where_one_was_killed(self, media: Media, tmp_path: Path) -> None:
        video, picture = tmp_path / "a.mp4", tmp_path / "a.png"
        picture.write_text("a first frame")
        with pytest.raises(OutputError, match=r"a\.png exists"):
            check_video_path(video)
        partial_path(video).write_text("some frames")
        check_video_path(video)
        write_film(video, iter([latents(1)]), media)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.png"]
        with pytest.raises(OutputError, match=r"a\.mp4 exists"):
            check_video_path(video)

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "weights cannot be read")])
    def test_leaves_nothing_when_it_fails(
        self, error: BaseException, media: Media, tmp_path: Path
    ) -> None:
        """What made the frames fail is told, and not taken for a fault of the film's."""

        def chunks() -> Iterator[Tensor]:
            yield latents(1)
            raise error

        with pytest.raises(type(error)) as caught:
            write_film(tmp_path / "a.mp4", chunks(), media)
        assert caught.value is error
        assert not list(tmp_path.iterdir())


class TestClips:
    def test_of_its_own_are_sampled(
        self, source: SourceConfig, media: Media, tmp_path: Path
    ) -> None:
        dense = load(source)
        data = DataConfig("self", frames=4, clips=4, prompts=(PROMPT, "two dogs"))
        prepared = prepare_clips(data, dense, tmp_path / "clips", "origin", media=media)
        batch = open_clips(prepared).batch(0, 2)
        assert batch.latents.shape == (2, 4, 16, *LATENT_SIZE)
        assert batch.context.shape == (2, 512, TEXT_DIM)

    def test_of_videos_are_encoded_with_one_frame_first(
        self, source: SourceConfig, media: Media, tmp_path: Path, wan_folder: Path
    ) -> None:
        videos = tmp_path / "videos"
        write_mp4(videos / "a.mp4", noise(27, 3, 32, 48).clamp(-1, 1), scale=1)
        data = DataConfig(str(videos), frames=4, prompts=(PROMPT,), base=str(wan_folder))
        prepare_clips(data, load(source), tmp_path / "clips", "origin")
        (file,) = (tmp_path / "clips").glob("*.safetensors")
        stored, pixels = load_file(file), torch.stack(list(read_frames(videos / "a.mp4")))
        # 27 frames are two clips of 13 = 1 + 3 * 4, and one frame left.
        for clip, start in zip(stored["latents"], (0, 13), strict=True):
            assert torch.equal(clip, media.encode(pixels[None, start : start + 13])[0])
        assert torch.equal(stored["context"], media.encode_prompts([PROMPT, PROMPT]))

    def test_calibrate_recover_and_measure(
        self, tmp_path: Path, vmla: Vmla, wan_folder: Path
    ) -> None:
        (tmp_path / "prompts.txt").write_text(f"{PROMPT}\ntwo dogs\n")
        clips, out, again = (tmp_path / name for name in ("out.clips", "mla", "out"))
        assert vmla("convert", wan_folder, "-o", out, *SET, "--no-calibration").code == 0
        ran = vmla("recover", out, "--teacher", wan_folder, "-o", again, "--data", "self",
                   "--prompts", tmp_path / "prompts.txt", "--clips", "4", "--frames", "4",
                   "--steps", "2", "--layerwise-steps", "0", "--batch-size", "2",
                   "--lr", "0.001")  # fmt: skip
        assert (ran.code, clips.is_dir()) == (0, True), ran.err
        measured = vmla("eval", again, "--teacher", wan_folder, "--data", clips, "--clips", "2",
                        "--json")  # fmt: skip
        assert measured.code == 0 and "velocity_error" in measured.out
        calibrated = tmp_path / "calibrated"
        ran = vmla("convert", wan_folder, "-o", calibrated, *SET, "--data", clips,
                   "--calibration-clips", "2", "--frames", "4")  # fmt: skip
        assert ran.code == 0, ran.err


class TestCommand:
    def test_makes_the_same_film_again(
        self, converted: Path, wan_folder: Path, tmp_path: Path, vmla: Vmla
    ) -> None:
        common = ("--prompt", PROMPT, "--base", wan_folder, "--seconds", "2",
                  "--prompt-at", "1s:two dogs")  # fmt: skip
        films = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
        for film in films:
            ran = vmla("generate", converted, *common, "-o", film)
            assert ran.code == 0, ran.err
        assert films[0].read_bytes() == films[1].read_bytes()
        assert len(list(read_frames(films[0]))) == 29
        ran = vmla("generate", converted, *common, "-o", tmp_path / "c.mp4", "--seed", "1")
        assert (tmp_path / "c.mp4").read_bytes() != films[0].read_bytes()

    def test_finds_components_beside_a_dense_checkpoint(
        self, wan_folder: Path, tmp_path: Path, vmla: Vmla
    ) -> None:
        ran = vmla("generate", wan_folder, "--prompt", PROMPT, "--frames", "3", *SET,
                   "-o", tmp_path / "a.mp4", "--vae-tiling", "--cpu-offload")  # fmt: skip
        assert ran.code == 0, ran.err
        assert len(list(read_frames(tmp_path / "a.mp4"))) == 9

    def test_goes_on_from_an_image(
        self, converted: Path, wan_folder: Path, tmp_path: Path, vmla: Vmla
    ) -> None:
        write_png(tmp_path / "cat.png", noise(3, 32, 48).clamp(-1, 1))
        for option in ("--image", "--prefix"):
            film = tmp_path / f"{option[2:]}.mp4"
            ran = vmla("generate", converted, "--prompt", PROMPT, "--base", wan_folder,
                       "--frames", "4", option, tmp_path / "cat.png", "-o", film)  # fmt: skip
            assert ran.code == 0, ran.err
            assert len(list(read_frames(film))) == 13

    def test_compares_side_by_side_and_holds_one_model_at_a_time(
        self,
        converted: Path,
        wan_folder: Path,
        tmp_path: Path,
        vmla: Vmla,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        held: list[weakref.ref[CausalWanModel]] = []
        real = loading.build

        def build(*args: Any) -> CausalWanModel:
            gc.collect()
            assert [model() for model in held] == [None] * len(held)
            model = real(*args)
            held.append(weakref.ref(model))
            return model

        monkeypatch.setattr(loading, "build", build)
        ran = vmla("generate", converted, "--prompt", PROMPT, "--frames", "3", "--compare",
                   converted.parent / "again", "-o", tmp_path / "a.mp4")  # fmt: skip
        assert refused(ran)
        shutil.copytree(converted, tmp_path / "again")
        ran = vmla("generate", converted, "--prompt", PROMPT, "--frames", "3", "--compare",
                   tmp_path / "again", "--base", wan_folder, "-o", tmp_path / "a.mp4")  # fmt: skip
        assert ran.code == 0, ran.err
        frames = list(read_frames(tmp_path / "a.mp4"))
        assert (len(frames), frames[0].shape[-1]) == (9, 98)
        assert len(held) == 2

    def test_compares_with_the_checkpoint_that_was_converted(
        self, converted: Path, wan_folder: Path, tmp_path: Path, vmla: Vmla
    ) -> None:
        """What was set for converting is set for that one again."""
        common = ("generate", converted, "--prompt", PROMPT, "--frames", "3")
        film = ("--compare", wan_folder, "--base", wan_folder, "-o", tmp_path / "a.mp4")
        ran = vmla(*common, *film)
        assert refused(ran)
        assert "differ in latent_size: (4, 6) and (60, 104)" in ran.err
        assert vmla(*common, *film, *SET, "--bytes-per-token", "20").code == 0
        assert (tmp_path / "a.png").is_file()

    def test_a_codec_takes_what_lies_beside_its_base(
        self, converted: Path, tmp_path: Path, vmla: Vmla
    ) -> None:
        words = ("generate", converted, "--prompt", PROMPT, "--frames", "3")
        assert vmla(*words, "-o", tmp_path / "a.mp4").code == 0

    def test_says_what_to_name_where_nothing_is_known(
        self, source: SourceConfig, tmp_path: Path, vmla: Vmla
    ) -> None:
        mla, film = tmp_path / "mla", tmp_path / "a.mp4"
        convert(source, mla, ConvertConfig(product="mla", calibrate=False, size=Sizes(cut=0.5)))
        ran = vmla("generate", mla, "--prompt", PROMPT, "-o", film)
        assert refused(ran)
        assert "--base" in ran.err
        assert list(tmp_path.iterdir()) == [mla]


def test_components_come_from_the_hub_part_by_part(
    config: ModelConfig, wan_folder: Path, media: Media, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening takes two small files; the VAE alone is fetched to decode."""
    taken: list[str] = []

    def fetched(repo: str, *parts: str) -> Path:
        assert repo == "someone/wan@v1"
        taken.extend(parts)
        return wan_folder

    monkeypatch.setattr("vmla_convert.media.components.fetch_parts", fetched)
    remote = open_media(config, MediaConfig("someone/wan@v1"))
    assert taken == ["vae/config.json", "text_encoder/config.json"]
    assert torch.equal(remote.decode(latents(1)), media.decode(latents(1)))
    assert taken[2:] == ["vae/"]
    assert torch.equal(remote.encode_prompts([PROMPT]), media.encode_prompts([PROMPT]))
    assert sorted(taken[3:]) == ["text_encoder/", "tokenizer/"]


def test_models_of_two_worlds_are_not_compared(
    wan_folder: Path, teacher: Path, tmp_path: Path, vmla: Vmla
) -> None:
    common = ("--prompt", "7", "--frames", "4", "-o", tmp_path / "out.mp4")
    ran = vmla("generate", teacher, *common, "--compare", wan_folder)
    assert refused(ran)
    assert "differ in media" in ran.err
    assert not list(tmp_path.iterdir())


def test_a_recipe_names_components_too(wan_folder: Path, tmp_path: Path, vmla: Vmla) -> None:
    shutil.copytree(wan_folder / "transformer", tmp_path / "alone")
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        f"""
        [recipe]
        name = "tiny"
        description = "A pipeline's transformer alone"
        [source]
        checkpoint = "{tmp_path / "alone"}"
        overrides = {json.dumps(SETTINGS)}
        [convert]
        calibrate = false
        cut = 0.5
        [generate]
        prompts = ["{PROMPT}"]
        frames = 3
        """
    )
    ran = vmla("run", recipe, "-o", tmp_path / "out")
    assert refused(ran)
    assert "--base" in ran.err
    base = json.dumps(f"generate.base={wan_folder}")[1:-1]
    assert vmla("run", recipe, "-o", tmp_path / "out", "--set", base).code == 0
    assert (tmp_path / "out" / "compare.png").is_file()
