"""Wan's own text encoder and VAE, from diffusers and transformers (extra `[wan]`).

Both are read when they are first needed, so that opening a media costs two small files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from vmla_convert.media.components import Components, Part, find_components
from vmla_convert.media.models import WAN_TEMPORAL_STRIDE, VideoDecoder
from vmla_convert.media.wan_inputs import denormalise, normalise, read_contexts

T = TypeVar("T")

PACKAGES = ("diffusers", "transformers", "ftfy")
TILE_PIXELS, TILE_OVERLAP = 256, 64

_OTHER_BASE = "name the components of this very model: --base DIR"


def open_wan_media(
    config: ModelConfig,
    how: MediaConfig,
    checkpoint: Path | None,
    device: torch.device,
    dtype: torch.dtype,
) -> WanMedia:
    """Find the components of a model and check that they fit it; arguments as `open_media`.

    Raises:
        CheckpointError: The components are not there.
        ConfigError: None are known, or they do not fit the model.
        MissingExtraError: diffusers or transformers are not installed.
    """
    if any(find_spec(package) is None for package in PACKAGES):
        raise MissingExtraError("Wan's text encoder and VAE", "wan")
    components = find_components(config, how.base, checkpoint)
    return WanMedia(config, components, how, device, dtype)


class WanMedia:
    """UMT5 and Wan's causal VAE.

    A prompt is cleaned as Wan cleans it, and its context is 0 after the end. The first latent frame
    is one frame of pixels, each later one four. Latents are normalised by the VAE's own mean and
    deviation, which is how a model of the Wan family sees them.
    """

    default_prompts: tuple[str, ...] = ()
    enlarged = 1

    def __init__(
        self,
        config: ModelConfig,
        components: Components,
        how: MediaConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Check the components against the model; nothing large is read yet."""
        self.config, self.components, self.how = config, components, how
        self.device, self.dtype = device, dtype
        self.name = f"wan, from {components}"
        self.frames_per_second = config.frames_per_second
        settings = components.settings("vae")
        # diffusers' defaults, which the config.json of Wan 2.1's VAE leaves out.
        self.stride = int(settings.get("scale_factor_spatial") or 8)
        geometry = config.geometry
        self._check_fits("vae", "latents", settings.get("z_dim", 16), geometry.in_dim)
        width = components.settings("text_encoder").get("d_model")
        self._check_fits("text_encoder", "contexts", width, geometry.text_dim)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Contexts (B, text_len, text_dim) of what the prompts say, 0 after their ends."""
        geometry = self.config.geometry
        with self._working(self._text_encoder) as encoder:
            return read_contexts(encoder, self._tokenizer, prompts, geometry, self.device)

    def free_text_encoder(self) -> None:
        """Forget the text encoder's weights until prompts come again."""
        vars(self).pop("_text_encoder", None)

    def pixel_shape(self, frames: int, latent_size: tuple[int, int]) -> tuple[int, int, int]:
        """Frames, height and width of the pixels that become latents of this many and this size."""
        height, width = latent_size
        return 1 + WAN_TEMPORAL_STRIDE * (frames - 1), self.stride * height, self.stride * width

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Pixels (B, 1 + 4k, 3, H, W) to latents (B, 1 + k, C, h, w), the modes of the VAE's."""
        with self._working(self._vae) as vae:
            # One by one, as a single clip can fill a GPU.
            modes = [
                vae.encode(clip[None].transpose(1, 2).to(self.device, self.dtype))
                .latent_dist.mode()
                .cpu()
                for clip in video
            ]
        return normalise(torch.cat(modes), self._vae.config).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, F, C, h, w) of a whole video to pixels (B, 1 + 4·(F − 1), 3, H, W)."""
        return self.decoder().decode(latents)

    def decoder(self) -> VideoDecoder:
        """A decoder at the start of a video; several may be used in turns."""
        return _Decoder(self)

    def decode_frame(self, features: _Features, latents: Tensor) -> Tensor:
        """The next latent frame (B, C, 1, h, w) of one tile to pixels (B, 3, 1 or 4, H, W)."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        vae = self._vae
        first, features.begun = not features.begun, True
        pixels = vae.decoder(
            vae.post_quant_conv(latents), features.cache, feat_idx=[0], first_chunk=first
        )
        patch = vae.config.patch_size
        return pixels if patch is None else unpatchify(pixels, patch)

    def new_features(self) -> _Features:
        """What the decoder remembers before the first frame."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        return _Features(sum(isinstance(m, WanCausalConv3d) for m in self._vae.decoder.modules()))

    def denormalised(self, latents: Tensor) -> Tensor:
        """Latents (B, F, C, h, w) as the VAE sees them, (B, C, F, h, w), where it works."""
        latents = latents.transpose(1, 2).to(self.device)
        return denormalise(latents, self._vae.config).to(self.dtype)

    @contextmanager
    def vae_working(self) -> Iterator[None]:
        """With the VAE on the device."""
        with self._working(self._vae):
            yield

    def component(self, part: Part) -> Any:
        """A component by itself, as a diffusers pipeline holds it; read when first asked for.

        Raises:
            CheckpointError: It cannot be had.
        """
        if part == "vae":
            return self._vae
        return self._text_encoder if part == "text_encoder" else self._tokenizer

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        # Unless told not to, transformers asks on the terminal whether to run a folder's own code.
        return self._read("tokenizer", AutoTokenizer.from_pretrained, trust_remote_code=False)

    @cached_property
    def _text_encoder(self) -> Any:
        from transformers import UMT5EncoderModel

        return self._load("text_encoder", UMT5EncoderModel.from_pretrained, dtype=self.dtype)

    @cached_property
    def _vae(self) -> Any:
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

        vae = self._load("vae", AutoencoderKLWan.from_pretrained, torch_dtype=self.dtype)
        if self.how.vae_tiling:
            # Of what is encoded; what is decoded chunk by chunk is tiled below.
            stride = TILE_PIXELS - TILE_OVERLAP
            vae.enable_tiling(TILE_PIXELS, TILE_PIXELS, stride, stride)
        return vae

    def _check_fits(self, part: Part, what: str, found: int | None, wanted: int) -> None:
        if found != wanted:
            raise ConfigError(
                f"the {part} of {self.components.place(part)} makes {what} of width {found}, the "
                f"model reads {wanted}",
                _OTHER_BASE,
            )

    def _load(self, part: Part, load: Callable[..., Any], **options: Any) -> Any:
        """A frozen module, refused where its files lack any of its weights."""
        options |= {"output_loading_info": True, "use_safetensors": True}
        module, told = self._read(part, load, **options)
        if told["missing_keys"]:
            raise CheckpointError(
                f"{part}/ of {self.components.place(part)} lacks {min(told['missing_keys'])}",
                "download it again",
            )
        home = "cpu" if self.how.cpu_offload else self.device
        return module.eval().requires_grad_(False).to(home)

    def _read(self, part: Part, load: Callable[..., T], **options: Any) -> T:
        folder = self.components.folder(part)
        try:
            with _quiet():
                return load(folder, local_files_only=True, **options)
        except Exception as error:  # both libraries raise whatever their readers do
            raise CheckpointError(
                f"{part}/ of {self.components.place(part)} cannot be loaded: {first_line(error)}",
                "download it again, or name another with --base",
            ) from error

    @contextmanager
    def _working(self, module: nn.Module) -> Iterator[Any]:
        """A module on the device, and back in host memory afterwards where it is to stay there."""
        try:
            yield module.to(self.device)
        finally:
            if self.how.cpu_offload:
                module.to("cpu")


class _Features:
    """What the VAE's causal convolutions remember of one tile of one video.

    Attributes:
        cache: One entry for each convolution, written by the decoder itself.
        begun: Whether a frame was decoded.
    """

    def __init__(self, convolutions: int) -> None:
        self.cache: list[Any] = [None] * convolutions
        self.begun = False


class _Decoder:
    """One video; owns its features, so that others may use the same VAE in between."""

    def __init__(self, media: WanMedia) -> None:
        self._media = media
        self._tiles: list[Tile] = []
        self._features: list[_Features] = []

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The next latents (B, F, C, h, w) to pixels (B, F', 3, H, W) in −1 … 1, on the CPU."""
        size = (latents.shape[-2], latents.shape[-1])
        if not self._features:
            self._tiles = self._cover(size)
            self._features = [self._media.new_features() for _ in self._tiles]
        stride = self._media.stride
        enlarged = [tile.scaled(stride) for tile in self._tiles]
        pixel_size = (size[0] * stride, size[1] * stride)
        made: list[Tensor] = []
        with self._media.vae_working():
            for frame in self._media.denormalised(latents).split(1, dim=2):
                parts = self._parts(frame)
                whole = parts[0] if len(parts) == 1 else blend(parts, enlarged, pixel_size)
                made.append(whole.float().cpu().clamp(-1, 1))
        return torch.cat(made, dim=2).transpose(1, 2)

    def _cover(self, size: tuple[int, int]) -> list[Tile]:
        if not self._media.how.vae_tiling:
            return [Tile((0, size[0]), (0, size[1]))]
        stride = self._media.stride
        return cover(size, TILE_PIXELS // stride, TILE_OVERLAP // stride)

    def _parts(self, frame: Tensor) -> list[Tensor]:
        return [
            self._media.decode_frame(features, tile.cut(frame))
            for tile, features in zip(self._tiles, self._features, strict=True)
        ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and remarks of both libraries; what matters is checked after loading."""
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
        for library, (verbosity, drawn) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if drawn:
                library.enable_progress_bar()
