"""Streamed generation as a diffusers pipeline.

B videos, C latent channels, F latent frames of size h, w.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from vmla_convert.config import MediaConfig, ModelConfig, RuntimeConfig
from vmla_convert.errors import ConfigError, MissingExtraError, did_you_mean
from vmla_convert.generating.rollout import rollout
from vmla_convert.interop.adapters import LoraReport, find_lora, read_lora
from vmla_convert.interop.seeds import seeds_of
from vmla_convert.interop.steps import Callback, Interrupted, Steps, evenly_spaced
from vmla_convert.interop.transformer import (
    VMLATransformer,
    fetched,
    named_dtype,
    refuse_options,
    settled,
)
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import Source, is_remote, locate_model
from vmla_convert.media.base import WAN_TEMPORAL_STRIDE
from vmla_convert.media.clips import seeded
from vmla_convert.media.components import PARTS, Part, has_all_parts
from vmla_convert.media.demo import DemoMedia
from vmla_convert.media.prompts import encode_with_umt5
from vmla_convert.media.wan import denormalise, open_wan_media

try:
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )
    from diffusers.utils import logging
    from diffusers.video_processor import VideoProcessor
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel
except ImportError as error:
    raise MissingExtraError("diffusers' pipelines", "wan") from error

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("np", "pt", "pil", "latent")


class VMLAPipeline(DiffusionPipeline, WanLoraLoaderMixin):
    """Text to video, streamed chunk by chunk through the model's own cache.

    The model's `SamplerConfig` decides how a chunk is sampled. The scheduler is there only for
    programs that expect one; another scheduler changes nothing. There is no guidance. Models of
    the demo world need neither text encoder nor VAE.
    """

    # diffusers asks every pipeline to set these names.
    model_cpu_offload_seq = "text_encoder->transformer->vae"
    # Layers use parts of their weights, which hooks on single modules would miss.
    _exclude_from_cpu_offload = ["transformer"]  # noqa: RUF012
    _optional_components = ["scheduler", "vae", "text_encoder", "tokenizer"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents", "prompt_embeds"]  # noqa: RUF012

    transformer: VMLATransformer
    vae: AutoencoderKLWan | None
    text_encoder: UMT5EncoderModel | None
    tokenizer: PreTrainedTokenizerBase | None

    def __init__(
        self,
        transformer: VMLATransformer,
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
        vae: AutoencoderKLWan | None = None,
        text_encoder: UMT5EncoderModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.video_processor = VideoProcessor(vae_scale_factor=self._strides[1])
        self._interrupt = False
        self._num_timesteps = 0

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: Source,
        torch_dtype: torch.dtype | str | None = None,
        base: str | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        base_model: str | Path | None = None,
        **others: Any,
    ) -> Self:
        """Load any checkpoint that `vmla_convert.load` takes as a pipeline.

        Args:
            pretrained_model_name_or_path: A file, a folder of any layout, `demo`, or a Hub id.
            torch_dtype: Precision of all weights. Default: float32.
            base: A folder or Hub id of text encoder, tokenizer and VAE. Default: the ones beside
                the checkpoint (a codec: beside its base model), else those known for the model.
            dtype: Newer name of `torch_dtype`.
            revision: Revision of a Hub id.
            base_model: Base model of a codec, for example the folder of a `WanPipeline`. Default:
                the one that the codec names.
            others: Loaded components by name, None to leave one out; and other options of
                diffusers' loader, refused if they would change the result.

        Raises:
            CheckpointError: The checkpoint or a component is missing.
            ConfigError: No components are known for this model, or an option is not known.
        """
        names = ("transformer", "scheduler", *PARTS)
        components = {name: others.pop(name) for name in names if name in others}
        refuse_options(cls, others)
        source = settled(pretrained_model_name_or_path, revision, base_model)
        wanted = named_dtype(dtype or torch_dtype)
        transformer = components.pop("transformer", None)
        place: Path | None = None
        if transformer is None or not is_remote(source.checkpoint):
            source = fetched(source)
            place = locate_model(source)
        elif base is None and has_all_parts(source.checkpoint):
            base = source.checkpoint  # The checkpoint's own weights need not be downloaded.
        if transformer is None:
            transformer = VMLATransformer.from_pretrained(source, torch_dtype=wanted)
        config: ModelConfig = transformer.wan.config
        lacking: list[Part] = [part for part in PARTS if part not in components]
        if config.media == "wan" and lacking:
            media = open_wan_media(config, MediaConfig(base), place, torch.device("cpu"), wanted)
            components |= {part: media.component(part) for part in lacking}
        shift = config.sampler.shift
        components.setdefault("scheduler", FlowMatchEulerDiscreteScheduler(shift=shift))
        return cls(transformer, **components)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Hide `auto_map`, which is for `AutoModel`; diffusers would warn of an unknown key."""
        rest = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().extract_init_dict(rest, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 81,
        num_inference_steps: int | None = None,
        num_videos_per_prompt: int = 1,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,  # noqa: ARG002
        max_sequence_length: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        runtime: RuntimeConfig | None = None,
    ) -> WanPipelineOutput | tuple[Any]:
        """Generate videos.

        Arguments mean the same as in diffusers' `WanPipeline`, except:

        - `height`, `width`: Default: the model's own size.
        - `num_frames`: Pixel frames, rounded to what the VAE can make.
        - `num_inference_steps`: Evenly spaced steps. Default: the model's own list.
        - `guidance_scale`: At most 1, so `negative_prompt` has no effect.
        - `generator`: A fresh generator gives the noise of `vmla_convert.generate` with its seed.
        - `latents`: Noise to start from (B, C, F, h, w).
        - `callback_on_step_end`: Called after each step of each chunk. `latents` in its result
          replace the chunk's; `prompt_embeds` take effect at the next chunk.
        - `runtime`: Size, precision and place of the cache.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        _check_choice("output_type", output_type, OUTPUT_TYPES)
        for name in callback_on_step_end_tensor_inputs:
            _check_choice("callback tensor", name, self._callback_tensor_inputs)
        self._check_guidance(guidance_scale, max_sequence_length)
        contexts = self._contexts(prompt, prompt_embeds)
        contexts = contexts.repeat_interleave(num_videos_per_prompt, dim=0)
        seeds, self._interrupt = seeds_of(generator, len(contexts)), False
        with self._configured(height, width, num_inference_steps) as model:
            shape = (len(contexts), self._latent_frames(num_frames))
            _check_noise(latents, shape, model.config)
            steps = Steps(self, callback_on_step_end, callback_on_step_end_tensor_inputs, contexts)
            clean = self._sample(model, shape[1], seeds, latents, steps, runtime)
        video = clean if output_type == "latent" else self._pixels(clean, output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=video) if return_dict else (video,)

    def load_lora_weights(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        pretrained_model_name_or_path: str | Path,
        weight_name: str | None = None,
        adapter_name: str | None = None,
        subfolder: str | None = None,
    ) -> LoraReport:
        """Load a LoRA as an adapter (peft) on the weights that the conversion kept.

        Changes of keys and values that an MLA conversion replaced by latents are left out. A
        warning and the report name these weights. `set_adapters`, `fuse_lora` and
        `unload_lora_weights` are diffusers' own.

        Args:
            pretrained_model_name_or_path: A file or folder in any form that `--lora` takes, or a
                Hub id.
            weight_name: A file in the folder or repository.
            adapter_name: Name for `set_adapters`.
            subfolder: Folder of the file.

        Raises:
            CheckpointError: The file is no LoRA of this model, or none of it can be loaded.
            MissingExtraError: peft is not installed.
        """
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("adapters", "lora") from error
        place = "/".join(filter(None, (subfolder, weight_name))) or None
        path = find_lora(pretrained_model_name_or_path, place)
        report, adapters = read_lora(self.transformer.wan, path)
        self.load_lora_into_transformer(
            {f"transformer.wan.{name}": tensor for name, tensor in adapters.items()},
            self.transformer,
            adapter_name,
            _pipeline=self,
        )
        if report.factored or report.unlike:
            logger.warning(str(report))
        return report

    @property
    def interrupt(self) -> bool:
        """Whether to stop after the current step; a callback sets `_interrupt`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Number of steps of each chunk."""
        return self._num_timesteps

    def _sample(
        self,
        model: CausalWanModel,
        frames: int,
        seeds: list[int],
        latents: Tensor | None,
        steps: Steps,
        runtime: RuntimeConfig | None,
    ) -> Tensor:
        """Return clean latents (B, C, F, h, w), up to a noisy chunk where a callback stopped."""
        self.transformer.ready()
        chunks = -(-frames // model.config.chunk_frames)
        self._num_timesteps = len(model.config.sampler.denoising_step_list)
        made: list[Tensor] = []
        with self.progress_bar(total=chunks * self._num_timesteps) as bar:  # pyright: ignore[reportCallIssue]
            steps.advance = bar.update
            try:
                for chunk in rollout(
                    model,
                    chunks,
                    steps.new_prompt,
                    lambda index: [seeded(seed, index, "rollout") for seed in seeds],
                    runtime,
                    noise=None if latents is None else latents.transpose(1, 2),
                    after_step=steps.after_step,
                ):
                    made.append(chunk)
            except Interrupted as stop:
                made.append(stop.latents)
        return torch.cat(made, dim=1)[:, :frames].transpose(1, 2)

    @contextmanager
    def _configured(
        self, height: int | None, width: int | None, steps: int | None
    ) -> Iterator[CausalWanModel]:
        """Give the model the size and the sampler of one call."""
        model, stride = self.transformer.wan, self._strides[1]
        before = model.config
        sampler = before.sampler if steps is None else evenly_spaced(before.sampler, steps)
        sides = zip((height, width), before.latent_size, strict=True)
        pixels = [stride * own if side is None else side for side, own in sides]
        if any(side % stride for side in pixels):
            raise ConfigError(f"height and width {pixels} must be multiples of {stride}")
        size = (pixels[0] // stride, pixels[1] // stride)
        model.config = replace(before, latent_size=size, sampler=sampler)
        try:
            yield model
        finally:
            model.config = before

    @property
    def _strides(self) -> tuple[int, int]:
        """Pixels per latent, in time and in space."""
        if self.transformer.wan.config.media == "demo":
            return 1, 2
        if self.vae is None:
            return WAN_TEMPORAL_STRIDE, 8
        config = self.vae.config
        return config["scale_factor_temporal"], config["scale_factor_spatial"]

    def _latent_frames(self, num_frames: int) -> int:
        if num_frames < 1:
            raise ConfigError(f"num_frames {num_frames} must be at least 1")
        stride = self._strides[0]
        return num_frames if stride == 1 else num_frames // stride + 1

    def _contexts(self, prompt: str | list[str] | None, prompt_embeds: Tensor | None) -> Tensor:
        """Return contexts (B, text_len, text_dim)."""
        if (prompt is None) == (prompt_embeds is None):
            raise ConfigError("a video needs either a prompt or prompt_embeds")
        if prompt_embeds is not None:
            return prompt_embeds
        config = self.transformer.wan.config
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        if config.media == "demo":
            return DemoMedia().encode_prompts(prompts)
        if self.text_encoder is None or self.tokenizer is None:
            raise ConfigError(
                "this pipeline has no text encoder", "load it with base=, or give prompt_embeds"
            )
        device = self._execution_device
        return encode_with_umt5(self.text_encoder, self.tokenizer, prompts, config.geometry, device)

    def _pixels(self, latents: Tensor, output_type: str) -> Any:
        """Decode latents (B, C, F, h, w) to videos of the given type."""
        if self.transformer.wan.config.media == "demo":
            video = DemoMedia().decode(latents.transpose(1, 2)).transpose(1, 2)
        elif self.vae is None:
            raise ConfigError("this pipeline has no VAE", 'load it with base=, or ask for "latent"')
        else:
            # A call of the whole VAE triggers the hooks that move it, and its own tiling.
            inputs = denormalise(latents.to(self._execution_device), self.vae.config)
            video = self.vae.decode(inputs.to(self.vae.dtype), return_dict=False)[0]
        return self.video_processor.postprocess_video(video.float(), output_type)

    def _check_guidance(self, scale: float | None, length: int | None) -> None:
        if scale is not None and scale > 1:
            raise ConfigError(
                f"guidance_scale {scale:g} asks for guidance, which this pipeline does not have",
                "leave it out: models that were distilled to stream take none",
            )
        own = self.transformer.wan.config.geometry.text_len
        if length not in (None, own):
            raise ConfigError(
                f"max_sequence_length {length} differs from the model's text length {own}",
                "leave it out",
            )


def _check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"no {what} '{value}'", did_you_mean(value, choices))


def _check_noise(latents: Tensor | None, shape: tuple[int, int], config: ModelConfig) -> None:
    """Refuse noise of another shape than that of B videos of F frames; `shape` is (B, F)."""
    batch, frames = shape
    wanted = (batch, config.geometry.in_dim, frames, *config.latent_size)
    if latents is not None and tuple(latents.shape) != wanted:
        raise ConfigError(f"latents have shape {tuple(latents.shape)}, this video's are {wanted}")
