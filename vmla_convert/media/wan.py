"""Wan's text encoder and VAE, from transformers and diffusers (extra `[wan]`).

Weights are loaded at their first use, so that opening the media costs two small files. B clips, F
latent frames, F' pixel frames, C latent channels; h, w and H, W are the sizes of latent and pixel
frames.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vmla_convert.config import MediaConfig, ModelConfig
from vmla_convert.errors import CheckpointError, ConfigError, MissingExtraError, first_line
from vmla_convert.maths.tiles import Tile, blend, cover
from vmla_convert.media.base import WAN_TEMPORAL_STRIDE, VideoDecoder
from vmla_convert.media.components import Components, Part, find_components
from vmla_convert.media.prompts import encode_with_umt5

T = TypeVar("T")

PACKAGES = ("diffusers", "transformers", "ftfy")
TILE_PIXELS, TILE_OVERLAP = 256, 64


def open_wan_media(
    config: ModelConfig,
    how: MediaConfig,
    checkpoint: Path | None,
    device: torch.device,
    dtype: torch.dtype,
) -> WanMedia:
    """Find the components of a model and check that they fit; arguments as in `open_media`."""
    if any(find_spec(package) is None for package in PACKAGES):
        raise MissingExtraError("Wan's text encoder and VAE", "wan")
    components = find_components(config, how.base, checkpoint)
    return WanMedia(config, components, how, device, dtype)


class WanMedia:
    """UMT5 and Wan's causal VAE.

    The first latent frame is one pixel frame, each later latent frame is four. Latents are
    normalised by the mean and deviation in the VAE's configuration.
    """

    enlarged = 1

    def __init__(
        self,
        config: ModelConfig,
        components: Components,
        how: MediaConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Check that the components fit the model, without loading weights."""
        self.config, self.components, self.how = config, components, how
        self.device, self.dtype = device, dtype
        self.name = f"wan, from {components}"
        self.frames_per_second = config.frames_per_second
        settings = components.settings("vae")
        # 8 and 16 are diffusers' defaults; the config.json of Wan 2.1's VAE leaves both out.
        self.stride = int(settings.get("scale_factor_spatial") or 8)
        geometry = config.geometry
        self._check_fits("vae", "latents", settings.get("z_dim", 16), geometry.in_dim)
        width = components.settings("text_encoder").get("d_model")
        self._check_fits("text_encoder", "contexts", width, geometry.text_dim)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Return contexts (B, text_len, text_dim), 0 after the end of each prompt."""
        geometry = self.config.geometry
        with self.on_device(self.text_encoder) as encoder:
            return encode_with_umt5(encoder, self.tokenizer, prompts, geometry, self.device)

    def free_text_encoder(self) -> None:
        """Drop the text encoder's weights until prompts come again."""
        vars(self).pop("text_encoder", None)

    def pixel_shape(self, frames: int, latent_size: tuple[int, int]) -> tuple[int, int, int]:
        """Return frames, height and width of the pixels that encode to latents of this shape."""
        height, width = latent_size
        return 1 + WAN_TEMPORAL_STRIDE * (frames - 1), self.stride * height, self.stride * width

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encode pixels (B, 1 + 4k, 3, H, W) to latents (B, 1 + k, C, h, w)."""
        with self.on_device(self.vae) as vae:
            # One clip at a time, because a single clip can fill a GPU.
            modes = [
                vae.encode(clip[None].transpose(1, 2).to(self.device, self.dtype))
                .latent_dist.mode()
                .cpu()
                for clip in video
            ]
        return normalise(torch.cat(modes), self.vae.config).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, F, C, h, w) of a whole video to pixels (B, 1 + 4·(F − 1), 3, H, W)."""
        return self.decoder().decode(latents)

    def decoder(self) -> VideoDecoder:
        """Return a decoder at the start of a video. Several decoders may run in turns."""
        return _Decoder(self)

    @contextmanager
    def on_device(self, module: nn.Module) -> Iterator[Any]:
        """Move a module to the device and, with `cpu_offload`, back to host memory afterwards."""
        try:
            yield module.to(self.device)
        finally:
            if self.how.cpu_offload:
                module.to("cpu")

    def component(self, part: Part) -> Any:
        """Return one component, as a diffusers pipeline holds it."""
        return getattr(self, part)

    @cached_property
    def vae(self) -> Any:
        """The `AutoencoderKLWan`, loaded at first use."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

        vae = self._load_weights("vae", AutoencoderKLWan.from_pretrained, torch_dtype=self.dtype)
        if self.how.vae_tiling:
            # Only for encoding. `_Decoder` makes its own tiles, because diffusers' tiled decoding
            # needs the whole video at once.
            stride = TILE_PIXELS - TILE_OVERLAP
            vae.enable_tiling(TILE_PIXELS, TILE_PIXELS, stride, stride)
        return vae

    @cached_property
    def tokenizer(self) -> Any:
        """The text encoder's tokenizer, loaded at first use."""
        from transformers import AutoTokenizer

        # Without trust_remote_code=False, transformers may ask on the terminal.
        return self._load("tokenizer", AutoTokenizer.from_pretrained, trust_remote_code=False)

    @cached_property
    def text_encoder(self) -> Any:
        """The `UMT5EncoderModel`, loaded at first use."""
        from transformers import UMT5EncoderModel

        load = UMT5EncoderModel.from_pretrained
        return self._load_weights("text_encoder", load, dtype=self.dtype)

    def _check_fits(self, part: Part, what: str, found: int | None, wanted: int) -> None:
        if found != wanted:
            raise ConfigError(
                f"the {part} of {self.components.place(part)} makes {what} of width {found}, the "
                f"model takes {wanted}",
                "name the components of this very model: --set media.base=DIR",
            )

    def _load_weights(self, part: Part, load: Callable[..., Any], **options: Any) -> Any:
        """Load a frozen module; refuse files that lack a weight."""
        options |= {"output_loading_info": True, "use_safetensors": True}
        module, info = self._load(part, load, **options)
        if info["missing_keys"]:
            raise CheckpointError(
                f"{part}/ of {self.components.place(part)} lacks {min(info['missing_keys'])}",
                "download it again",
            )
        home = "cpu" if self.how.cpu_offload else self.device
        return module.eval().requires_grad_(False).to(home)

    def _load(self, part: Part, load: Callable[..., T], **options: Any) -> T:
        folder = self.components.folder(part)
        try:
            with _quiet():
                return load(folder, local_files_only=True, **options)
        except Exception as error:  # the libraries let errors of their file readers through
            raise CheckpointError(
                f"{part}/ of {self.components.place(part)} cannot be loaded: {first_line(error)}",
                "download it again, or name another with --set media.base=DIR",
            ) from error


