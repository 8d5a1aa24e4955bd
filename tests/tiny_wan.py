"""A tiny Wan pipeline of the real classes, random, in diffusers' folder layout: under 1 MB.

Test files ask for the fixture with `pytest_plugins = ["tiny_wan"]`. PYTEST_DONT_REWRITE, because
they import the constants before pytest sees that.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from conftest import noise
from torch import Tensor, nn

from vmla_convert.config import ConvertConfig, MediaConfig, ModelConfig, Sizes, SourceConfig
from vmla_convert.loading.load import open_named
from vmla_convert.media.open import open_media
from vmla_convert.media.wan import WanMedia

T = TypeVar("T", bound=nn.Module)

TEXT_DIM = 32
PROMPT = "a cat walks on a red roof"
LATENT_SIZE = (4, 6)
"""Of a frame of 32 x 48 pixels."""

SETTINGS: dict[str, Any] = {
    "latent_size": [4, 6],
    "chunk_frames": 2,
    "cache": {"window_frames": 6, "sink_frames": 2, "frame_positions": "relative"},
    "sampler": {"denoising_step_list": [1000, 500]},
}
"""Settings that the pipeline's tensors do not show, in the form of `SourceConfig.overrides`."""

SET = [
    word
    for setting in (
        "latent_size=[4, 6]",
        "chunk_frames=2",
        "cache={window_frames=6, sink_frames=2, frame_positions='relative'}",
        "sampler.denoising_step_list=[1000, 500]",
    )
    for word in ("--set", f"model.{setting}")
]
"""The same settings as options of a command."""

CORPUS = (
    "a cat walks on a red roof in the rain",
    "two dogs run along the beach at sunset, slow motion",
    "a city at night, neon lights and wet streets",
    "The quick brown fox jumps over the lazy dog. 0 1 2 3 4 5 6 7 8 9",
)


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vae/, text_encoder/, tokenizer/, transformer/, scheduler/, model_index.json."""
    folder = tmp_path_factory.mktemp("wan") / "pipeline"
    save_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def wan_source(wan_folder: Path) -> SourceConfig:
    """The pipeline as a causal model of two latent frames a chunk."""
    return SourceConfig(str(wan_folder), overrides=SETTINGS)


@pytest.fixture(scope="session")
def wan_converted(wan_source: SourceConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLA conversion of the pipeline, in diffusers' layout."""
    from vmla_convert.fitting.convert import convert

    folder = tmp_path_factory.mktemp("wan_converted") / "pipe"
    convert(
        wan_source,
        folder,
        ConvertConfig("mla", init="spectral", size=Sizes(cut=0.5)),
        layout="diffusers",
    )
    return folder


@pytest.fixture(scope="session")
def wan_config(wan_source: SourceConfig) -> ModelConfig:
    return open_named(wan_source).config


@pytest.fixture(scope="session")
def wan_media(wan_config: ModelConfig, wan_folder: Path) -> WanMedia:
    """The pipeline's text encoder and VAE."""
    media = open_media(wan_config, MediaConfig(str(wan_folder)))
    assert isinstance(media, WanMedia)
    return media


def wan_latents(frames: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Random latents of the pipeline's size."""
    return noise(batch, frames, 16, *LATENT_SIZE, seed=seed)


def save_pipeline(folder: Path, seed: int = 0) -> None:
    """Write the whole pipeline, as `WanPipeline.save_pretrained` does."""
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(seed),
        vae=tiny_vae(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=tiny_transformer(seed),
    ).save_pretrained(folder)


def tiny_vae(seed: int = 0) -> Any:
    """Wan 2.1's VAE: 16 channels, strides of 4 in time and 8 in space."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    return _seeded(
        lambda: AutoencoderKLWan(
            base_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, scale_factor_spatial=8
        ),
        seed,
    )


def tiny_wide_vae(seed: int = 0) -> Any:
    """Wan 2.2's: residual, patches of 2 x 2 pixels, so strides of 4 and 16."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    return _seeded(
        lambda: AutoencoderKLWan(
            base_dim=4,
            decoder_base_dim=8,
            z_dim=48,
            dim_mult=[1, 2, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.01 * channel for channel in range(48)],
            latents_std=[1 + 0.02 * channel for channel in range(48)],
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
        ),
        seed,
    )


def tiny_transformer(seed: int = 0) -> Any:
    """Two layers of two heads of 12 channels."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    return _seeded(
        lambda: WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=TEXT_DIM,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
        ),
        seed,
    )


def tiny_text_encoder(seed: int = 0) -> Any:
    """UMT5 of two layers."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=160, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return _seeded(lambda: UMT5EncoderModel(config), seed)


def tiny_tokenizer() -> Any:
    """A unigram tokenizer trained on four sentences, with T5's special tokens and ending."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def _seeded(build: Callable[[], T], seed: int) -> T:
    """A module with the same random weights each time, and no gain or bias left trivial."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build().eval().requires_grad_(False)
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * (parameter.abs().mean() + 0.1))
    return module
