"""Streamed generation as a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from vmla_convert.config import MediaConfig, ModelConfig, RuntimeConfig, SamplerConfig
from vmla_convert.errors import ConfigError, MissingExtraError, did_you_mean
from vmla_convert.generating.rollout import NewPrompt, rollout
from vmla_convert.generating.sampler import State
from vmla_convert.interop.adapters import LoraReport, find_lora, read_lora
from vmla_convert.interop.transformer import (
    VMLATransformer,
    fetched,
    named_dtype,
    of_revision,
    refuse_options,
)
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.loading.load import Source, is_remote
from vmla_convert.maths.flow import TRAIN_TIMESTEPS, sampler_sigmas
from vmla_convert.media.clips import seeded
from vmla_convert.media.components import PARTS, Part, has_all_parts
from vmla_convert.media.demo import DemoMedia
from vmla_convert.media.prompts import encode_with_umt5
from vmla_convert.media.wan import denormalise, open_wan_media

try:
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
    from diffusers.loaders.lora_base import LoraBaseMixin
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
# Pixels to a latent: of Wan's VAEs, which may say otherwise in space, and of the demo's.
_WAN_STRIDES, _DEMO_STRIDES = (4, 8), (1, 2)
_CPU = torch.device("cpu")

Callback = (
    Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]
    | PipelineCallback
    | MultiPipelineCallbacks
)


class VMLAPipeline(DiffusionPipeline, LoraBaseMixin):
    """Text to video, streamed chunk by chunk through the model's own cache.

    How a chunk is sampled is the model's affair (`SamplerConfig`: a few steps that add fresh noise,
    or Euler), not the scheduler's, which is here for programs that look for one; swapping it
    changes nothing. There is no guidance. Models of the demo world need neither text encoder nor
    VAE.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    # Layers read parts of their weights, which hooks on single modules would miss.
    _exclude_from_cpu_offload = ["transformer"]  # noqa: RUF012
    _optional_components = ["scheduler", "vae", "text_encoder", "tokenizer"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents", "prompt_embeds"]  # noqa: RUF012
    _lora_loadable_modules = ["transformer"]  # noqa: RUF012

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
        **others: Any,
    ) -> Self:
        """A pipeline around any checkpoint that `vmla_convert.load` takes.

        Args:
            pretrained_model_name_or_path: A file, a folder of any layout, `demo`, or a Hub id.
            torch_dtype: Of all weights; float32 by default.
            base: A folder or Hub id that text encoder, tokenizer and VAE are taken from; by default
                what lies beside the checkpoint, else what is known of the model.
            dtype: The same as `torch_dtype`, by its newer name.
            revision: Of a Hub id.
            others: Components that are here already, by name, where None leaves one out; and what
                diffusers' own loader takes, refused unless it is of no matter here.

        Raises:
            CheckpointError: It is no checkpoint of a known layout, or a component cannot be had.
            ConfigError: No components are known for this model, or an option is not known.
        """
        known = ("transformer", "scheduler", *PARTS)
        refuse_options(cls, {name: value for name, value in others.items() if name not in known})
        components = {name: value for name, value in others.items() if name in known}
        source = of_revision(pretrained_model_name_or_path, revision)
        wanted = named_dtype(dtype or torch_dtype)
        transformer = components.pop("transformer", None)
        place: Path | None = None
        if transformer is None or not is_remote(source.checkpoint):
            source = fetched(source)
            place = Path(source.checkpoint)
        elif base is None and has_all_parts(source.checkpoint):
            base = source.checkpoint  # Its weights need not be fetched.
        if transformer is None:
            transformer = VMLATransformer.from_pretrained(source, torch_dtype=wanted)
        config: ModelConfig = transformer.wan.config
        lacking: list[Part] = [part for part in PARTS if part not in components]
        if config.media == "wan" and lacking:
            media = open_wan_media(config, MediaConfig(base), place, _CPU, wanted)
            components |= {part: media.component(part) for part in lacking}
        shift = config.sampler.shift
        components.setdefault("scheduler", FlowMatchEulerDiscreteScheduler(shift=shift))
        return cls(transformer, **components)

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
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        runtime: RuntimeConfig | None = None,
    ) -> WanPipelineOutput | tuple[Any]:
        """Generate videos.

        Args:
            prompt: One, or one for each video.
            height: In pixels; the model's own by default.
            width: In pixels; the model's own by default.
            num_frames: Of pixels; rounded, as diffusers does it, to what the VAE can make.
            num_inference_steps: Evenly spaced; by default the model's own list.
            num_videos_per_prompt: Videos of each prompt.
            guidance_scale: 1 at most, as there is no guidance.
            negative_prompt: Of no matter without guidance, as in diffusers.
            max_sequence_length: The model's own.
            generator: A fresh one gives the noise of `vmla_convert.generate` with its seed; a used
                one, other noise each time. A list has one for each video.
            latents: Noise to start from, (B, C, F, h, w).
            prompt_embeds: Contexts (B, text_len, text_dim) instead of prompts.
            output_type: `np`, `pt` or `pil`; `latent` for latents (B, C, F, h, w), not decoded.
            return_dict: False for a tuple.
            callback_on_step_end: Called with pipeline, step, timestep and tensors after each step
                of each chunk. `latents`, those of the chunk, that it returns are gone on with;
                `prompt_embeds` from the next chunk on.
            callback_on_step_end_tensor_inputs: Which tensors it is given: `latents`,
                `prompt_embeds`.
            runtime: Place of the cache, and how it is read.

        Raises:
            ConfigError: Arguments that do not go together or with the model.
        """
        if output_type not in OUTPUT_TYPES:
            raise ConfigError(
                f"no output_type '{output_type}'", did_you_mean(output_type, OUTPUT_TYPES)
            )
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_tensor_inputs(callback_on_step_end_tensor_inputs)
        self._check_guidance(guidance_scale, max_sequence_length)
        self._interrupt = False
        contexts = self._contexts(prompt, prompt_embeds)
        contexts = contexts.repeat_interleave(num_videos_per_prompt, dim=0)
        seeds = _seeds(generator, len(contexts))
        with self._configured(height, width, num_inference_steps) as model:
            frames = self._latent_frames(num_frames)
            _check_noise(latents, (len(contexts), frames), model.config)
            chunks = -(-frames // model.config.chunk_frames)
            self._num_timesteps = len(model.config.sampler.denoising_step_list)
            steps = chunks * self._num_timesteps
            with self.progress_bar(total=steps) as bar:  # pyright: ignore[reportCallIssue]
                watch = _Watch(
                    self,
                    callback_on_step_end,
                    callback_on_step_end_tensor_inputs,
                    contexts,
                    bar.update,
                )
                clean = torch.cat(self._chunks(model, chunks, seeds, latents, watch, runtime), 1)
        clean = clean[:, :frames].transpose(1, 2)
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
        """Put a LoRA as an adapter (peft) on what the conversion left as it was.

        What it changes of the keys and values that were factored into latents has no place any
        more: it is named in a warning and in the report. `set_adapters`, `fuse_lora` and
        `unload_lora_weights` are diffusers' own.

        Args:
            pretrained_model_name_or_path: A file or folder of any form that `--lora` takes, or a
                Hub id.
            weight_name: A file in it.
            adapter_name: For `set_adapters`.
            subfolder: That the file is in.

        Raises:
            CheckpointError: It is no LoRA of this model, or nothing of it can be loaded.
            MissingExtraError: peft is not installed.
        """
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("adapters", "lora") from error
        place = "/".join(filter(None, (subfolder, weight_name))) or None
        path = find_lora(pretrained_model_name_or_path, place)
        report, adapters = read_lora(self.transformer.wan, path)
        self.transformer.load_lora_adapter(
            {f"transformer.wan.{name}": tensor for name, tensor in adapters.items()},
            adapter_name=adapter_name,
            _pipeline=self,
        )
        if report.factored or report.unlike:
            logger.warning(str(report))
        return report

    def fuse_lora(self, components: list[str] | None = None, *how: Any, **others: Any) -> None:
        """Merge the active adapters into the weights; arguments as diffusers' own."""
        super().fuse_lora(components or self._lora_loadable_modules, *how, **others)

    def unfuse_lora(self, components: list[str] | None = None, **others: Any) -> None:
        """Take merged adapters out again; arguments as diffusers' own."""
        super().unfuse_lora(components or self._lora_loadable_modules, **others)

    @property
    def interrupt(self) -> bool:
        """Whether to stop after the step that is being done; a callback sets `_interrupt`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Steps of each chunk."""
        return self._num_timesteps

    def _chunks(
        self,
        model: CausalWanModel,
        chunks: int,
        seeds: list[int],
        latents: Tensor | None,
        watch: _Watch,
        runtime: RuntimeConfig | None,
    ) -> list[Tensor]:
        """Clean chunks (B, F, C, h, w), the last one noisy where a callback asked to stop."""
        self.transformer.ready()
        made: list[Tensor] = []
        try:
            for chunk in rollout(
                model,
                chunks,
                watch.new_prompt,
                lambda index: [seeded(seed, index, "rollout") for seed in seeds],
                runtime,
                noise=None if latents is None else latents.transpose(1, 2),
                after_step=watch,
            ):
                made.append(chunk)
        except _Interrupted as stop:
            made.append(stop.latents)
        return made

    @contextmanager
    def _configured(
        self, height: int | None, width: int | None, steps: int | None
    ) -> Iterator[CausalWanModel]:
        """The model under the size and the sampler of one call."""
        model = self.transformer.wan
        before = model.config
        sampler = before.sampler if steps is None else evenly_spaced(before.sampler, steps)
        stride = self._strides[1]
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
        """Pixels to a latent, in time and in space."""
        if self.transformer.wan.config.media == "demo":
            return _DEMO_STRIDES
        if self.vae is None:
            return _WAN_STRIDES
        config = self.vae.config
        return config["scale_factor_temporal"], config["scale_factor_spatial"]

    def _latent_frames(self, num_frames: int) -> int:
        if num_frames < 1:
            raise ConfigError(f"num_frames {num_frames} must be at least 1")
        stride = self._strides[0]
        return num_frames if stride == 1 else num_frames // stride + 1

    def _contexts(self, prompt: str | list[str] | None, prompt_embeds: Tensor | None) -> Tensor:
        """Contexts (B, text_len, text_dim)."""
        if (prompt is None) == (prompt_embeds is None):
            raise ConfigError("a video needs either a prompt or prompt_embeds")
        config = self.transformer.wan.config
        if prompt is None:
            assert prompt_embeds is not None
            return prompt_embeds
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if config.media == "demo":
            return DemoMedia().encode_prompts(prompts)
        if self.text_encoder is None or self.tokenizer is None:
            raise ConfigError(
                "this pipeline has no text encoder", "load it with base=, or give prompt_embeds"
            )
        device = self._execution_device
        return encode_with_umt5(self.text_encoder, self.tokenizer, prompts, config.geometry, device)

    def _pixels(self, latents: Tensor, output_type: str) -> Any:
        """Videos, in the form asked for, of latents (B, C, F, h, w)."""
        if self.transformer.wan.config.media == "demo":
            video = DemoMedia().decode(latents.transpose(1, 2)).transpose(1, 2)
        elif self.vae is None:
            raise ConfigError("this pipeline has no VAE", 'load it with base=, or ask for "latent"')
        else:
            # Called whole, which is what brings it to its device and what its own tiling goes with.
            inputs = denormalise(latents.to(self._execution_device), self.vae.config)
            video = self.vae.decode(inputs.to(self.vae.dtype), return_dict=False)[0]
        return self.video_processor.postprocess_video(video.float(), output_type)

    def _check_guidance(self, scale: float | None, length: int | None) -> None:
        """Refuse what Wan's own pipeline does and this one does not."""
        if scale is not None and scale > 1:
            raise ConfigError(
                f"guidance_scale {scale:g} asks for guidance, which there is none of here",
                "leave it out: models that were distilled to stream take none",
            )
        own = self.transformer.wan.config.geometry.text_len
        if length not in (None, own):
            raise ConfigError(
                f"max_sequence_length {length} is not the {own} that this model reads",
                "leave it out",
            )

    def _check_tensor_inputs(self, names: Sequence[str]) -> None:
        if odd := [name for name in names if name not in self._callback_tensor_inputs]:
            raise ConfigError(
                f"no tensor '{odd[0]}' for callback_on_step_end",
                did_you_mean(odd[0], self._callback_tensor_inputs),
            )


class _Interrupted(Exception):
    """A callback asked to stop; with the latents (B, F, C, h, w) of the chunk so far."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        self.latents = latents


class _Watch:
    """What is done after every step: progress, the user's callback, and the stop it asks for.

    Attributes:
        prompt_embeds: Contexts of the next chunk.
    """

    def __init__(
        self,
        pipeline: VMLAPipeline,
        callback: Callback | None,
        names: Sequence[str],
        prompt_embeds: Tensor,
        progress: Callable[[], Any],
    ) -> None:
        self._pipeline, self._callback, self._names = pipeline, callback, names
        self._progress, self._step = progress, 0
        sampler = pipeline.transformer.wan.config.sampler
        sigmas = sampler_sigmas(sampler.denoising_step_list, sampler.shift)
        self._timesteps = sigmas[:-1] * TRAIN_TIMESTEPS
        self.prompt_embeds, self._prompt_changed = prompt_embeds, False

    def new_prompt(self, frame: int) -> NewPrompt | None:
        """The contexts, at the first frame and where the callback changed them."""
        if frame and not self._prompt_changed:
            return None
        self._prompt_changed = False
        return NewPrompt(self.prompt_embeds, recache=False)

    def __call__(self, state: State) -> Tensor:
        """After a step: the latents (B, F, C, h, w) to go on with."""
        latents, step = state.latents, self._step
        self._step += 1
        self._progress()
        if self._callback is not None:
            tensors = {"latents": latents.transpose(1, 2), "prompt_embeds": self.prompt_embeds}
            given = {name: tensors[name] for name in self._names}
            timestep = self._timesteps[step % len(self._timesteps)]
            told = self._callback(self._pipeline, step, timestep, given) or {}
            latents = told.get("latents", tensors["latents"]).transpose(1, 2)
            embeds = told.get("prompt_embeds", self.prompt_embeds)
            self._prompt_changed |= embeds is not self.prompt_embeds
            self.prompt_embeds = embeds
            # The callback may have used a component, for which the transformer had to make room.
            self._pipeline.transformer.ready()
        if self._pipeline.interrupt:
            raise _Interrupted(latents)
        return latents


def evenly_spaced(sampler: SamplerConfig, steps: int) -> SamplerConfig:
    """The same sampler with another number of steps, at even timesteps before the shift.

    Raises:
        ConfigError: There are not that many timesteps.
    """
    total = int(TRAIN_TIMESTEPS)
    if not 1 <= steps <= total:
        raise ConfigError(f"num_inference_steps {steps} is not between 1 and {total}")
    return replace(
        sampler, denoising_step_list=tuple(total - total * i // steps for i in range(steps))
    )


def _seeds(generator: torch.Generator | list[torch.Generator] | None, clips: int) -> list[int]:
    """One seed for all clips, or one for each."""
    if generator is None:
        return [_drawn_seed(None)]
    if isinstance(generator, torch.Generator):
        return [_seed_of(generator)]
    if len(generator) != clips:
        raise ConfigError(f"{len(generator)} generators for {clips} videos", "give one for each")
    return [_seed_of(one) for one in generator]


def _seed_of(generator: torch.Generator) -> int:
    """A fresh generator's own seed, a used one's next number; it is used after that."""
    device, seed = generator.device, generator.initial_seed()
    fresh = torch.Generator(device).manual_seed(seed).get_state()
    is_fresh = torch.equal(fresh, generator.get_state())
    drawn = _drawn_seed(generator)
    return seed if is_fresh else drawn


def _drawn_seed(generator: torch.Generator | None) -> int:
    device = generator.device if generator is not None else "cpu"
    return int(torch.randint(2**62, (), generator=generator, device=device))


def _check_noise(latents: Tensor | None, clips: tuple[int, int], config: ModelConfig) -> None:
    """Refuse noise of another shape than the video's; `clips` is (B, F)."""
    batch, frames = clips
    wanted = (batch, config.geometry.in_dim, frames, *config.latent_size)
    if latents is not None and tuple(latents.shape) != wanted:
        raise ConfigError(f"latents have shape {tuple(latents.shape)}, this video's are {wanted}")