class _Decoder:
    """Decodes one video frame by frame, tile by tile.

    diffusers has no public way to continue a decoding. So this class calls the VAE's decoder
    module itself, as `AutoencoderKLWan.decode` does, and keeps the features of its causal
    convolutions for each tile. Several videos may share one VAE.
    """

    def __init__(self, media: WanMedia) -> None:
        self._media = media
        self._tiles: list[Tile] = []
        self._features: list[dict[int, Any]] = []

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next latents (B, F, C, h, w) to pixels (B, F', 3, H, W) on the CPU."""
        media, size = self._media, (latents.shape[-2], latents.shape[-1])
        if not self._tiles:
            self._tiles = self._cover(size)
            self._features = [defaultdict(lambda: None) for _ in self._tiles]
        enlarged = [tile.scaled(media.stride) for tile in self._tiles]
        pixel_size = (size[0] * media.stride, size[1] * media.stride)
        frames: list[Tensor] = []
        with media.on_device(media.vae) as vae:
            scaled = denormalise(latents.transpose(1, 2).to(media.device), vae.config)
            for frame in scaled.to(media.dtype).split(1, dim=2):
                parts = [
                    self._decode_tile(vae, tile.cut(frame), features)
                    for tile, features in zip(self._tiles, self._features, strict=True)
                ]
                whole = parts[0] if len(parts) == 1 else blend(parts, enlarged, pixel_size)
                frames.append(whole.float().cpu().clamp(-1, 1))
        return torch.cat(frames, dim=2).transpose(1, 2)

    def _decode_tile(self, vae: Any, latents: Tensor, features: dict[int, Any]) -> Tensor:
        """Decode a tile of a frame; features of several tiles wait in host memory."""
        if len(self._tiles) == 1:
            return _decode_frame(vae, latents, features)
        _move(features, self._media.device)
        pixels = _decode_frame(vae, latents, features)
        _move(features, torch.device("cpu"))
        return pixels

    def _cover(self, size: tuple[int, int]) -> list[Tile]:
        if not self._media.how.vae_tiling:
            return [Tile((0, size[0]), (0, size[1]))]
        stride = self._media.stride
        return cover(size, TILE_PIXELS // stride, TILE_OVERLAP // stride)


def _move(features: dict[int, Any], device: torch.device) -> None:
    """Move the features of a tile; entries without numbers stay."""
    for number, feature in features.items():
        if isinstance(feature, Tensor):
            features[number] = feature.to(device)


def _decode_frame(vae: Any, latents: Tensor, features: dict[int, Any]) -> Tensor:
    """Decode the next latent frame (B, C, 1, h, w) of a tile to pixels (B, 3, 1 or 4, H, W)."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    latents = vae.post_quant_conv(latents)
    pixels = vae.decoder(latents, features, feat_idx=[0], first_chunk=not features)
    patch = vae.config.patch_size
    return pixels if patch is None else unpatchify(pixels, patch)


def normalise(latents: Tensor, vae: Mapping[str, Any]) -> Tensor:
    """Normalise latents (B, C, F, h, w) by the mean and deviation in a VAE's config, in float32."""
    mean, deviation = _channel_scale(vae, latents.device)
    return (latents.float() - mean) / deviation


def denormalise(latents: Tensor, vae: Mapping[str, Any]) -> Tensor:
    """Undo `normalise`."""
    mean, deviation = _channel_scale(vae, latents.device)
    return latents.float() * deviation + mean


def _channel_scale(vae: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of a VAE's latents, both (C, 1, 1, 1)."""
    mean, deviation = (
        torch.tensor(vae[name], device=device).view(-1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    return mean, deviation


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of both libraries."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, had_bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if had_bars:
                library.enable_progress_bar()
